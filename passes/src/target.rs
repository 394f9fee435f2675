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
pub struct Target {
    /// Name as `--target` takes it.
    pub name: &'static str,
    /// What it is, in a line.
    pub summary: &'static str,
    /// How an op with these operand types is run.
    pub supports: fn(&Op, &[Type]) -> Support,
    /// Element type in which the artifact stores a weight.
    pub storage: fn(&WeightDef) -> DType,
    /// What runs for it, in order.
    pub passes: &'static [Pass],
}
