//! Fusion: rules that replace an expression by one op, one rule per file.
//!
//! A [`Rule`] is a [`Pattern`], which reads like the expression that it matches, and a replacement. Where the expression is
//! there but something speaks against its replacement, the rule says what: a name that stands for two values, a value that
//! others need as well, an operand of another kind where the pattern says [`Pattern::or_say_why`], or what the replacement
//! says. So a reader of `--trace-passes` learns why a layer was left as it is.

pub(crate) mod late_split;
mod linear_activation;
pub(crate) mod merged_attention;
mod pack_gate_up;
mod pack_qkv;
mod packed;
mod packed_attention;
mod pattern;
mod residual_norm;
mod rotary_attention;
mod routed_moe;

pub(crate) use linear_activation::LINEAR_ACTIVATION;
pub(crate) use pack_gate_up::PACK_GATE_UP;
pub(crate) use pack_qkv::PACK_QKV;
pub(crate) use packed_attention::PACKED_ATTENTION;
pub use pattern::{Match, Pattern};
pub(crate) use residual_norm::RESIDUAL_NORM;
pub(crate) use rotary_attention::ROTARY_ATTENTION;
pub(crate) use routed_moe::ROUTED_MOE;

use crate::{PassError, clean, trace::Event};
use std::collections::{BTreeMap, HashSet};
use vlmc_ir::{Graph, Patch, Program, ValueId, patch, weights::WeightDef};

/// An expression and what stands for it.
#[derive(Clone, Copy)]
pub struct Rule {
    /// The expression.
    pub pattern: fn() -> Pattern,
    /// What stands for a match, or why it stays.
    pub replace: fn(&Match<'_>) -> Result<Fused, String>,
}

/// What stands for a match.
pub struct Fused {
    /// The new nodes.
    pub patch: Patch,
    /// Weights that they need.
    pub weights: Vec<(String, WeightDef)>,
}

impl From<Patch> for Fused {
    fn from(patch: Patch) -> Self {
        Self { patch, weights: vec![] }
    }
}

/// Applies a rule wherever it matches. Matches do not overlap: the first one that replaces a value has it.
pub(crate) fn apply(rule: &Rule, mut program: Program, events: &mut Vec<Event>) -> Result<Program, PassError> {
    let pattern = (rule.pattern)();
    let mut made = BTreeMap::new();
    let mut graphs = vec![];
    for graph in &program.graphs {
        let users = pattern::users(graph);
        let (mut patches, mut replaced) = (vec![], HashSet::<ValueId>::new());
        for (id, node) in graph.nodes() {
            let Some((found, mut misses)) = pattern.find(graph, &users, id) else { continue };
            let fused = match (rule.replace)(&Match { program: &program, graph, users: &users, root: id, found }) {
                Ok(fused) => Some(fused),
                Err(why) => {
                    // What is wrong with the operands says more than what does not follow from them.
                    if misses.is_empty() {
                        misses.push(why);
                    }
                    None
                }
            };
            let fused = fused.filter(|_| misses.is_empty());
            if fused.as_ref().is_some_and(|f| f.patch.gives.iter().any(|v| replaced.contains(v))) {
                misses.push("another match has a part of it".into());
            }
            let event = |refused| Event { graph: graph.name.clone(), scope: node.scope.clone(), refused };
            match fused.filter(|_| misses.is_empty()) {
                Some(fused) => {
                    replaced.extend(&fused.patch.gives);
                    made.extend(fused.weights);
                    patches.push(fused.patch);
                    events.push(event(None));
                }
                None => events.push(event(Some(misses.join("; ")))),
            }
        }
        graphs.push(if patches.is_empty() { graph.clone() } else { clean::live(&patch(graph, &patches)?) });
    }
    program.graphs = graphs;
    program.weights.extend(made);
    Ok(program)
}

/// Where a value is used, per value of a graph.
type Users = Vec<usize>;

/// The value's one definition, if it is a weight.
fn weight_name(graph: &Graph, v: ValueId) -> Option<&str> {
    if let vlmc_ir::Def::Weight(name) = graph.def(v) { Some(name) } else { None }
}
