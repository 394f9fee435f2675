//! What a target can do.

use crate::Pass;
use vlmc_ir::{DType, Op, Type, weights::WeightDef};

/// Whether a target runs an op.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Support {
    /// The backend has it.
    Native,
    /// By way of the op's decomposition.
    Decompose,
    /// Not at all.
    Reject(String),
}

/// The table of a target. Targets differ in this and in how their backend writes an op down, in nothing else.
#[derive(Clone, Copy)]
pub struct Target {
    /// Name as `--target` takes it.
    pub name: &'static str,
    /// What it is, in a line.
    pub summary: &'static str,
    /// How an op with these operand types is run.
    pub supports: fn(&Target, &Op, &[Type]) -> Support,
    /// Element type that its graphs compute in: `f32`, or a narrower one except where precision needs it ([`crate::ONNX`]).
    pub float: DType,
    /// Types that [`Self::float`] may be.
    pub floats: &'static [DType],
    /// Version of the standard operators that its graphs use, if it is a target of ONNX.
    pub opset: Option<i64>,
    /// Whether its graphs may have operators of ONNX Runtime's own.
    pub own_operators: bool,
    /// Whether what layers of 8 bits read is rounded in steps that calibration finds, rather than in steps of each token's own.
    pub static_activations: bool,
    /// Versions that [`Self::opset`] may be.
    pub opsets: &'static [i64],
    /// Element type in which the artifact stores a weight.
    pub storage: fn(&WeightDef) -> DType,
    /// What runs for it, in order.
    pub passes: &'static [Pass],
}

impl Target {
    /// How an op with these operand types is run.
    pub fn support(&self, op: &Op, types: &[Type]) -> Support {
        (self.supports)(self, op, types)
    }
}
