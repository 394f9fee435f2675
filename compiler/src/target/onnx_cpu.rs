//! `onnx-cpu`: ONNX Runtime on a CPU.

use super::onnx;
use vlmc_ir::{DType, Op, ops::Mask};
use vlmc_passes::{Support, Target};

pub(super) const TARGET: Target = Target {
    name: "onnx-cpu",
    summary: "ONNX graphs for ONNX Runtime on a CPU, with its own operators",
    supports: |target, op, args| match op {
        // Here it takes any mask as a tensor, so that padding may stand anywhere.
        Op::GroupQueryAttention(o) if o.mask == Mask::Causal => Support::Decompose,
        _ => onnx::runtime(target, op, args),
    },
    storage: |_| DType::F32,
    float: DType::F32,
    floats: &[DType::F32],
    opset: Some(onnx::ATTENTION_OPSET),
    opsets: &[onnx::ATTENTION_OPSET],
    own_operators: true,
    static_activations: false,
    passes: vlmc_passes::ONNX_RUNTIME,
};
