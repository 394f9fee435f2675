//! Narrower floats.

use crate::{Contract, Pass, map_graphs};
use vlmc_artifact::program::{Binary, Unary};
use vlmc_ir::{Builder, DType, Def, Graph, Literal, Node, Op, Val, rewrite};

/// Computes in the target's narrow float: products, attention, norms and what is done to their results, and states. What follows
/// from positions (rotary angles), sums and exponentials that stand on their own, and the inputs and outputs of graphs stay in
/// `f32`. Kernels of products, norms and attention sum in `f32` whatever they read.
pub(crate) const NARROW: Pass =
    Pass::new("narrow", "products and what follows from them, in the target's narrow float", Contract::Narrow, |target, mut program| {
        let float = target.float;
        if float == DType::F32 {
            return Ok(program);
        }
        program.map_weights(|_, w| if w.dtype.scheme().is_some() { w.clone() } else { w.cast(float) });
        map_graphs(program, |graph| narrow(graph, float))
    });

fn narrow(graph: &Graph, float: DType) -> Result<Graph, crate::PassError> {
    let graph = graph.with_states(|_, ty| if ty.dtype.is_float() { ty.with_dtype(float) } else { ty.clone() });
    let leaves = |v| graph.outputs.iter().any(|o| o.value == v);
    rewrite(&graph, |g, node, args| {
        let literal = |i: usize| matches!(graph.def(node.args[i]), Def::Literal(_));
        let floats = || args.iter().enumerate().filter(|(_, a)| is_number(a.ty().dtype));
        let to = if wide(&node.op) {
            DType::F32
        } else if computes(&node.op) || floats().any(|(i, a)| a.ty().dtype == float && !literal(i)) {
            float
        } else {
            return None;
        };
        let args: Vec<Val<'_>> = args
            .iter()
            .zip(&node.args)
            .map(|(a, v)| match graph.def(*v) {
                _ if !is_number(a.ty().dtype) || a.ty().dtype == to => *a,
                Def::Literal(l) => g.literal(rounded(l, to)),
                _ => g.cast(*a, to),
            })
            .collect();
        Some(outputs(g, node, &args, leaves))
    })
    .map_err(Into::into)
}

/// The node's results; those that leave the graph in `f32`.
fn outputs<'g>(g: &'g Builder<'g>, node: &Node, args: &[Val<'g>], leaves: impl Fn(vlmc_ir::ValueId) -> bool) -> Vec<Val<'g>> {
    let outs = g.apply_op(node.op.clone(), args);
    outs.into_iter().zip(&node.outs).map(|(y, v)| if leaves(*v) && is_number(y.ty().dtype) { g.cast(y, DType::F32) } else { y }).collect()
}

fn is_number(d: DType) -> bool {
    matches!(d, DType::F32 | DType::F16 | DType::BF16)
}

/// Ops that compute in the narrow float, whatever they read.
fn computes(op: &Op) -> bool {
    matches!(
        op,
        Op::Linear(_)
            | Op::FakeQuantize(_)
            | Op::MatMul(_)
            | Op::Conv2d(_)
            | Op::LayerNorm(_)
            | Op::RmsNorm(_)
            | Op::AddLayerNorm(_)
            | Op::AddRmsNorm(_)
            | Op::Rotary(_)
            | Op::MergedRotary(_)
            | Op::Attention(_)
            | Op::MultiHeadAttention(_)
            | Op::GroupQueryAttention(_)
            | Op::RoutedMoe(_)
            | Op::Append(_)
    )
}

/// Ops that lose too much in a narrow float, and those of which runtimes have no other kernels.
fn wide(op: &Op) -> bool {
    match op {
        Op::Elementwise1(o) => matches!(o.f, Unary::Exp | Unary::Log | Unary::Sqrt | Unary::Sin | Unary::Cos | Unary::Floor | Unary::Round),
        Op::Elementwise2(o) => o.f == Binary::Pow,
        Op::ReduceOp(_) | Op::CumSum(_) | Op::TopK(_) => true,
        _ => false,
    }
}

/// A literal in another float type, in its range.
fn rounded(l: &Literal, to: DType) -> Literal {
    let limit = match to {
        DType::F16 => f64::from(half::f16::MAX.to_f32()),
        DType::BF16 => f64::from(half::bf16::MAX.to_f32()),
        _ => f64::from(f32::MAX),
    };
    let round = |v: f64| match to {
        DType::F16 => f64::from(half::f16::from_f64(v).to_f32()),
        DType::BF16 => f64::from(half::bf16::from_f64(v).to_f32()),
        _ => v,
    };
    Literal { dtype: to, shape: l.shape.clone(), data: l.data.iter().map(|v| round(v.clamp(-limit, limit))).collect() }
}
