//! Projections of one value to queries, keys and values: one matrix, read in one stream.

use super::{Fused, Match, Pattern, Rule, linear_activation::is_linear, packed::Packed};
use crate::{Contract, Pass};
use vlmc_ir::{Op, Patch};

pub(crate) const PACK_QKV: Pass = Pass::rule(
    "pack-qkv",
    "the projections to queries, keys and values, as one",
    Contract::Close,
    Rule {
        pattern: || {
            let projection = |name| Pattern::through(carried, Pattern::op("linear", is_linear, [Pattern::value("x")]).named(name));
            let [q, k, v] = ["q", "k", "v"].map(projection);
            Pattern::op("attention", |op| matches!(op, Op::Attention(_)), [q, k, v])
        },
        replace,
    },
);

/// The operand that goes through ops between a projection and attention: heads, positions, norms, scales, the cache.
fn carried(op: &Op) -> Option<usize> {
    match op {
        Op::Append(_) => Some(1),
        Op::SplitHeads(_) | Op::Rotary(_) | Op::RmsNorm(_) | Op::LayerNorm(_) | Op::Reshape(_) | Op::Transpose(_) | Op::Elementwise2(_) => {
            Some(0)
        }
        _ => None,
    }
}

fn replace(m: &Match<'_>) -> Result<Fused, String> {
    let linears = [m.node("q")?, m.node("k")?, m.node("v")?];
    let packed = Packed::new(m, &linears.map(|(_, n)| n))?;
    let weights = packed.defs.clone();
    let at = linears.iter().map(|(id, _)| *id).min().unwrap_or(m.root);
    let patch = Patch {
        at,
        takes: vec![m.value("x")?],
        gives: linears.iter().map(|(_, n)| n.outs[0]).collect(),
        build: Box::new(move |g, args| {
            let y = packed.apply(g, args[0]);
            let axis = y.ty().rank() - 1;
            let starts = packed.widths.iter().scan(0, |at, width| Some(std::mem::replace(at, *at + width)));
            starts.zip(&packed.widths).map(|(start, width)| g.slice(y, axis, start, *width)).collect()
        }),
    };
    Ok(Fused { patch, weights })
}
