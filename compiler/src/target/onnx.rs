//! What the tables of the `onnx-*` targets share.

use crate::back::onnx;
use vlmc_artifact::{Scheme, program::Unary};
use vlmc_ir::{DType, Op, Type, ops::Mask};
use vlmc_passes::{Support, Target};

/// First operator set with `RMSNormalization`, `RotaryEmbedding` and `Attention`.
pub(crate) const ATTENTION_OPSET: i64 = 23;
/// First operator set whose reductions take axes as an operand, as sums always did.
pub(crate) const AXES_OPSET: i64 = 18;
/// First operator set whose `QuantizeLinear` and `DequantizeLinear` know floats other than `f32`.
pub(crate) const NARROW_SCALES_OPSET: i64 = 19;
/// First operator set with `Gelu`.
pub(crate) const GELU_OPSET: i64 = 20;

/// Why a weight of that scheme is not run, if no operator reads it.
pub(super) fn unread(scheme: Scheme) -> Option<Support> {
    (scheme.bits == 3).then(|| Support::Reject(format!("no operator of ONNX or ONNX Runtime reads 3 bits ({scheme})")))
}

/// Operators of the standard, and nothing else.
pub(super) fn standard(target: &Target, op: &Op, args: &[Type]) -> Support {
    if let Some(t) = args.iter().find(|t| t.dtype.scheme().is_none() && !known(target, t.dtype)) {
        return Support::Reject(format!("it computes in {}, not {}", target.float, t.dtype));
    }
    let new = target.opset.is_some_and(|v| v >= ATTENTION_OPSET);
    match op {
        Op::Append(a) if a.keep != DType::F32 => Support::Reject(format!("its states are inputs and outputs of f32, not {}", a.keep)),
        Op::Cast(o) if !known(target, o.dtype) => Support::Reject(format!("it computes in {}, not {}", target.float, o.dtype)),
        // x * sigmoid(...) is two nodes that every reader fuses or runs as fast.
        Op::Elementwise1(o) if matches!(o.f, Unary::Silu | Unary::QuickGelu) => Support::Decompose,
        Op::Elementwise1(o) if matches!(o.f, Unary::Gelu | Unary::GeluTanh) && target.opset < Some(GELU_OPSET) => Support::Decompose,
        // There is no product with an activation.
        Op::Linear(o) if o.act.is_some() => Support::Decompose,
        // Attention takes a mask tensor, which the pass `given-masks` makes.
        Op::Attention(o) if matches!(o.mask, Mask::Causal | Mask::Segments) => Support::Decompose,
        // With fewer leading axes there is no batch to attend in, with more no such op.
        Op::Attention(_) | Op::Rotary(_) if !new || !matches!(args[0].rank(), 3 | 4) => Support::Decompose,
        Op::RmsNorm(_) if !new => Support::Decompose,
        Op::Elementwise1(_)
        | Op::Elementwise2(_)
        | Op::Select(_)
        | Op::Cast(_)
        | Op::Iota(_)
        | Op::DimValue(_)
        | Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Broadcast(_)
        | Op::Concat(_)
        | Op::Slice(_)
        | Op::Gather(_)
        | Op::ReduceOp(_)
        | Op::CumSum(_)
        | Op::MatMul(_)
        | Op::Append(_)
        | Op::TopK(_)
        | Op::Conv2d(_)
        | Op::Linear(_)
        | Op::FakeQuantize(_)
        | Op::Embedding(_)
        | Op::LayerNorm(_)
        | Op::RmsNorm(_)
        | Op::Rotary(_)
        | Op::Attention(_) => Support::Native,
        Op::SplitHeads(_)
        | Op::BatchNorm(_)
        | Op::MergeHeads(_)
        | Op::MergeFeatures(_)
        | Op::GridPositions(_)
        | Op::Rotary2d(_)
        | Op::Mrope(_)
        | Op::Rope(_)
        | Op::StretchedPositions(_)
        | Op::WindowOrder(_)
        | Op::NtkRope(_)
        | Op::LogN(_)
        | Op::ResizeWeights(_)
        | Op::Route(_)
        | Op::TileRows(_)
        | Op::GridRelative(_)
        | Op::Gated(_)
        | Op::AddLayerNorm(_)
        | Op::AddRmsNorm(_)
        | Op::RotaryAttention(_)
        | Op::PackedAttention(_)
        | Op::MergedRotary(_)
        | Op::MultiHeadAttention(_)
        | Op::GroupQueryAttention(_)
        | Op::Moe(_)
        | Op::RoutedMoe(_) => Support::Decompose,
    }
}

/// Types that a graph's values have, packed ones apart.
fn known(target: &Target, d: DType) -> bool {
    d == target.float || matches!(d, DType::F32 | DType::I64 | DType::Bool)
}

/// Whether the last dim is known to be that many.
pub(super) fn at_least(t: &Type, n: i64) -> bool {
    t.shape.last().and_then(vlmc_ir::Dim::as_const).is_some_and(|d| d >= n)
}

/// Whether the last dim is a multiple of 8.
pub(super) fn in_eights(t: &Type) -> bool {
    t.shape.last().and_then(vlmc_ir::Dim::as_const).is_some_and(|d| d % 8 == 0)
}

/// Those of the standard, and ONNX Runtime's own.
pub(super) fn runtime(target: &Target, op: &Op, args: &[Type]) -> Support {
    let scheme = args.iter().find_map(|t| t.dtype.scheme());
    if let Some(refused) = scheme.and_then(unread) {
        return refused;
    }
    match (op, scheme) {
        // MatMulNBits.
        (Op::Linear(o), Some(_)) if o.act.is_none() => return Support::Native,
        // GatherBlockQuantized.
        (Op::Embedding(_), Some(scheme)) => {
            let whole = args[0].shape[1].as_const().is_some_and(|k| k % onnx::block(op, 0, scheme, &args[0]) as i64 == 0);
            return match (scheme.zero_points, whole) {
                (true, _) => Support::Reject("a table of quantized rows has no zero points".into()),
                (_, false) => Support::Reject("rows of a quantized table must be whole blocks".into()),
                _ => Support::Native,
            };
        }
        // The pass `routed-moe` makes a RoutedMoe of it.
        (Op::Moe(o), Some(scheme)) if o.act == Unary::Silu => return quantized_experts(op, scheme, &args[3..], 3),
        (Op::RoutedMoe(_), Some(scheme)) => return quantized_experts(op, scheme, &args[2..], 2),
        (Op::Moe(_), Some(_)) => return Support::Reject("quantized experts have a gate of silu".into()),
        (Op::Linear(_), Some(_)) | (_, None) => {}
        (_, Some(_)) => return Support::Reject("only linear layers, tables and experts read quantized weights".into()),
    }
    let dims = |t: &Type| matches!(t.rank(), 2 | 3);
    match op {
        // QuickGelu.
        Op::Elementwise1(o) if matches!(o.f, Unary::Silu | Unary::QuickGelu) => Support::Native,
        // SkipLayerNormalization and SkipSimplifiedLayerNormalization.
        Op::AddLayerNorm(_) | Op::AddRmsNorm(_) if dims(&args[0]) => Support::Native,
        Op::MergedRotary(_) if dims(&args[0]) => Support::Native,
        // As many heads of keys as of queries.
        Op::MultiHeadAttention(o) if o.heads == o.kv_heads && matches!(o.mask, Mask::Full | Mask::Given) && dims(&args[0]) => {
            Support::Native
        }
        // Keys and values of one width, a multiple of 8. Of a causal mask it takes the lengths of the rows.
        Op::GroupQueryAttention(o) if o.mask != Mask::Segments && args[3].shape == args[4].shape && in_eights(&args[3]) => Support::Native,
        // MoE.
        Op::RoutedMoe(_) => Support::Native,
        _ => standard(target, op, args),
    }
}

/// QMoE, of which all stacks have codes alike, in blocks that divide what each product reads. The stacks begin at operand `first`.
fn quantized_experts(op: &Op, scheme: Scheme, stacks: &[Type], first: usize) -> Support {
    if let Some(other) = stacks.iter().find(|t| t.dtype != DType::Quant(scheme)) {
        return Support::Reject(format!("experts are quantized alike or not at all: there are {scheme} and {}", other.dtype));
    }
    let whole = |(i, t): (usize, &Type)| {
        let block = onnx::block(op, first + i, scheme, t) as i64;
        t.shape[2].as_const().is_some_and(|k| k % block == 0)
    };
    if stacks.iter().enumerate().all(whole) {
        Support::Native
    } else {
        Support::Reject(format!("rows of quantized experts must be whole blocks: {} is not", stacks[0]))
    }
}
