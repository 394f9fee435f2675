//! Targets: what each can run, in one table per file. Adding a target is a file here and a backend that writes it down.

mod cpu;
mod onnx_cpu;

use crate::{Error, Result};
use vlmc_passes::Target;

/// All targets, the default first.
pub static TARGETS: &[&Target] = &[&cpu::TARGET, &onnx_cpu::TARGET];

/// The target of that name.
///
/// # Errors
/// [`Error::Target`] lists the targets there are.
pub fn named(name: &str) -> Result<&'static Target> {
    TARGETS.iter().find(|t| t.name == name).copied().ok_or_else(|| Error::Target(name.into()))
}
