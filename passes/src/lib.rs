//! Rewrites of the IR.
//!
//! A [`Pass`] takes a program and gives one that means the same, as far as its [`Contract`] says. [`pipeline`] is the one list
//! of what runs for a target; [`run`] runs it and verifies the program after each pass. What a target can do is a [`Target`]
//! table, which [`legalize`](mod@legalize) obeys: an op that the table does not know is decomposed, or refused with a reason.

mod check;
mod clean;
mod legalize;
mod masks;
pub mod memory;
mod narrow;
pub mod quantize;
mod rules;
mod states;
mod target;
mod trace;
mod weights;

pub use check::{CheckError, Checked, check};
pub use rules::{Fused, Match, Pattern, Rule};
pub use states::keep_states;
pub use target::{Support, Target};
pub use trace::{Event, Trace};
use vlmc_ir::{BuildError, Diagnostic, Graph, Program, Verified, verify};

/// What a pass promises about the results of the program it gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contract {
    /// Bit for bit the same in the reference interpreter.
    Exact,
    /// The same up to the rounding of `f32`.
    Close,
    /// The same up to the rounding of `f16` or `bf16`.
    Narrow,
}

impl std::fmt::Display for Contract {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::Close => "close",
            Self::Narrow => "narrow",
        })
    }
}

/// A rewrite.
#[derive(Clone, Copy)]
pub struct Pass {
    /// Name, as `vlmc dump --after` takes it.
    pub name: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// What it promises.
    pub contract: Contract,
    run: Run,
}

#[derive(Clone, Copy)]
enum Run {
    Whole(fn(&Target, Program) -> Result<Program, PassError>),
    Rule(Rule),
}

impl Pass {
    /// A pass over whole programs.
    pub const fn new(
        name: &'static str,
        summary: &'static str,
        contract: Contract,
        run: fn(&Target, Program) -> Result<Program, PassError>,
    ) -> Self {
        Self { name, summary, contract, run: Run::Whole(run) }
    }

    /// A pass that applies a rule wherever it matches.
    pub const fn rule(name: &'static str, summary: &'static str, contract: Contract, rule: Rule) -> Self {
        Self { name, summary, contract, run: Run::Rule(rule) }
    }

    /// The program after the pass, and what the pass did.
    ///
    /// # Errors
    /// As [`run`].
    pub fn apply(&self, target: &Target, program: Verified) -> Result<(Verified, Trace), PassError> {
        let nodes = |p: &Program| p.graphs.iter().map(|g| g.nodes().len()).sum();
        let (before, mut events) = (nodes(&program), vec![]);
        let program = match &self.run {
            Run::Whole(run) => run(target, program.into_inner())?,
            Run::Rule(rule) => rules::apply(rule, program.into_inner(), &mut events)?,
        };
        let program = verify(program).map_err(|found| PassError::Invalid { pass: self.name, found })?;
        let trace = Trace { pass: self.name, nodes: [before, nodes(&program)], events };
        Ok((program, trace))
    }
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

/// What runs for vlmc's own runtime, in order.
///
/// Frontends write the largest op that says what a model means, so there is no pass that finds them: features of pictures are
/// merged by `merge_features`, patches of windows are contiguous by `window_order`, and attention knows its kind of mask.
pub const CPU: &[Pass] = &[
    weights::STORAGE,
    // The MLP's gate before other activations; the residual's sum wherever it is.
    rules::PACK_QKV,
    rules::PACK_GATE_UP,
    rules::LINEAR_ACTIVATION,
    rules::RESIDUAL_NORM,
    rules::ROTARY_ATTENTION,
    rules::PACKED_ATTENTION,
    legalize::LEGALIZE,
    clean::FOLD,
    clean::CSE,
    clean::DCE,
];

/// What runs for ONNX of standard ops, in order. It has no op for what the other rules fuse.
pub const ONNX: &[Pass] =
    &[weights::STORAGE, masks::GIVEN, masks::ONE_KEY, legalize::LEGALIZE, narrow::NARROW, clean::FOLD, clean::CSE, clean::DCE];

/// What runs for ONNX with ONNX Runtime's own operators, in order.
pub const ONNX_RUNTIME: &[Pass] = &[
    weights::STORAGE,
    rules::RESIDUAL_NORM,
    rules::late_split::NORM,
    rules::late_split::ROTARY,
    rules::late_split::SCALE,
    rules::merged_attention::GROUP_QUERY,
    rules::merged_attention::MULTI_HEAD,
    rules::ROUTED_MOE,
    masks::GIVEN,
    masks::ONE_KEY,
    legalize::LEGALIZE,
    narrow::NARROW,
    clean::FOLD,
    clean::CSE,
    clean::DCE,
];

/// Runs `passes` and calls `after` with each pass's trace and the program it made.
///
/// # Errors
/// [`PassError::Rejected`] if the target cannot run the program; the others are bugs.
pub fn run(target: &Target, program: Verified, passes: &[Pass], mut after: impl FnMut(&Trace, &Verified)) -> Result<Verified, PassError> {
    passes.iter().try_fold(program, |program, pass| {
        let (program, trace) = pass.apply(target, program)?;
        after(&trace, &program);
        Ok(program)
    })
}

fn map_graphs<E>(mut program: Program, f: impl FnMut(&Graph) -> Result<Graph, E>) -> Result<Program, E> {
    program.graphs = program.graphs.iter().map(f).collect::<Result<_, E>>()?;
    Ok(program)
}
