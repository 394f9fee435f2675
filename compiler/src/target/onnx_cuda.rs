//! `onnx-cuda`: ONNX Runtime on an NVIDIA GPU.

use super::onnx;
use vlmc_ir::{DType, Op};
use vlmc_passes::{Support, Target};

pub(super) const TARGET: Target = Target {
    name: "onnx-cuda",
    summary: "ONNX graphs for ONNX Runtime on an NVIDIA GPU, in f16 or bf16, with its own operators",
    supports: |target, op, args| match op {
        // QMoE's kernel here reads weights in an order of its own (CUTLASS's), which is not that of the standard's operators.
        Op::Moe(_) | Op::RoutedMoe(_) if args.iter().any(|t| t.dtype.scheme().is_some()) => {
            Support::Reject("the GPU's kernel for quantized experts reads them in an order of its own".into())
        }
        // In bf16 the kernel of MoE takes the logits for f32 (ONNX Runtime 1.25). It wants rows of 16 bytes, 16 of them at least.
        Op::RoutedMoe(_) if target.float == DType::BF16 || !args[2..].iter().all(|t| onnx::in_eights(t) && onnx::at_least(t, 16)) => {
            Support::Decompose
        }
        _ => onnx::runtime(target, op, args),
    },
    storage: |_| DType::F32,
    float: DType::F16,
    floats: &[DType::F16, DType::BF16, DType::F32],
    opset: Some(onnx::ATTENTION_OPSET),
    opsets: &[onnx::ATTENTION_OPSET],
    own_operators: true,
    static_activations: false,
    passes: vlmc_passes::ONNX_RUNTIME,
};
