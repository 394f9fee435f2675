//! Attention, its heads, and its cache.

use super::{OpDef, expect, expect_dtype, expect_number, expect_rank, expect_shape, operands};
use crate::{Bindings, Builder, DType, Dim, Literal, Type, Val, interp::Array};
use half::bf16;
use ndarray::Axis;
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use vlmc_artifact::program::{Binary, Reduce, Unary};

/// `[..., s, heads * d]` to `[..., heads, s, d]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SplitHeads {
    /// Number of heads.
    pub heads: usize,
}

fn swapped(rank: usize, a: usize, b: usize) -> Vec<usize> {
    let mut perm: Vec<usize> = (0..rank).collect();
    perm.swap(a, b);
    perm
}

impl OpDef for SplitHeads {
    const NAME: &'static str = "split_heads";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        expect_rank(x, 2, "x")?;
        let width = x.last()?;
        let heads = Dim::from(self.heads);
        let d = if self.heads == 0 { None } else { width.exact_div(&heads) };
        let d = d.ok_or_else(|| format!("{width} is not a multiple of {} heads", self.heads))?;
        let mut shape = x.shape[..x.rank() - 2].to_vec();
        shape.extend([heads, x.shape[x.rank() - 2].clone(), d]);
        Ok(vec![Type { dtype: x.dtype, shape }])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let t = args[0].ty();
        let rank = t.rank();
        let d = t.shape[rank - 1].exact_div(&self.heads.into())?;
        let mut shape = t.shape[..rank - 1].to_vec();
        shape.extend([self.heads.into(), d]);
        Some(vec![g.transpose(g.reshape(args[0], shape), &swapped(rank + 1, rank - 2, rank - 1))])
    }
}

/// `[..., heads, s, d]` to `[..., s, heads * d]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeHeads {}

impl OpDef for MergeHeads {
    const NAME: &'static str = "merge_heads";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        expect_rank(x, 3, "x")?;
        let (lead, [heads, s, d]) = split3(&x.shape);
        let mut shape = lead.to_vec();
        shape.extend([s.clone(), heads * d]);
        Ok(vec![Type { dtype: x.dtype, shape }])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let out = self.infer(&[args[0].ty()]).ok()?.remove(0);
        let rank = args[0].ty().rank();
        Some(vec![g.reshape(g.transpose(args[0], &swapped(rank, rank - 3, rank - 2)), out.shape)])
    }
}

fn split3(shape: &[Dim]) -> (&[Dim], [&Dim; 3]) {
    let (lead, last) = shape.split_at(shape.len() - 3);
    (lead, [&last[0], &last[1], &last[2]])
}

/// Rotary position embedding (Su et al., 2021) of the pairs `(i, i + d/2)`, as Llama's `rotate_half`:
/// `x f32[..., heads, s, d]`, `cos` and `sin f32[..., s, d/2]` to
/// `[x1 cos - x2 sin, x2 cos + x1 sin]` for the halves `x1`, `x2` of the last axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rotary {}

impl OpDef for Rotary {
    const NAME: &'static str = "rotary";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x, cos, sin] = operands(args)?;
        expect_number(x, "x")?;
        expect_rank(x, 3, "x")?;
        let (lead, [_, s, d]) = split3(&x.shape);
        let half = d.exact_div(&2.into()).ok_or_else(|| format!("head dim {d} is odd"))?;
        let shape = [lead, &[s.clone(), half]].concat();
        for (t, what) in [(cos, "cos"), (sin, "sin")] {
            expect_dtype(t, x.dtype, what)?;
            expect_shape(t, &shape, what)?;
        }
        Ok(vec![x.clone()])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let x = args[0];
        let rank = x.ty().rank();
        let half = args[1].dim(rank - 2);
        let (cos, sin) = (g.unsqueeze(args[1], rank - 3), g.unsqueeze(args[2], rank - 3));
        let (x1, x2) = (g.slice(x, rank - 1, 0, half.clone()), g.slice(x, rank - 1, half.clone(), half));
        Some(vec![g.concat(&[x1 * cos - x2 * sin, x2 * cos + x1 * sin], rank - 1)])
    }
}

/// Which keys a query of [`Attention`] sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    /// All keys; no mask operand.
    Full,
    /// Query `i` of `s` sees the keys `j <= t - s + i` whose `attention_mask i64[batch, t]` (the mask operand) is not 0.
    Causal,
    /// Query `i` sees the keys of its own segment: the mask operand is `i64[t]` with `t = s`, a segment id per row.
    Segments,
    /// Query `i` sees key `j` where the mask operand `bool[..., s, t]`, broadcast to the scores, says so; or the operand is
    /// `f32[..., s, t]` and is added to the scores.
    Given,
}

/// Scaled dot-product attention with grouped heads (Ainslie et al., 2023): `q f32[..., heads, s, d]`,
/// `k f32[..., kv_heads, t, d]`, `v f32[..., kv_heads, t, dv]` and the mask operand that [`Mask`] asks for, to
/// `f32[..., heads, s, dv]`. Query head `h` reads key head `h / (heads / kv_heads)`. The result for a query that sees no key (padding) is finite, and nothing else can be
/// said of it: zeros here, averages in ONNX Runtime.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attention {
    /// Multiplies the scores.
    pub scale: f64,
    /// Which keys a query sees.
    pub mask: Mask,
    /// Operands of both products (weights before they are divided by their sum) may be rounded to bf16, or unless the mask is causal
    /// to 8 bits: queries and keys with a scale for each row, values for each column, weights to parts of the largest one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bf16: bool,
}

impl OpDef for Attention {
    const NAME: &'static str = "attention";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let (q, k, v, mask) = match (args, self.mask) {
            ([q, k, v], Mask::Full) => (q, k, v, None),
            ([q, k, v, mask], _) if self.mask != Mask::Full => (q, k, v, Some(mask)),
            _ => return Err(format!("takes {} operands with this mask, got {}", if self.mask == Mask::Full { 3 } else { 4 }, args.len())),
        };
        expect_number(q, "q")?;
        for (t, what) in [(q, "q"), (k, "k"), (v, "v")] {
            expect_dtype(t, q.dtype, what)?;
            expect_rank(t, 3, what)?;
        }
        let ((lead, [heads, s, d]), (lead_k, [kv_heads, t, _])) = (split3(&q.shape), split3(&k.shape));
        expect_shape(k, &[lead, &[kv_heads.clone(), t.clone(), d.clone()]].concat(), "k")?;
        expect(lead == lead_k, || format!("leading dims of {q} and {k} differ"))?;
        let dv = v.last()?.clone();
        expect_shape(v, &[lead, &[kv_heads.clone(), t.clone(), dv.clone()]].concat(), "v")?;
        expect(heads.exact_div(kv_heads).is_some(), || format!("{heads} heads are not a multiple of {kv_heads} kv heads"))?;
        match (self.mask, mask) {
            (Mask::Causal, Some(mask)) => {
                expect_dtype(mask, DType::I64, "mask")?;
                expect(lead.len() == 1, || format!("q must be [batch, heads, s, d] with this mask, is {q}"))?;
                expect_shape(mask, &[lead[0].clone(), t.clone()], "mask")?;
            }
            (Mask::Given, Some(mask)) => {
                expect(mask.dtype == DType::Bool || mask.dtype == q.dtype, || {
                    format!("mask must be bool or {}, is {}", q.dtype, mask.dtype)
                })?;
                let scores = [lead, &[heads.clone(), s.clone(), t.clone()]].concat();
                let fits = super::broadcast_shapes(&mask.shape, &scores)? == scores;
                expect(fits, || format!("mask {mask} does not broadcast to the scores"))?;
            }
            (_, Some(mask)) => {
                expect_dtype(mask, DType::I64, "mask")?;
                expect(s == t, || format!("segments need as many queries as keys, got {s} and {t}"))?;
                expect_shape(mask, std::slice::from_ref(t), "mask")?;
            }
            _ => {}
        }
        Ok(vec![Type { dtype: q.dtype, shape: [lead, &[heads.clone(), s.clone(), dv]].concat() }])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let (q, k, v) = (args[0], args[1], args[2]);
        let (tq, tk) = (q.ty(), k.ty());
        let ((lead, [heads, s, d]), (_, [kv_heads, t, _])) = (split3(&tq.shape), split3(&tk.shape));
        let groups = heads.exact_div(kv_heads)?;
        // All query heads of a key head together: [..., kv_heads, groups, s, d] against [..., kv_heads, 1, t, d].
        let grouped = |n: &Dim, len: &Dim, d: &Dim| [lead, &[kv_heads.clone(), n.clone(), len.clone(), d.clone()]].concat();
        let (one, dv) = (Dim::from(1), v.ty().last().ok()?.clone());
        let q5 = g.reshape(q, grouped(&groups, s, d));
        let (k5, v5) = (g.reshape(k, grouped(&one, t, d)), g.reshape(v, grouped(&one, t, &dv)));
        let rank = tq.rank() + 1;
        let scores = g.matmul(q5 * self.scale, g.transpose(k5, &swapped(rank, rank - 2, rank - 1)));
        let seen = match self.mask {
            Mask::Full => None,
            Mask::Causal => Some(g.unsqueeze(causal_mask(g, args[3], s), 1)),
            Mask::Segments => Some(segment_mask(g, args[3])),
            Mask::Given => {
                // [..., heads, s, t] to [..., kv_heads, groups, s, t]; one mask for all heads keeps its axis of 1.
                let m = args[3].ty();
                Some(match m.shape.len().checked_sub(3).map(|axis| (axis, m.shape[axis] == one)) {
                    None => args[3],
                    Some((axis, true)) => g.unsqueeze(args[3], axis),
                    Some((axis, false)) => {
                        let mut shape = m.shape.clone();
                        shape.splice(axis..=axis, [kv_heads.clone(), groups.clone()]);
                        g.reshape(args[3], shape)
                    }
                })
            }
        };
        let lowest = g.literal(Literal::scalar(DType::F32, f64::from(f32::MIN)));
        let (bias, seen) = if seen.is_some_and(|m| m.ty().dtype == DType::F32) { (seen, None) } else { (None, seen) };
        let scores = bias.map_or(scores, |b| scores + b);
        let scores = seen.map_or(scores, |m| g.select(m, scores, lowest));
        let largest = g.unsqueeze(g.reduce(Reduce::Max, scores, &[rank - 1]), rank - 1);
        let weights = g.unary(Unary::Exp, scores - largest);
        let weights = seen.map_or(weights, |m| weights * g.cast(m, DType::F32));
        let sum = g.unsqueeze(g.reduce(Reduce::Sum, weights, &[rank - 1]), rank - 1);
        let sum = g.binary(Binary::Max, sum, g.literal(Literal::scalar(DType::F32, f64::from(f32::MIN_POSITIVE))));
        let shape = [lead, &[heads.clone(), s.clone(), dv]].concat();
        Some(vec![g.reshape(g.matmul(weights / sum, v5), shape)])
    }
}

/// A decoder's attention in one op: `q f32[..., heads, s, d]` and `k f32[..., kv_heads, s, d]` are rotated by `cos` and `sin`
/// ([`Rotary`]), `k` and `v f32[..., kv_heads, s, dv]` are appended to `past_k` and `past_v f32[..., kv_heads, past, d or dv]`
/// ([`Append`]), and `q` attends to both ([`Attention`]). The operands are in this order, a mask last; the results are those of
/// the attention and the two appends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RotaryAttention {
    /// Multiplies the scores.
    pub scale: f64,
    /// Which keys a query sees.
    pub mask: Mask,
    /// Operands of both products (weights before they are divided by their sum) may be rounded to bf16, or unless the mask is causal
    /// to 8 bits: queries and keys with a scale for each row, values for each column, weights to parts of the largest one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bf16: bool,
}

impl RotaryAttention {
    /// Rotated queries and keys, keys and values appended, attention: `rotate`, `append` and `attend` over types or values.
    fn parts<T: Clone, E>(
        args: &[T],
        rotate: impl Fn(&[T]) -> Result<T, E>,
        append: impl Fn(&[T]) -> Result<T, E>,
        attend: impl Fn(&[T]) -> Result<T, E>,
    ) -> Result<Option<Vec<T>>, E> {
        let [q, k, v, cos, sin, past_k, past_v, mask @ ..] = args else { return Ok(None) };
        let rotated = |x: &T| rotate(&[x.clone(), cos.clone(), sin.clone()]);
        let (q, k) = (rotated(q)?, append(&[past_k.clone(), rotated(k)?])?);
        let v = append(&[past_v.clone(), v.clone()])?;
        let out = attend(&[&[q, k.clone(), v.clone()], mask].concat())?;
        Ok(Some(vec![out, k, v]))
    }

    fn attention(&self) -> Attention {
        Attention { scale: self.scale, mask: self.mask, bf16: self.bf16 }
    }
}

impl OpDef for RotaryAttention {
    const NAME: &'static str = "rotary_attention";
    const APPENDS: &'static [(usize, usize)] = &[(5, 1), (6, 2)];

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let one = |outs: Vec<Type>| outs.into_iter().next().ok_or_else(|| "no result".to_string());
        let append = |args: &[Type]| one(Append { axis: args[0].rank().saturating_sub(2), keep: DType::F32 }.infer(args)?);
        let rotate = |args: &[Type]| one(Rotary {}.infer(args)?);
        let outs = Self::parts(args, rotate, append, |args| one(self.attention().infer(args)?))?;
        outs.ok_or_else(|| format!("takes 7 or 8 operands, got {}", args.len()))
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let rotate = |args: &[Val<'g>]| Ok::<_, Infallible>(g.rotary(args[0], (args[1], args[2])));
        let append = |args: &[Val<'g>]| Ok(g.append(args[0], args[1], args[0].ty().rank().saturating_sub(2)));
        Self::parts(args, rotate, append, |args| Ok(g.apply::<1>(self.attention(), args)[0])).ok()?
    }
}

/// [`Attention`] over queries, keys and values that lie side by side: `qkv f32[..., s, (heads + 2 kv_heads) * d]`, `cos` and `sin
/// f32[..., s, d/2]` by which queries and keys are rotated ([`Rotary`]) or neither of them, and a mask operand to
/// `f32[..., s, heads * d]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PackedAttention {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Multiplies the scores.
    pub scale: f64,
    /// Which keys a query sees.
    pub mask: Mask,
    /// Operands of both products (weights before they are divided by their sum) may be rounded to bf16, or unless the mask is causal
    /// to 8 bits: queries and keys with a scale for each row, values for each column, weights to parts of the largest one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bf16: bool,
}

impl PackedAttention {
    /// Angles, then a mask.
    fn rest<'a, T>(&self, args: &'a [T]) -> Option<(&'a [T], &'a [T])> {
        let rest = args.get(1..)?;
        let (angles, mask) = rest.split_at_checked(rest.len().checked_sub(usize::from(self.mask != Mask::Full))?)?;
        matches!(angles.len(), 0 | 2).then_some((angles, mask))
    }

    fn attention(&self) -> Attention {
        Attention { scale: self.scale, mask: self.mask, bf16: self.bf16 }
    }
}

impl OpDef for PackedAttention {
    const NAME: &'static str = "packed_attention";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let (angles, mask) =
            self.rest(args).ok_or_else(|| format!("takes qkv, two angles or none and a mask, got {} operands", args.len()))?;
        let qkv = &args[0];
        let parts = self.kv_heads.checked_mul(2).and_then(|n| n.checked_add(self.heads));
        let split = SplitHeads { heads: parts.ok_or("there are too many heads")? }.infer(std::slice::from_ref(qkv))?.remove(0);
        let of = |heads: usize| {
            let mut shape = split.shape.clone();
            let axis = shape.len() - 3;
            shape[axis] = heads.into();
            Type { dtype: qkv.dtype, shape }
        };
        let (q, k) = (of(self.heads), of(self.kv_heads));
        if let [cos, sin] = angles {
            Rotary {}.infer(&[q.clone(), cos.clone(), sin.clone()])?;
        }
        MergeHeads {}.infer(&self.attention().infer(&[&[q, k.clone(), k], mask].concat())?)
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let (angles, mask) = self.rest(args)?;
        let axis = args[0].ty().rank() - 1;
        let d = args[0].dim(axis).exact_div(&(self.heads + 2 * self.kv_heads).into())?;
        let part = |first: usize, heads: usize| g.split_heads(g.slice(args[0], axis, &d * first, &d * heads), heads);
        let rotated = |x| if let [cos, sin] = *angles { g.rotary(x, (cos, sin)) } else { x };
        let q = rotated(part(0, self.heads));
        let k = rotated(part(self.heads, self.kv_heads));
        let v = part(self.heads + self.kv_heads, self.kv_heads);
        Some(vec![g.merge_heads(g.apply::<1>(self.attention(), &[&[q, k, v], mask].concat())[0])])
    }
}

/// [`Rotary`] of heads that lie side by side: `x f32[..., s, heads * d]`, `cos` and `sin f32[..., s, d/2]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergedRotary {
    /// Number of heads.
    pub heads: usize,
}

impl OpDef for MergedRotary {
    const NAME: &'static str = "merged_rotary";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x, cos, sin] = operands(args)?;
        let split = SplitHeads { heads: self.heads }.infer(std::slice::from_ref(x))?.remove(0);
        Rotary {}.infer(&[split, cos.clone(), sin.clone()])?;
        Ok(vec![x.clone()])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        Some(vec![g.merge_heads(g.rotary(g.split_heads(args[0], self.heads), (args[1], args[2])))])
    }
}

/// [`Attention`] over heads that lie side by side: `q f32[..., s, heads * d]`, `k f32[..., t, kv_heads * d]`,
/// `v f32[..., t, kv_heads * dv]` and a mask operand to `f32[..., s, heads * dv]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MultiHeadAttention {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Multiplies the scores.
    pub scale: f64,
    /// Which keys a query sees.
    pub mask: Mask,
}

/// Number of heads of each of q, k and v.
fn heads_of(heads: usize, kv_heads: usize) -> [SplitHeads; 3] {
    [heads, kv_heads, kv_heads].map(|heads| SplitHeads { heads })
}

impl OpDef for MultiHeadAttention {
    const NAME: &'static str = "multi_head_attention";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [q, k, v, mask @ ..] = args else { return Err(format!("takes 3 or 4 operands, got {}", args.len())) };
        let mut split = vec![];
        for (x, op) in [q, k, v].into_iter().zip(heads_of(self.heads, self.kv_heads)) {
            split.extend(op.infer(std::slice::from_ref(x))?);
        }
        split.extend_from_slice(mask);
        MergeHeads {}.infer(&Attention { scale: self.scale, mask: self.mask, bf16: false }.infer(&split)?)
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let [q, k, v, mask @ ..] = args else { return None };
        let [q, k, v] = [(q, self.heads), (k, self.kv_heads), (v, self.kv_heads)].map(|(x, heads)| g.split_heads(*x, heads));
        Some(vec![g.merge_heads(g.attention(q, k, v, self.scale, self.mask, mask.first().copied()))])
    }
}

/// A decoder's attention over its cache, of heads that lie side by side: `k f32[batch, s, kv_heads * d]` and
/// `v f32[batch, s, kv_heads * dv]` are appended to `past_k` and `past_v f32[batch, kv_heads, past, d or dv]` ([`Append`]), and
/// `q f32[batch, s, heads * d]` attends to both ([`MultiHeadAttention`]). The operands are in the order q, k, v, past_k, past_v,
/// mask; the results are `f32[batch, s, heads * dv]` and those of the two appends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupQueryAttention {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Multiplies the scores.
    pub scale: f64,
    /// Which keys a query sees.
    pub mask: Mask,
}

impl GroupQueryAttention {
    const APPEND: Append = Append { axis: 2, keep: DType::F32 };
}

impl OpDef for GroupQueryAttention {
    const NAME: &'static str = "group_query_attention";
    const APPENDS: &'static [(usize, usize)] = &[(3, 1), (4, 2)];

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [q, k, v, past_k, past_v, mask] = operands(args)?;
        let mut split = vec![];
        for (x, op) in [q, k, v].into_iter().zip(heads_of(self.heads, self.kv_heads)) {
            expect(x.rank() == 3, || format!("q, k and v must be [batch, s, heads * d], one is {x}"))?;
            split.extend(op.infer(std::slice::from_ref(x))?);
        }
        let keys = Self::APPEND.infer(&[past_k.clone(), split[1].clone()])?.remove(0);
        let values = Self::APPEND.infer(&[past_v.clone(), split[2].clone()])?.remove(0);
        let attention = Attention { scale: self.scale, mask: self.mask, bf16: false };
        let out = attention.infer(&[split[0].clone(), keys.clone(), values.clone(), mask.clone()])?;
        Ok([MergeHeads {}.infer(&out)?, vec![keys, values]].concat())
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let [q, k, v, past_k, past_v, mask] = args.try_into().ok()?;
        let [q, k, v] = [(q, self.heads), (k, self.kv_heads), (v, self.kv_heads)].map(|(x, heads)| g.split_heads(x, heads));
        let (keys, values) = (g.append(past_k, k, 2), g.append(past_v, v, 2));
        Some(vec![g.merge_heads(g.attention(q, keys, values, self.scale, self.mask, Some(mask))), keys, values])
    }
}

/// `attention_mask i64[batch, t]` and `s` queries to `bool[batch, 1, s, t]`: query `i` sees keys `j <= t - s + i` that the
/// mask lets through.
pub fn causal_mask<'g>(g: &'g Builder<'g>, attention_mask: Val<'g>, s: &Dim) -> Val<'g> {
    let (batch, t) = (attention_mask.dim(0), attention_mask.dim(1));
    let query = g.iota(s.clone()) + g.dim(&t - s);
    let past = g.binary(Binary::Le, g.unsqueeze(g.iota(t.clone()), 0), g.unsqueeze(query, 1));
    let live = g.reshape(g.cast(attention_mask, DType::Bool), [batch, 1.into(), 1.into(), t]);
    g.binary(Binary::And, live, past)
}

/// `segments i64[t]` to `bool[t, t]`: query `i` sees key `j` of its own segment.
pub fn segment_mask<'g>(g: &'g Builder<'g>, segments: Val<'g>) -> Val<'g> {
    g.binary(Binary::Eq, g.unsqueeze(segments, 1), g.unsqueeze(segments, 0))
}

/// `past`, `new` to both, one after the other along `axis`. What it reads from a state it gives back as the state's next value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Append {
    /// The axis that grows.
    pub axis: usize,
    /// How the state keeps what is appended, which is rounded to it: `f32`; `bf16`; or `i8`, rows of the last axis in steps of
    /// max|row| / 127.
    #[serde(default = "Append::exact", skip_serializing_if = "Append::is_exact")]
    pub keep: DType,
}

impl Append {
    fn exact() -> DType {
        DType::F32
    }

    fn is_exact(keep: &DType) -> bool {
        *keep == DType::F32
    }

    /// Types that states can be kept in.
    pub const KEPT: [DType; 3] = [DType::F32, DType::BF16, DType::I8];

    fn round(&self, row: &mut [f32]) {
        match self.keep {
            DType::BF16 => row.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
            DType::I8 => {
                let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
                let (inverse, scale) = (127.0 / largest.max(1e-30), largest / 127.0);
                row.iter_mut().for_each(|v| *v = (*v * inverse).round_ties_even() * scale);
            }
            _ => {}
        }
    }
}

impl OpDef for Append {
    const NAME: &'static str = "append";
    const APPENDS: &'static [(usize, usize)] = &[(0, 0)];

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [past, new] = operands(args)?;
        expect(Self::KEPT.contains(&self.keep), || format!("a state cannot be kept in {}", self.keep))?;
        super::Concat { axis: self.axis }.infer(&[past.clone(), new.clone()])
    }

    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        let (past, mut new) = (args[0].f32()?, args[1].f32()?.as_standard_layout().into_owned());
        let width = new.shape().last().copied().unwrap_or(1).max(1);
        new.as_slice_mut().ok_or("not contiguous")?.chunks_mut(width).for_each(|row| self.round(row));
        let both = ndarray::concatenate(Axis(self.axis), &[past.view(), new.view()]);
        Ok(vec![Array::F32(both.map_err(|e| e.to_string())?)])
    }
}
