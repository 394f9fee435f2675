//! Experts as ONNX Runtime runs them: one matrix for gate and up, whose rows come in turn, and logits that a softmax makes weights of.

use super::{Fused, Match, Pattern, Rule};
use crate::{Contract, Pass};
use vlmc_artifact::program::{Binary, Reduce, Unary};
use vlmc_ir::{
    DType, Dim, Literal, Op, Patch, Type,
    ops::{RoutedMoe, shares},
    weights::{Recipe, WeightDef},
};

pub(crate) const ROUTED_MOE: Pass = Pass::rule(
    "routed-moe",
    "experts with gate and up as one, chosen by logits",
    Contract::Close,
    Rule {
        pattern: || {
            let weights = ["gate", "up", "down"].map(Pattern::weight);
            let values = ["x", "experts", "weights"].map(Pattern::value);
            Pattern::op("moe", |op| matches!(op, Op::Moe(_)), [values, weights].concat())
        },
        replace,
    },
);

/// A weight below this counts as this: its logarithm is finite, and in the range of `f16`.
const LEAST: f64 = 1e-30;

fn replace(m: &Match<'_>) -> Result<Fused, String> {
    let Op::Moe(moe) = &m.graph.node(m.root).op else { return Err("there are no experts".into()) };
    if moe.act != Unary::Silu {
        return Err(format!("the gate's activation is {}, not silu", Op::from(vlmc_ir::ops::Elementwise1 { f: moe.act }).name()));
    }
    let (gate, up) = (m.weight(m.value("gate")?)?, m.weight(m.value("up")?)?);
    if gate.1.dtype != up.1.dtype {
        return Err(format!("the gate is {}, up {}", gate.1.dtype, up.1.dtype));
    }
    for name in ["gate", "up"] {
        if m.users[m.value(name)?.index()] != 1 {
            return Err(format!("{name} is used elsewhere"));
        }
    }
    let [e, rows, h] = gate.1.shape[..] else { return Err("the gate is no stack of matrices".into()) };
    let k = m.ty(m.value("experts")?).shape.get(1).and_then(Dim::as_const).and_then(|k| usize::try_from(k).ok());
    let op = RoutedMoe { k: k.ok_or("the number of experts of a row is not known")?, dynamic: moe.dynamic };
    let name = format!("{}+{}", gate.0, up.0);
    let recipe = Recipe::Interleave(vec![gate.1.recipe.clone(), up.1.recipe.clone()], rows);
    let def = WeightDef { dtype: gate.1.dtype, shape: vec![e, 2 * rows, h], recipe };
    let gate_up = (name.clone(), Type::new(def.dtype, def.shape.iter().copied()));
    Ok(Fused {
        patch: Patch {
            at: m.root,
            takes: ["x", "experts", "weights", "down"].iter().map(|name| m.value(name)).collect::<Result<_, _>>()?,
            gives: vec![m.result()],
            build: Box::new(move |g, args| {
                let [x, experts, weights, down] = args[..] else { return vec![] };
                // softmax(ln w) = w / sum(w), so that the experts with the largest are the chosen ones, and their weights are theirs but
                // for the sum.
                let weight = g.binary(Binary::Max, shares(g, experts, weights, &e.into()), g.literal(Literal::scalar(DType::F32, LEAST)));
                let [y] = g.apply(op.clone(), &[x, g.unary(Unary::Log, weight), g.weight_value(&gate_up.0, gate_up.1.clone()), down]);
                vec![y * g.unsqueeze(g.reduce(Reduce::Sum, weights, &[1]), 1)]
            }),
        },
        weights: vec![(name, def)],
    })
}
