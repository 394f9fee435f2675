//! `norm(x + y)`: one op that gives the sum as well, since the next block adds to it.

use super::{Fused, Match, Pattern, Rule};
use crate::{Contract, Pass};
use vlmc_ir::{
    Def, Op, Patch,
    ops::{AddLayerNorm, AddRmsNorm},
};

pub(crate) const RESIDUAL_NORM: Pass = Pass::rule(
    "fuse-residual-norm",
    "a sum and its norm, at once",
    Contract::Exact,
    Rule {
        pattern: || {
            let sum = (Pattern::value("x") + Pattern::value("y")).named("sum");
            Pattern::op("norm", |op| matches!(op, Op::LayerNorm(_) | Op::RmsNorm(_)), [sum])
        },
        replace,
    },
);

fn replace(m: &Match<'_>) -> Result<Fused, String> {
    let (x, y, sum) = (m.value("x")?, m.value("y")?, m.value("sum")?);
    let norm = m.graph.node(m.root);
    let op: Op = match &norm.op {
        Op::LayerNorm(o) => AddLayerNorm { eps: o.eps }.into(),
        Op::RmsNorm(o) => AddRmsNorm { eps: o.eps }.into(),
        other => return Err(format!("{} is no norm", other.name())),
    };
    for (v, what) in [(x, "x"), (y, "y")] {
        if m.ty(v) != m.ty(sum) {
            return Err(format!("{what} is broadcast to the sum"));
        }
    }
    let vectors = &norm.args[1..];
    if vectors.iter().any(|v| matches!(m.graph.def(*v), Def::Node(..))) {
        return Err("the norm's weight is computed, perhaps after the sum".into());
    }
    Ok(Patch {
        at: m.node("sum")?.0,
        takes: [&[x, y], vectors].concat(),
        gives: vec![sum, m.result()],
        build: Box::new(move |g, args| g.apply_op(op.clone(), args)),
    }
    .into())
}
