//! Rewrites of the IR.
//!
//! A [`Pass`] takes a program and gives one that means the same, as far as its [`Contract`] says. [`pipeline`] is the one list
//! of what runs for a target; [`run`] runs it and verifies the program after each pass. What a target can do is a [`Target`]
//! table, which [`legalize`](mod@legalize) obeys: an op that the table does not know is decomposed, or refused with a reason.

mod clean;
mod legalize;
mod masks;
pub mod memory;
pub mod quantize;
mod states;
mod target;
mod weights;

pub use states::keep_states;
pub use target::{Support, Target};
use vlmc_ir::{BuildError, Diagnostic, Graph, Program, Verified, verify};

/// What a pass promises about the results of the program it gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contract {
    /// Bit for bit the same in the reference interpreter.
    Exact,
    /// The same up to the rounding of `f32`.
    Close,
}

/// A rewrite.
pub struct Pass {
    /// Name, as `vlmc dump --after` takes it.
    pub name: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// What it promises.
    pub contract: Contract,
    run: fn(&Target, Program) -> Result<Program, PassError>,
}

/// Why a pass stopped.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The target cannot run an op.
    #[error("target '{target}': {graph}: {scope}: {op}: {reason}")]
    Rejected {
        /// Target name.
        target: &'static str,
        /// Graph name.
        graph: String,
        /// Scope of the node.
        scope: String,
        /// Op and operand types.
        op: String,
        /// Why.
        reason: String,
    },
    /// A rewrite made something ill-typed: a bug of the pass.
    #[error("pass made an ill-typed node: {0}")]
    Build(BuildError),
    /// The program does not verify after a pass: a bug of the pass.
    #[error("program is invalid after pass '{pass}':{}", .found.iter().map(|d| format!("\n  {d}")).collect::<String>())]
    Invalid {
        /// Pass name.
        pass: &'static str,
        /// What is wrong.
        found: Vec<Diagnostic>,
    },
}

/// By hand, since `#[from]` makes a source as well, and the message would be printed twice.
impl From<BuildError> for PassError {
    fn from(e: BuildError) -> Self {
        Self::Build(e)
    }
}

/// What runs for a target, in order.
pub fn pipeline(target: &Target) -> Vec<Pass> {
    let mut passes = vec![weights::STORAGE];
    if target.given_masks {
        passes.extend([masks::GIVEN, masks::ONE_KEY]);
    }
    passes.extend([legalize::LEGALIZE, clean::FOLD, clean::CSE, clean::DCE]);
    passes
}

/// Runs `passes` and calls `after` with each pass and the program it made.
///
/// # Errors
/// [`PassError::Rejected`] if the target cannot run the program; the others are bugs.
pub fn run(target: &Target, program: Verified, passes: &[Pass], mut after: impl FnMut(&Pass, &Verified)) -> Result<Verified, PassError> {
    passes.iter().try_fold(program, |program, pass| {
        let program = (pass.run)(target, program.into_inner())?;
        let program = verify(program).map_err(|found| PassError::Invalid { pass: pass.name, found })?;
        after(pass, &program);
        Ok(program)
    })
}

fn map_graphs<E>(mut program: Program, f: impl FnMut(&Graph) -> Result<Graph, E>) -> Result<Program, E> {
    program.graphs = program.graphs.iter().map(f).collect::<Result<_, E>>()?;
    Ok(program)
}
