//! Rotation of queries and keys, the cache and attention as one op: keys are rotated where the cache keeps them, queries where
//! attention reads them.

use super::{Fused, Match, Pattern, Rule};
use crate::{Contract, Pass};
use vlmc_ir::{DType, Def, Op, Patch, ops::RotaryAttention};

pub(crate) const ROTARY_ATTENTION: Pass = Pass::rule(
    "fuse-rotary-attention",
    "rotation, cache and attention, at once",
    Contract::Exact,
    Rule {
        pattern: || {
            let rotary = |x| Pattern::op("rotary", |op| matches!(op, Op::Rotary(_)), [x, "cos", "sin"].map(Pattern::value));
            let append = |past, new: Pattern| Pattern::op("append", |op| matches!(op, Op::Append(_)), [Pattern::value(past), new]);
            let q = rotary("q").named("rotated q").alone().or_say_why();
            let k = append("past k", rotary("k").named("rotated k").alone().or_say_why()).named("keys");
            let v = append("past v", Pattern::value("v")).named("values");
            Pattern::op("attention", |op| matches!(op, Op::Attention(_)), [q, k, v])
        },
        replace,
    },
);

fn replace(m: &Match<'_>) -> Result<Fused, String> {
    let attention = m.graph.node(m.root);
    let Op::Attention(op) = &attention.op else { return Err("there is no attention".into()) };
    for (past, both) in [("past k", "keys"), ("past v", "values")] {
        if !matches!(m.graph.def(m.value(past)?), Def::State(_)) {
            return Err(format!("{past} is not a state"));
        }
        let all = m.value(both)?;
        // One use is attention, the other that of the state.
        if m.users[all.index()] != 2 {
            return Err(format!("{both} are used elsewhere"));
        }
        let Op::Append(append) = &m.node(both)?.1.op else { return Err(format!("{both} are not appended")) };
        if append.keep != DType::F32 {
            return Err(format!("{both} are kept in {}, rounded as they are appended", append.keep));
        }
        if append.axis + 2 != m.ty(all).rank() {
            return Err(format!("{both} grow along axis {}", append.axis));
        }
    }
    let operands = ["q", "k", "v", "cos", "sin", "past k", "past v"].map(|name| m.value(name));
    let mut takes = operands.into_iter().collect::<Result<Vec<_>, _>>()?;
    takes.extend(&attention.args[3..]);
    let op: Op = RotaryAttention { scale: op.scale, mask: op.mask, bf16: op.bf16 }.into();
    let gives = vec![m.result(), m.value("keys")?, m.value("values")?];
    Ok(Patch { at: m.root, takes, gives, build: Box::new(move |g, args| g.apply_op(op.clone(), args)) }.into())
}
