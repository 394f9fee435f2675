//! `onnx-cuda`: ONNX Runtime on an NVIDIA GPU.

use super::onnx;
use vlmc_ir::DType;
use vlmc_passes::Target;

pub(super) const TARGET: Target = Target {
    name: "onnx-cuda",
    summary: "ONNX graphs for ONNX Runtime on an NVIDIA GPU, in f16 or bf16, with its own operators",
    supports: onnx::runtime,
    storage: |_| DType::F32,
    float: DType::F16,
    floats: &[DType::F16, DType::BF16, DType::F32],
    opset: Some(onnx::ATTENTION_OPSET),
    opsets: &[onnx::ATTENTION_OPSET],
    own_operators: true,
    passes: vlmc_passes::ONNX_RUNTIME,
};
