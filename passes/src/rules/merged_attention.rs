//! Attention whose heads are split before and merged after it, as one op over heads that lie side by side, which runtimes split
//! as they like: `merge_heads(attention(split_heads(q), ...))`, with a cache or without.

use super::{Fused, Match, Pattern, Rule};
use crate::{Contract, Pass};
use vlmc_ir::{
    DType, Def, Op, Patch, ValueId,
    ops::{Attention, GroupQueryAttention, Mask, MultiHeadAttention},
};

pub(crate) const MULTI_HEAD: Pass = Pass::rule(
    "fuse-multi-head",
    "attention with the splitting and merging of its heads",
    Contract::Exact,
    Rule { pattern: || merged(split("q"), split("k"), split("v")), replace: multi_head },
);

pub(crate) const GROUP_QUERY: Pass = Pass::rule(
    "fuse-group-query",
    "attention over a cache, with the splitting and merging of its heads",
    Contract::Exact,
    Rule {
        pattern: || {
            let append = |past, new| Pattern::op("append", |op| matches!(op, Op::Append(_)), [Pattern::value(past), new]);
            merged(split("q"), append("past k", split("k")).named("keys"), append("past v", split("v")).named("values"))
        },
        replace: group_query,
    },
);

fn split(name: &'static str) -> Pattern {
    Pattern::op("split_heads", |op| matches!(op, Op::SplitHeads(_)), [Pattern::value(name)]).named(split_name(name)).or_say_why()
}

fn split_name(name: &'static str) -> &'static str {
    match name {
        "q" => "split q",
        "k" => "split k",
        _ => "split v",
    }
}

fn merged(q: Pattern, k: Pattern, v: Pattern) -> Pattern {
    let attention = Pattern::op("attention", |op| matches!(op, Op::Attention(_)), [q, k, v]).named("attention").alone();
    Pattern::op("merge_heads", |op| matches!(op, Op::MergeHeads(_)), [attention])
}

/// Heads of queries, and of keys and values.
fn heads(m: &Match<'_>) -> Result<[usize; 2], String> {
    let heads = |name| match &m.node(name)?.1.op {
        Op::SplitHeads(o) => Ok(o.heads),
        other => Err(format!("{} splits no heads", other.name())),
    };
    Ok([heads("split q")?, heads("split k")?])
}

/// The attention, and its mask.
fn attention<'m>(m: &'m Match<'_>) -> Result<(&'m Attention, &'m [ValueId]), String> {
    let node = m.node("attention")?.1;
    match &node.op {
        Op::Attention(op) => Ok((op, &node.args[3..])),
        other => Err(format!("{} is no attention", other.name())),
    }
}

fn multi_head(m: &Match<'_>) -> Result<Fused, String> {
    let ([heads, kv_heads], (op, mask)) = (heads(m)?, attention(m)?);
    let op = MultiHeadAttention { heads, kv_heads, scale: op.scale, mask: op.mask };
    Ok(Patch {
        at: m.root,
        takes: [&[m.value("q")?, m.value("k")?, m.value("v")?], mask].concat(),
        gives: vec![m.result()],
        build: Box::new(move |g, args| g.apply_op(op.clone().into(), args)),
    }
    .into())
}

fn group_query(m: &Match<'_>) -> Result<Fused, String> {
    let ([heads, kv_heads], (op, mask)) = (heads(m)?, attention(m)?);
    if op.mask != Mask::Causal {
        return Err("it sees more than what came before".into());
    }
    let (keys, values) = (m.value("keys")?, m.value("values")?);
    for (past, all) in [("past k", keys), ("past v", values)] {
        if !matches!(m.graph.def(m.value(past)?), Def::State(_)) {
            return Err(format!("{past} is not a state"));
        }
        // One use is attention, the other that of the state.
        if m.users[all.index()] != 2 {
            return Err(format!("what is appended to {past} is used elsewhere"));
        }
    }
    for name in ["keys", "values"] {
        match &m.node(name)?.1.op {
            Op::Append(append) if append.keep != DType::F32 => return Err(format!("{name} are kept in {}", append.keep)),
            Op::Append(append) if append.axis != 2 => return Err(format!("{name} grow along axis {}", append.axis)),
            _ => {}
        }
    }
    let op = GroupQueryAttention { heads, kv_heads, scale: op.scale, mask: op.mask };
    let operands = ["q", "k", "v", "past k", "past v"].iter().map(|name| m.value(name)).collect::<Result<Vec<_>, _>>()?;
    Ok(Patch {
        // The attention itself goes with the next clean-up; until then it reads what is appended.
        at: m.node("attention")?.0,
        takes: [&operands[..], mask].concat(),
        gives: vec![m.result(), keys, values],
        build: Box::new(move |g, args| g.apply_op(op.clone().into(), args)),
    }
    .into())
}
