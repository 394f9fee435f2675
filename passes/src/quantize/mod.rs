//! Quantization: a policy turns weights into quantized types, and linear layers of such weights into ones that round what
//! they read.

pub mod gptq;
mod policy;
pub mod scaling;

pub use policy::{BUILT_IN, Calibration, Choice, Part, Policy, PolicyError};

use crate::{Support, Target};
use std::{collections::BTreeMap, iter::successors};
use vlmc_ir::{
    DType, Def, Graph, Node, Op, Program, Scheme, Type, ValueId,
    ops::{FakeQuantize, Linear},
    rewrite,
};

/// Tables of fewer entries are left alone: positions and kinds of tokens, which are small and count for every token.
pub const LEAST_ENTRIES: usize = 8192;

/// What became of a weight that could have been quantized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Quantized.
    Done(Choice),
    /// The policy leaves it as it is.
    Left,
    /// The target cannot run it.
    Refused(String),
}

/// The parts of a model that weights belong to; a weight that is used in two ways belongs to the less robust one.
pub fn parts(program: &Program) -> BTreeMap<String, Part> {
    let mut parts = BTreeMap::new();
    for g in &program.graphs {
        let first = from_inputs(g);
        for (_, node) in g.nodes() {
            for (operand, v) in node.args.iter().enumerate() {
                let Def::Weight(name) = g.def(*v) else { continue };
                if let Some(part) = part(program, g, node, operand, &first) {
                    parts.entry(name.clone()).and_modify(|p: &mut Part| *p = part.max(*p)).or_insert(part);
                }
            }
        }
    }
    parts
}

fn part(program: &Program, g: &Graph, node: &Node, operand: usize, first: &[bool]) -> Option<Part> {
    let generates = |g: &Graph| !g.states.is_empty();
    match (&node.op, operand) {
        (Op::Linear(_), 1) => {
            let out = node.outs[0];
            let routes = g.nodes().any(|(_, n)| matches!(n.op, Op::Route(_)) && n.args.contains(&out));
            let leaves = generates(g) && g.outputs.iter().any(|o| moved_from(g, o.value) == out);
            Some(match () {
                () if routes => Part::Router,
                () if leaves => Part::Head,
                () if generates(g) => Part::Decoder,
                () if first[node.args[0].index()] => Part::First,
                () => Part::Tower,
            })
        }
        (Op::Moe(_), 3..=5) => Some(Part::Experts),
        (Op::Embedding(_), 0) => {
            let Def::Weight(name) = g.def(node.args[0]) else { return None };
            (program.weights.get(name)?.shape.first()? >= &LEAST_ENTRIES).then_some(Part::Table)
        }
        _ => None,
    }
}

/// Through moves, where the elements of a value come from.
fn moved_from(g: &Graph, mut v: ValueId) -> ValueId {
    while let Some(n) = g.producer(v).map(|n| g.node(n)).filter(|n| moves(&n.op)) {
        v = n.args[0];
    }
    v
}

fn moves(op: &Op) -> bool {
    matches!(op, Op::Reshape(_) | Op::Transpose(_) | Op::Slice(_) | Op::Gather(_) | Op::Cast(_) | Op::Broadcast(_))
}

/// Values that are elements of the graph's inputs, moved.
fn from_inputs(g: &Graph) -> Vec<bool> {
    let mut found: Vec<bool> = g.values().map(|(_, _, d)| matches!(d, Def::Input(_))).collect();
    for (_, n) in g.nodes() {
        if moves(&n.op) && found[n.args[0].index()] {
            n.outs.iter().for_each(|o| found[o.index()] = true);
        }
    }
    found
}

/// Quantizes the weights that `policy` names, as far as `target` runs them. Weights that come quantized stay so; for them the
/// policy says only whether what they multiply is rounded.
///
/// # Errors
/// A rewrite made something ill-typed: a bug.
pub fn quantize(target: &Target, policy: &Policy, mut program: Program) -> Result<(Program, BTreeMap<String, Outcome>), crate::PassError> {
    let mut outcomes = BTreeMap::new();
    for (name, part) in parts(&program) {
        let outcome = match policy.choice(&name, part) {
            None => Outcome::Left,
            Some(choice) => {
                let scheme = match program.weights.get(&name).and_then(|w| w.dtype.scheme()) {
                    Some(scheme) => refusal(target, &program, &name, scheme).map_or(Ok(scheme), Err),
                    None => fitting(target, &program, &name, choice.scheme),
                };
                scheme.map_or_else(Outcome::Refused, |scheme| Outcome::Done(Choice { scheme, ..choice }))
            }
        };
        outcomes.insert(name, outcome);
    }
    refuse_mixed(target, &program, &mut outcomes);
    let choice = |name: &str| if let Some(Outcome::Done(c)) = outcomes.get(name) { Some(*c) } else { None };
    program.map_weights(|name, w| match choice(name) {
        Some(c) if w.dtype.scheme().is_none() => w.quantize(c.scheme, c.method),
        _ => w.clone(),
    });
    program.graphs = program
        .graphs
        .iter()
        .map(|graph| {
            let rounds = |v: &ValueId| matches!(graph.def(*v), Def::Weight(name) if choice(name).is_some_and(|c| c.dynamic));
            let rounding = graph.nodes().any(|(_, n)| n.args.iter().any(rounds));
            rewrite(graph, |g, node, args| {
                let choice_of = |v: ValueId| if let Def::Weight(name) = graph.def(v) { choice(name) } else { None };
                let mut op = node.op.clone();
                match &mut op {
                    Op::Linear(linear) => linear.dynamic = choice_of(node.args[1])?.dynamic,
                    // Gate, up and down read rounded rows together or not at all.
                    Op::Moe(moe) => moe.dynamic = node.args[3..].iter().all(|v| choice_of(*v).is_some_and(|c| c.dynamic)),
                    // Where 8 bits do for linear layers, bf16 does for attention.
                    Op::Attention(attention) => attention.bf16 = rounding,
                    _ => return None,
                }
                (op != node.op).then(|| g.apply_op(op, args))
            })
        })
        .collect::<Result<_, _>>()?;
    Ok((program, outcomes))
}

/// Layers of 8 bits with a scale per row that round what they read do so in the same steps for all, which the largest number that
/// calibration saw a layer read decides; a layer that it did not see rounds nothing.
///
/// # Errors
/// A rewrite made something ill-typed: a bug.
pub fn round_statically(mut program: Program, largest: &dyn Fn(&str) -> Option<f32>) -> Result<Program, crate::PassError> {
    program.graphs = program
        .graphs
        .iter()
        .map(|graph| {
            rewrite(graph, |g, node, args| {
                let (Op::Linear(linear), Def::Weight(name)) = (&node.op, graph.def(*node.args.get(1)?)) else { return None };
                let rows = graph.ty(node.args[1]).dtype.scheme().is_some_and(|s| s.bits == 8 && s.group.is_none());
                let largest = largest(name).filter(|v| linear.dynamic && rows && *v > 0.0 && v.is_finite())?;
                let [x] = g.apply(FakeQuantize { scale: f64::from(largest) / 127.0 }, &args[..1]);
                Some(g.apply_op(Linear { dynamic: false, ..linear.clone() }.into(), &[&[x], &args[1..]].concat()))
            })
        })
        .collect::<Result<_, _>>()?;
    Ok(program)
}

/// Leaves experts as they are whose stacks the policy wants in different types, where `target` runs them in one only.
fn refuse_mixed(target: &Target, program: &Program, outcomes: &mut BTreeMap<String, Outcome>) {
    for (g, node) in program.graphs.iter().flat_map(|g| g.nodes().map(move |(_, n)| (g, n))) {
        let Op::Moe(_) = node.op else { continue };
        let name = |v: &ValueId| if let Def::Weight(name) = g.def(*v) { Some(name.clone()) } else { None };
        let ty = |v: &ValueId| match name(v).and_then(|name| outcomes.get(&name).cloned()) {
            Some(Outcome::Done(c)) => g.ty(*v).with_dtype(DType::Quant(c.scheme)),
            _ => g.ty(*v).clone(),
        };
        let types: Vec<Type> = node.args.iter().map(ty).collect();
        if let Support::Reject(why) = target.support(&node.op, &types) {
            let stacks = node.args.iter().filter_map(name).filter(|n| matches!(outcomes.get(n), Some(Outcome::Done(_))));
            let stacks: Vec<String> = stacks.collect();
            outcomes.extend(stacks.into_iter().map(|name| (name, Outcome::Refused(why.clone()))));
        }
    }
}

/// `scheme` or, where `target` does not run the weight of that name in it, the scheme of the largest smaller groups, of 32 columns or more,
/// that it runs it in: more rows are whole groups.
///
/// # Errors
/// Why it does not run it in `scheme`, if it does in none.
pub fn fitting(target: &Target, program: &Program, name: &str, scheme: Scheme) -> Result<Scheme, String> {
    let Some(why) = refusal(target, program, name, scheme) else { return Ok(scheme) };
    let smaller = |s: &Scheme| s.group.filter(|g| *g > 32).map(|g| Scheme { group: Some(g / 2), ..*s });
    successors(smaller(&scheme), smaller).find(|s| refusal(target, program, name, *s).is_none()).ok_or(why)
}

/// Why `target` does not run the weight of that name in that type, if so.
pub fn refusal(target: &Target, program: &Program, name: &str, scheme: Scheme) -> Option<String> {
    program.graphs.iter().flat_map(|g| g.nodes().map(move |(_, n)| (g, n))).find_map(|(g, node)| {
        let reads = |v: &ValueId| matches!(g.def(*v), Def::Weight(n) if n == name);
        if !node.args.iter().any(reads) {
            return None;
        }
        // Stacks of experts go together.
        let together = |i: usize| matches!(node.op, Op::Moe(_)) && i >= 3;
        let ty = |(i, v): (usize, &ValueId)| {
            if reads(v) || together(i) { g.ty(*v).with_dtype(DType::Quant(scheme)) } else { g.ty(*v).clone() }
        };
        match target.support(&node.op, &node.args.iter().enumerate().map(ty).collect::<Vec<Type>>()) {
            Support::Native => None,
            Support::Reject(why) => Some(why),
            Support::Decompose => Some(format!("'{}' is run in parts, which read no quantized weights", node.op.name())),
        }
    })
}
