//! `cpu`: vlmc's own runtime.

use vlmc_ir::{DType, Op, ops::Mask};
use vlmc_passes::{Support, Target};

pub(super) const TARGET: Target = Target {
    name: "cpu",
    summary: "vlmc's own CPU runtime: no other library",
    supports: |_, op, args| match op {
        _ if args.iter().any(|t| t.dtype.scheme().is_some()) && !matches!(op, Op::Linear(_) | Op::Embedding(_) | Op::Moe(_)) => {
            Support::Reject("only linear layers, tables and experts read quantized weights".into())
        }
        // A mask for several leading axes would need as many strides.
        Op::Attention(a) if a.mask == Mask::Given && args[0].rank() > 4 => Support::Decompose,
        // The cache of the runtime has four axes.
        Op::RotaryAttention(_) if args[0].rank() != 4 => Support::Decompose,
        Op::PackedAttention(a) if a.mask == Mask::Given && args[0].rank() > 3 => Support::Decompose,
        // Weights are widened by the kernels that read them, never on their own.
        Op::Cast(c) if args.iter().any(|t| is_narrow(t.dtype)) || is_narrow(c.dtype) => {
            Support::Reject("the runtime computes in f32 and converts no narrower floats".into())
        }
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
        | Op::Moe(_)
        | Op::Linear(_)
        | Op::Embedding(_)
        | Op::LayerNorm(_)
        | Op::RmsNorm(_)
        | Op::Rotary(_)
        | Op::Attention(_)
        | Op::Gated(_)
        | Op::AddLayerNorm(_)
        | Op::AddRmsNorm(_)
        | Op::RotaryAttention(_)
        | Op::PackedAttention(_) => Support::Native,
        Op::MergedRotary(_) | Op::MultiHeadAttention(_) | Op::GroupQueryAttention(_) | Op::RoutedMoe(_) | Op::FakeQuantize(_) => {
            Support::Decompose
        }
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
        | Op::Conv2d(_)
        | Op::ResizeWeights(_)
        | Op::Route(_)
        | Op::TileRows(_)
        | Op::GridRelative(_) => Support::Decompose,
    },
    // Matrices stay as they are: kernels widen them exactly. Vectors are small, and kernels want them in f32.
    storage: |w| if w.shape.len() < 2 { DType::F32 } else { w.dtype },
    float: DType::F32,
    floats: &[DType::F32],
    opset: None,
    opsets: &[],
    own_operators: false,
    static_activations: false,
    passes: vlmc_passes::CPU,
};

fn is_narrow(d: DType) -> bool {
    d.is_float() && d != DType::F32
}
