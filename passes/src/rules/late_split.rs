//! What is done to each head of its own, done before the heads are split: `f(split_heads(x))` to `split_heads(f'(x))`. What then
//! stands beside attention is the split, for [`super::merged_attention`].

use super::{Fused, Match, Pattern, Rule};
use crate::{Contract, Pass};
use vlmc_artifact::program::Binary;
use vlmc_ir::{
    Dim, Op, Patch, Type,
    ops::{Elementwise2, MergedRotary},
};

pub(crate) const NORM: Pass = Pass::rule(
    "norm-before-split",
    "norms of heads, before the heads are split",
    Contract::Exact,
    Rule { pattern: || Pattern::op("norm", |op| matches!(op, Op::RmsNorm(_) | Op::LayerNorm(_)), [split()]), replace: norm },
);

pub(crate) const ROTARY: Pass = Pass::rule(
    "rotary-before-split",
    "rotation of heads, before the heads are split",
    Contract::Exact,
    Rule {
        pattern: || Pattern::op("rotary", |op| matches!(op, Op::Rotary(_)), [split(), Pattern::value("cos"), Pattern::value("sin")]),
        replace: rotary,
    },
);

pub(crate) const SCALE: Pass = Pass::rule(
    "scale-before-split",
    "a product with a number per row, before the heads are split",
    Contract::Exact,
    Rule { pattern: || split() * Pattern::value("by"), replace: scale },
);

fn split() -> Pattern {
    Pattern::op("split_heads", |op| matches!(op, Op::SplitHeads(_)), [Pattern::value("x")]).named("split").alone()
}

/// The number of heads.
fn heads(m: &Match<'_>) -> Result<usize, String> {
    match &m.node("split")?.1.op {
        Op::SplitHeads(o) => Ok(o.heads),
        other => Err(format!("{} splits no heads", other.name())),
    }
}

fn norm(m: &Match<'_>) -> Result<Fused, String> {
    let (node, heads) = (m.graph.node(m.root).clone(), heads(m)?);
    Ok(Patch {
        at: m.root,
        takes: [&[m.value("x")?], &node.args[1..]].concat(),
        gives: vec![m.result()],
        build: Box::new(move |g, args| {
            let Type { shape, .. } = args[0].ty();
            let (rows, width) = shape.split_at(shape.len() - 1);
            let d = node_width(&args[1].ty());
            let apart: Vec<Dim> = [rows, &[heads.into(), d]].concat();
            let x = g.reshape(args[0], apart);
            let y = g.apply_op(node.op.clone(), &[&[x], &args[1..]].concat());
            let y = y.first().map_or(x, |y| *y);
            vec![g.split_heads(g.reshape(y, [rows, width].concat()), heads)]
        }),
    }
    .into())
}

/// Width of what a norm's weight multiplies.
fn node_width(weight: &Type) -> Dim {
    weight.shape.last().cloned().unwrap_or_else(|| 1.into())
}

fn rotary(m: &Match<'_>) -> Result<Fused, String> {
    let heads = heads(m)?;
    Ok(Patch {
        at: m.root,
        takes: ["x", "cos", "sin"].iter().map(|name| m.value(name)).collect::<Result<_, _>>()?,
        gives: vec![m.result()],
        build: Box::new(move |g, args| {
            let [y] = g.apply(MergedRotary { heads }, args);
            vec![g.split_heads(y, heads)]
        }),
    }
    .into())
}

fn scale(m: &Match<'_>) -> Result<Fused, String> {
    let (x, by, heads) = (m.value("x")?, m.value("by")?, heads(m)?);
    let (mut rows, by_type) = (m.ty(x).shape.clone(), m.ty(by).clone());
    let (rank, one) = (rows.len(), Dim::from(1));
    rows[rank - 1] = one.clone();
    // [..., 1, s, 1] beside [..., heads, s, d].
    let mut per_row = rows.clone();
    per_row.insert(rank - 2, one);
    if by_type.shape != per_row {
        return Err(format!("{by_type} is not a number per row"));
    }
    Ok(Patch {
        at: m.root,
        takes: vec![x, by],
        gives: vec![m.result()],
        build: Box::new(move |g, args| {
            let [y] = g.apply(Elementwise2 { f: Binary::Mul }, &[args[0], g.reshape(args[1], rows.clone())]);
            vec![g.split_heads(y, heads)]
        }),
    }
    .into())
}
