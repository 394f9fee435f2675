//! Attention over queries, keys and values that one projection makes, where they lie: nothing is sliced, split or moved for it.

use super::{Fused, Match, Pattern, Rule};
use crate::{Contract, Pass};
use vlmc_ir::{Dim, Op, Patch, ops::PackedAttention};

pub(crate) const PACKED_ATTENTION: Pass = Pass::rule(
    "fuse-packed-attention",
    "attention over queries, keys and values side by side, with their rotation",
    Contract::Exact,
    Rule {
        pattern: || {
            let split = |name, slice| {
                let sliced = Pattern::op("slice", |op| matches!(op, Op::Slice(_)), [Pattern::value("qkv")]).named(slice);
                Pattern::op("split_heads", |op| matches!(op, Op::SplitHeads(_)), [sliced]).named(name)
            };
            let rotated = |name, split| {
                let rotary = |op: &Op| matches!(op, Op::Rotary(_)).then_some(0);
                Pattern::through(rotary, split).named(name).alone()
            };
            let (q, k) = (rotated("q", split("split q", "slice q")), rotated("k", split("split k", "slice k")));
            let attention = Pattern::op("attention", |op| matches!(op, Op::Attention(_)), [q, k, split("split v", "slice v").alone()]);
            Pattern::op("merge_heads", |op| matches!(op, Op::MergeHeads(_)), [attention.named("attention").alone()])
        },
        replace,
    },
);

fn replace(m: &Match<'_>) -> Result<Fused, String> {
    let attention = m.node("attention")?.1;
    let Op::Attention(op) = &attention.op else { return Err("there is no attention".into()) };
    let heads = |name| match &m.node(name)?.1.op {
        Op::SplitHeads(o) => Ok::<_, String>(o.heads),
        other => Err(format!("{} splits no heads", other.name())),
    };
    let [heads, kv_heads, v_heads] = [heads("split q")?, heads("split k")?, heads("split v")?];
    if kv_heads != v_heads {
        return Err(format!("there are {kv_heads} heads of keys, {v_heads} of values"));
    }
    let width = |v| m.ty(v).shape.last().ok_or("an operand has no axes");
    let (qkv, d) = (m.value("qkv")?, width(m.value("split q")?)?);
    let mut end = Dim::from(0);
    for (name, heads) in [("slice q", heads), ("slice k", kv_heads), ("slice v", kv_heads)] {
        let Op::Slice(slice) = &m.node(name)?.1.op else { return Err(format!("{name} is no slice")) };
        let len = d * heads;
        if slice.axis + 1 != m.ty(qkv).rank() || slice.start != end || slice.len != len {
            return Err(format!("{name} is not the next {len} columns"));
        }
        end = &end + len;
    }
    if width(qkv)? != &end {
        return Err("there is more than queries, keys and values".into());
    }
    // The angles of both, or of neither.
    let angles = |rotated, split| {
        let (rotated, split) = (m.value(rotated)?, m.value(split)?);
        let args = m.graph.producer(rotated).map(|n| &m.graph.node(n).args[..]).unwrap_or_default();
        match args {
            _ if rotated == split => Ok(&[][..]),
            [x, angles @ ..] if *x == split => Ok(angles),
            _ => Err("something is rotated twice".to_string()),
        }
    };
    let (of_q, of_k) = (angles("q", "split q")?, angles("k", "split k")?);
    if of_q != of_k {
        return Err("queries and keys are rotated differently".into());
    }
    let op: Op = PackedAttention { heads, kv_heads, scale: op.scale, mask: op.mask, bf16: op.bf16 }.into();
    let takes = [&[qkv], of_q, &attention.args[3..]].concat();
    Ok(Patch { at: m.root, takes, gives: vec![m.result()], build: Box::new(move |g, args| g.apply_op(op.clone(), args)) }.into())
}
