//! Targets: what each can run, in one table per file. Adding a target is a file here and a backend that writes it down.

mod cpu;
pub(crate) mod kernels;
pub(crate) mod onnx;
mod onnx_cpu;
mod onnx_cuda;
mod onnx_tensorrt;

use crate::{Error, Result};
use vlmc_ir::DType;
use vlmc_passes::Target;

/// All targets, the default first.
pub static TARGETS: &[&Target] = &[&cpu::TARGET, &onnx_cpu::TARGET, &onnx_cuda::TARGET, &onnx_tensorrt::TARGET];

/// The target of that name.
///
/// # Errors
/// [`Error::Target`] lists the targets there are.
pub fn named(name: &str) -> Result<&'static Target> {
    TARGETS.iter().find(|t| t.name == name).copied().ok_or_else(|| Error::Target(name.into()))
}

/// The target of that name, with graphs that compute in `float` and of version `opset` where these are given.
///
/// # Errors
/// As [`named`], or the target has no such graphs.
pub fn configured(name: &str, float: Option<DType>, opset: Option<i64>) -> Result<Target> {
    let mut target = *named(name)?;
    let unfit = |what: &str, value: String, known: Vec<String>| {
        let known = if known.is_empty() { "none".into() } else { known.join(", ") };
        Error::TargetOption(format!("{what} {value} is not for target '{name}'; it takes {known}"))
    };
    if let Some(float) = float {
        if !target.floats.contains(&float) {
            return Err(unfit("--dtype", float.to_string(), target.floats.iter().map(DType::to_string).collect()));
        }
        target.float = float;
    }
    if let Some(opset) = opset {
        if !target.opsets.contains(&opset) {
            return Err(unfit("--opset", opset.to_string(), target.opsets.iter().map(i64::to_string).collect()));
        }
        target.opset = Some(opset);
    }
    Ok(target)
}
