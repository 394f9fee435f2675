//! `act(gate(x)) * up(x)`: one matrix for both projections, and one op for what comes of them.

use super::{
    Fused, Match, Pattern, Rule,
    linear_activation::{is_activation, is_linear},
    packed::Packed,
};
use crate::{Contract, Pass};
use vlmc_ir::{Op, Patch, ops::Gated};

pub(crate) const PACK_GATE_UP: Pass = Pass::rule(
    "pack-gate-up",
    "the projections to gates and values of an MLP, as one",
    Contract::Close,
    Rule {
        pattern: || {
            let linear = |name| Pattern::op("linear", is_linear, [Pattern::value("x")]).named(name).alone();
            let act = Pattern::op("activation", is_activation, [linear("gate")]).named("act").alone();
            act * linear("up")
        },
        replace,
    },
);

fn replace(m: &Match<'_>) -> Result<Fused, String> {
    let (gate, up) = (m.node("gate")?.1, m.node("up")?.1);
    let Op::Elementwise1(act) = m.node("act")?.1.op else { return Err("the gate has no activation".into()) };
    let packed = Packed::new(m, &[gate, up])?;
    if packed.widths[0] != packed.widths[1] {
        return Err(format!("gate has {} columns, up {}", packed.widths[0], packed.widths[1]));
    }
    let weights = packed.defs.clone();
    let patch = Patch {
        at: m.root,
        takes: vec![m.value("x")?],
        gives: vec![m.result()],
        build: Box::new(move |g, args| g.apply_op(Gated { act: act.f }.into(), &[packed.apply(g, args[0])])),
    };
    Ok(Fused { patch, weights })
}
