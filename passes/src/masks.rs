//! Attention masks.

use crate::{Contract, Pass, Support, map_graphs};
use vlmc_ir::{
    Bindings, DType, Literal, Op,
    ops::{Attention, GroupQueryAttention, Mask, MultiHeadAttention, causal_mask, segment_mask},
    rewrite,
};

/// Attention whose mask is known by kind gets it as a `bool` tensor, which [`crate::clean::CSE`] then shares among layers.
pub(crate) const GIVEN: Pass = Pass::new(
    "given-masks",
    "attention masks as tensors, where the target does not know their kind",
    Contract::Exact,
    |target, program| {
        map_graphs(program, |graph| {
            rewrite(graph, |g, node, args| {
                let mut op = node.op.clone();
                let mask = mask_of(&mut op)?;
                let queries = args[0].dim(args[0].ty().rank() - 2);
                let (last, operands) = args.split_last()?;
                let types: Vec<_> = args.iter().map(|a| a.ty()).collect();
                let known = matches!(mask, Mask::Causal | Mask::Segments) && target.support(&node.op, &types) == Support::Native;
                let given = match *mask {
                    _ if known => return None,
                    Mask::Full => return None,
                    // One row for all queries: runtimes of other people want as many as there are.
                    Mask::Given => {
                        let mut shape = last.ty().shape;
                        let row = shape.len().checked_sub(2)?;
                        if shape[row] == queries {
                            return None;
                        }
                        shape[row] = queries;
                        g.broadcast(*last, shape)
                    }
                    Mask::Causal => causal_mask(g, *last, &queries),
                    Mask::Segments => segment_mask(g, *last),
                };
                *mask = Mask::Given;
                Some(g.apply_op(op, &[operands, &[given]].concat()))
            })
            .map_err(Into::into)
        })
    },
);

/// The mask of an attention, whose operand is the last.
fn mask_of(op: &mut Op) -> Option<&mut Mask> {
    match op {
        Op::Attention(Attention { mask, .. })
        | Op::MultiHeadAttention(MultiHeadAttention { mask, .. })
        | Op::GroupQueryAttention(GroupQueryAttention { mask, .. }) => Some(mask),
        _ => None,
    }
}

/// Attention of graphs in which there may be no keys (no pictures to attend to) gets one more, which nobody sees: runtimes of
/// other people refuse to attend to nothing.
pub(crate) const ONE_KEY: Pass =
    Pass::new("one-key", "a hidden key where attention may have none, for targets that need one", Contract::Close, |_, program| {
        let least: Bindings = program.symbols.iter().map(|s| (s.name.as_str(), s.min)).collect();
        map_graphs(program, |graph| {
            rewrite(graph, |g, node, args| {
                let (Op::Attention(Attention { mask: Mask::Given, .. })
                | Op::MultiHeadAttention(MultiHeadAttention { mask: Mask::Given, .. })) = &node.op
                else {
                    return None;
                };
                let axis = args[1].ty().rank() - 2;
                let t = args[1].dim(axis);
                let last = args[3].ty().rank() - 1;
                if t.eval(&least) != Ok(0) || args[3].dim(last) != t {
                    return None;
                }
                let hidden = if args[3].ty().dtype == DType::F32 { f64::from(f32::MIN) } else { 0.0 };
                let longer = [(args[1], axis, 0.0), (args[2], axis, 0.0), (args[3], last, hidden)].map(|(x, axis, fill)| {
                    let mut one = x.ty();
                    one.shape[axis] = 1.into();
                    g.concat(&[x, g.broadcast(g.literal(Literal::scalar(one.dtype, fill)), one.shape)], axis)
                });
                Some(g.apply_op(node.op.clone(), &[&args[..1], &longer].concat()))
            })
            .map_err(Into::into)
        })
    });
