//! `onnx-cpu`: ONNX Runtime on a CPU.

use super::onnx;
use vlmc_ir::DType;
use vlmc_passes::Target;

pub(super) const TARGET: Target = Target {
    name: "onnx-cpu",
    summary: "ONNX graphs for ONNX Runtime on a CPU, with its own operators",
    supports: onnx::runtime,
    storage: |_| DType::F32,
    float: DType::F32,
    floats: &[DType::F32],
    opset: Some(onnx::ATTENTION_OPSET),
    opsets: &[onnx::ATTENTION_OPSET],
    own_operators: true,
    passes: vlmc_passes::ONNX_RUNTIME,
};
