//! `onnx-cpu`: standard ONNX, opset 23, and for quantized weights ONNX Runtime's own operators, for ONNX Runtime's CPU provider and any other reader.

use crate::back;
use vlmc_artifact::program::Unary;
use vlmc_ir::{DType, Op, ops::Mask};
use vlmc_passes::{Support, Target};

pub(super) const TARGET: Target = Target {
    name: "onnx-cpu",
    summary: "ONNX graphs (opset 23, standard ops) for ONNX Runtime on a CPU",
    supports: |op, args| {
        match (op, args.iter().find_map(|t| t.dtype.scheme())) {
            // MatMulNBits.
            (Op::Linear(_), Some(_)) => return Support::Native,
            // GatherBlockQuantized.
            (Op::Embedding(_), Some(scheme)) => {
                let whole = args[0].shape[1].as_const().is_some_and(|k| k % back::blocks(scheme, k as usize).0 as i64 == 0);
                return match (scheme.zero_points, whole) {
                    (true, _) => Support::Reject("a table of quantized rows has no zero points".into()),
                    (_, false) => Support::Reject("rows of a quantized table must be whole blocks".into()),
                    _ => Support::Native,
                };
            }
            (_, Some(_)) => return Support::Reject("only linear layers and tables read quantized weights".into()),
            _ => {}
        }
        if let Some(t) = args.iter().find(|t| !matches!(t.dtype, DType::F32 | DType::I64 | DType::Bool)) {
            return Support::Reject(format!("the CPU provider computes in f32, not {}", t.dtype));
        }
        match op {
            Op::Append(a) if a.keep != DType::F32 => Support::Reject(format!("its states are inputs and outputs of f32, not {}", a.keep)),
            // x * sigmoid(...) is two nodes that every reader fuses or runs as fast.
            Op::Elementwise1(o) if matches!(o.f, Unary::Silu | Unary::QuickGelu) => Support::Decompose,
            // There is no product with an activation.
            Op::Linear(o) if o.act.is_some() => Support::Decompose,
            // Attention takes a mask tensor, which the pass `given-masks` makes.
            Op::Attention(o) if matches!(o.mask, Mask::Causal | Mask::Segments) => Support::Decompose,
            // With fewer leading axes there is no batch to attend in, with more no such op.
            Op::Attention(_) | Op::Rotary(_) if !matches!(args[0].rank(), 3 | 4) => Support::Decompose,
            Op::Cast(o) if !matches!(o.dtype, DType::F32 | DType::I64 | DType::Bool) => {
                Support::Reject(format!("the CPU provider computes in f32, not {}", o.dtype))
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
            | Op::Conv2d(_)
            | Op::Linear(_)
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
            | Op::Moe(_) => Support::Decompose,
        }
    },
    storage: |_| DType::F32,
    passes: vlmc_passes::ONNX,
};
