//! `act(linear(x))`: the activation is applied while the product is at hand.

use super::{Fused, Match, Pattern, Rule};
use crate::{Contract, Pass};
use vlmc_artifact::program::Unary;
use vlmc_ir::{Op, Patch, ops::Linear};

pub(crate) const LINEAR_ACTIVATION: Pass = Pass::rule(
    "fuse-activation",
    "activations applied by the linear before them",
    Contract::Exact,
    Rule {
        pattern: || Pattern::op("activation", is_activation, [Pattern::op("linear", is_linear, vec![]).named("linear").alone()]),
        replace,
    },
);

pub(super) fn is_activation(op: &Op) -> bool {
    matches!(op, Op::Elementwise1(o) if matches!(o.f, Unary::Silu | Unary::QuickGelu | Unary::Gelu | Unary::GeluTanh | Unary::Sigmoid | Unary::Tanh))
}

pub(super) fn is_linear(op: &Op) -> bool {
    matches!(op, Op::Linear(_))
}

fn replace(m: &Match<'_>) -> Result<Fused, String> {
    let (_, linear) = m.node("linear")?;
    let (Op::Linear(op), Op::Elementwise1(act)) = (&linear.op, &m.graph.node(m.root).op) else {
        return Err("not an activation of a linear".into());
    };
    if let Some(act) = op.act {
        return Err(format!("the linear applies {act:?} already"));
    }
    let op = Linear { act: Some(act.f), ..op.clone() };
    Ok(Patch {
        at: m.root,
        takes: linear.args.clone(),
        gives: vec![m.result()],
        build: Box::new(move |g, args| g.apply_op(op.clone().into(), args)),
    }
    .into())
}
