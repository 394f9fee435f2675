//! `onnx-tensorrt`: TensorRT, by ONNX Runtime or alone. It reads operators of the standard only, and symmetric codes.

use super::onnx;
use vlmc_ir::{DType, Op, Type};
use vlmc_passes::{Support, Target};

pub(super) const TARGET: Target = Target {
    name: "onnx-tensorrt",
    summary: "ONNX graphs of standard operators for TensorRT, in f16, bf16 or f32",
    supports,
    storage: |_| DType::F32,
    float: DType::F16,
    floats: &[DType::F16, DType::BF16, DType::F32],
    opset: Some(onnx::ATTENTION_OPSET),
    opsets: &[17, 18, 19, 20, 21, 22, 23],
    own_operators: false,
    static_activations: true,
    passes: vlmc_passes::ONNX,
};

/// First operator set whose `DequantizeLinear` reads blocks and 4 bits.
const BLOCKS_OPSET: i64 = 21;

fn supports(target: &Target, op: &Op, args: &[Type]) -> Support {
    let scheme = args.iter().find_map(|t| t.dtype.scheme());
    if let Some(refused) = scheme.and_then(onnx::unread) {
        return refused;
    }
    match (op, scheme) {
        // DequantizeLinear before the product.
        (Op::Linear(_), Some(scheme)) if scheme.zero_points => {
            Support::Reject(format!("TensorRT reads symmetric codes only, and {scheme} has zero points"))
        }
        (Op::Linear(_), Some(scheme)) if (scheme.bits == 4 || scheme.group.is_some()) && target.opset < Some(BLOCKS_OPSET) => {
            Support::Reject(format!("codes in blocks need opset {BLOCKS_OPSET}"))
        }
        (Op::Linear(o), Some(scheme)) => {
            let whole = args[1].shape[1].as_const().is_some_and(|k| scheme.group.is_none_or(|g| k % i64::from(g) == 0));
            match (whole, o.act.is_none()) {
                (false, _) => Support::Reject("rows of a quantized matrix must be whole blocks".into()),
                (true, true) => Support::Native,
                (true, false) => Support::Decompose,
            }
        }
        (_, Some(_)) => Support::Reject("only linear layers read quantized weights".into()),
        (_, None) => onnx::standard(target, op, args),
    }
}
