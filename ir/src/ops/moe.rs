//! Mixtures of experts.

use super::{OpDef, expect, expect_dtype, expect_float, expect_number, expect_shape, matrix::round_to_8_bits, operands};
use crate::{Bindings, Builder, DType, Dim, Literal, Type, Val, interp::Array};
use ndarray::{ArrayD, IxDyn};
use serde::{Deserialize, Serialize};
use vlmc_artifact::program::{Binary, Reduce, Unary};

/// Indices of the `k` largest elements of the last axis, largest first and of equals the first first: `x f32[..., n]` to
/// `i64[..., k]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopK {
    /// How many.
    pub k: usize,
}

impl OpDef for TopK {
    const NAME: &'static str = "top_k";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        expect_dtype(x, DType::F32, "x")?;
        let n = x.last()?.as_const();
        expect(n.is_some_and(|n| self.k as i64 <= n), || format!("{} of the elements of {x}", self.k))?;
        let mut shape = x.shape.clone();
        shape[x.rank() - 1] = self.k.into();
        Ok(vec![Type { dtype: DType::I64, shape }])
    }

    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        let x = args[0].f32()?;
        let n = x.shape().last().copied().unwrap_or(1);
        let mut shape = x.shape().to_vec();
        shape.pop();
        shape.push(self.k);
        let mut indices = vec![];
        for row in x.as_standard_layout().as_slice().ok_or("not contiguous")?.chunks_exact(n.max(1)) {
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            indices.extend(order[..self.k].iter().map(|i| *i as i64));
        }
        Ok(vec![Array::I64(ArrayD::from_shape_vec(IxDyn(&shape), indices).map_err(|e| e.to_string())?)])
    }
}

/// Gated experts (DeepSeekMoE, Dai et al., 2024): `x f32[n, h]`, the chosen `experts i64[n, k]` and their `weights f32[n, k]`,
/// none of them negative, and of each of `e` experts `gate`, `up [e, m, h]` and `down [e, h, m]`, to `f32[n, h]`:
/// the sum over the chosen of `weight * down(act(gate x) * up x)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moe {
    /// Activation of the gate.
    pub act: Unary,
    /// What each of the stacks multiplies is first rounded to 8 bits, as [`super::Linear`] does; they must be quantized.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dynamic: bool,
}

impl OpDef for Moe {
    const NAME: &'static str = "moe";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x, experts, weights, gate, up, down] = operands(args)?;
        expect_dtype(x, DType::F32, "x")?;
        expect_dtype(experts, DType::I64, "experts")?;
        expect_dtype(weights, DType::F32, "weights")?;
        expect(x.rank() == 2 && experts.rank() == 2, || format!("x must be [n, h] and experts [n, k], are {x} and {experts}"))?;
        expect(experts.shape[0] == x.shape[0], || format!("{x} and {experts} are of different numbers of rows"))?;
        expect_shape(weights, &experts.shape, "weights")?;
        for (w, what) in [(gate, "gate"), (up, "up"), (down, "down")] {
            expect_float(w, what)?;
            expect(w.rank() == 3, || format!("{what} must have 3 axes, is {w}"))?;
            expect(!self.dynamic || w.dtype.scheme().is_some(), || format!("x is rounded for quantized weights only, not {what} {w}"))?;
        }
        let (e, m, h) = (gate.shape[0].clone(), gate.shape[1].clone(), x.shape[1].clone());
        expect_shape(gate, &[e.clone(), m.clone(), h.clone()], "gate")?;
        expect_shape(up, &gate.shape, "up")?;
        expect_shape(down, &[e, h, m], "down")?;
        Ok(vec![x.clone()])
    }

    /// All experts of all rows, of which those that are not chosen count 0.
    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let [x, experts, weights, gate, up, down] = args.try_into().ok()?;
        let (e, n, h): (Dim, Dim, Dim) = (gate.dim(0), x.dim(0), x.dim(1));
        let share = shares(g, experts, weights, &e);
        let share = g.reshape(g.transpose(share, &[1, 0]), [e, n.clone(), 1.into()]);
        let x3 = g.reshape(x, [1.into(), n, h]);
        let product = |x, w| product(g, x, w, self.dynamic);
        let inner = g.unary(self.act, product(x3, gate)?) * product(x3, up)?;
        Some(vec![g.reduce(Reduce::Sum, product(inner, down)? * share, &[0])])
    }
}

/// [`Moe`] with the choice of experts in it, as ONNX Runtime's MoE and QMoE have it: `x f32[n, h]`, `logits f32[n, e]`, and of each of
/// `e` experts `gate_up [e, 2 m, h]`, whose rows are those of gate and up in turn, and `down [e, h, m]`, to `f32[n, h]`: the sum over
/// the `k` experts with the largest logits of `softmax(logits) * down(silu(gate x) * up x)`. The softmax is over all experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutedMoe {
    /// Experts per row.
    pub k: usize,
    /// As [`Moe::dynamic`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dynamic: bool,
}

impl OpDef for RoutedMoe {
    const NAME: &'static str = "routed_moe";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x, logits, gate_up, down] = operands(args)?;
        expect_number(x, "x")?;
        expect_dtype(logits, x.dtype, "logits")?;
        expect(x.rank() == 2 && logits.rank() == 2, || format!("x must be [n, h] and logits [n, e], are {x} and {logits}"))?;
        expect(logits.shape[0] == x.shape[0], || format!("{x} and {logits} are of different numbers of rows"))?;
        for (w, what) in [(gate_up, "gate_up"), (down, "down")] {
            expect_float(w, what)?;
            expect(w.rank() == 3, || format!("{what} must have 3 axes, is {w}"))?;
            expect(!self.dynamic || w.dtype.scheme().is_some(), || format!("x is rounded for quantized weights only, not {what} {w}"))?;
        }
        let (e, h, m) = (logits.shape[1].clone(), x.shape[1].clone(), down.shape[2].clone());
        expect(e.as_const().is_some_and(|e| self.k as i64 <= e), || format!("{} of the experts of {logits}", self.k))?;
        expect_shape(gate_up, &[e.clone(), &m * &Dim::from(2), h.clone()], "gate_up")?;
        expect_shape(down, &[e, h, m], "down")?;
        Ok(vec![x.clone()])
    }

    /// All experts of all rows, of which those that are not chosen count 0.
    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let [x, logits, gate_up, down] = args.try_into().ok()?;
        let (e, n, h, m): (Dim, Dim, Dim, Dim) = (logits.dim(1), x.dim(0), x.dim(1), down.dim(2));
        let chosen = is_one_of(g, g.top_k(logits, self.k), &e);
        let share = softmax(g, logits) * g.reduce(Reduce::Sum, chosen, &[1]);
        let share = g.reshape(g.transpose(share, &[1, 0]), [e.clone(), n.clone(), 1.into()]);
        let inner = product(g, g.reshape(x, [1.into(), n.clone(), h]), gate_up, self.dynamic)?;
        let inner = g.reshape(inner, [e.clone(), n.clone(), m.clone(), 2.into()]);
        let part = |i: usize| g.reshape(g.slice(inner, 3, i, 1), [e.clone(), n.clone(), m.clone()]);
        let inner = g.unary(Unary::Silu, part(0)) * part(1);
        Some(vec![g.reduce(Reduce::Sum, product(g, inner, down, self.dynamic)? * share, &[0])])
    }
}

/// `x [1 or e, n, k]` times each of the matrices `w [e, m, k]`; `dynamic`ally, what it multiplies is rounded to 8 bits.
fn product<'g>(g: &'g Builder<'g>, x: Val<'g>, w: Val<'g>, dynamic: bool) -> Option<Val<'g>> {
    let x = match w.ty().dtype.scheme().filter(|_| dynamic) {
        Some(scheme) => round_to_8_bits(g, x, scheme)?,
        None => x,
    };
    Some(g.matmul(x, g.transpose(g.cast(w, DType::F32), &[0, 2, 1])))
}

/// Of all `e` experts the weights that they have, `f32[n, e]`: 0 where they are not chosen.
pub fn shares<'g>(g: &'g Builder<'g>, experts: Val<'g>, weights: Val<'g>, e: &Dim) -> Val<'g> {
    g.reduce(Reduce::Sum, is_one_of(g, experts, e) * g.unsqueeze(weights, 2), &[1])
}

/// `index i64[...]` to `f32[..., count]`: 1 at the index, else 0.
fn is_one_of<'g>(g: &'g Builder<'g>, index: Val<'g>, count: &Dim) -> Val<'g> {
    let rank = index.ty().rank();
    let mut shape = vec![Dim::from(1); rank + 1];
    shape[rank] = count.clone();
    g.cast(g.binary(Binary::Eq, g.unsqueeze(index, rank), g.reshape(g.iota(count.clone()), shape)), DType::F32)
}

/// Over the last of two axes.
fn softmax<'g>(g: &'g Builder<'g>, x: Val<'g>) -> Val<'g> {
    let y = g.unary(Unary::Exp, x - g.unsqueeze(g.reduce(Reduce::Max, x, &[1]), 1));
    y / g.unsqueeze(g.reduce(Reduce::Sum, y, &[1]), 1)
}

/// Which experts a row goes to (DeepSeek-V2, Liu et al., 2024, section 2.1; without auxiliary loss: DeepSeek-V3): `logits f32[n, e]`
/// and an optional `bias f32[e]` to `experts i64[n, k]` and their `weights f32[n, k]`.
///
/// Scores are the softmax of the logits, or their sigmoid; with a bias, experts are chosen by score + bias, and their weights are
/// the scores alone. With several groups, only experts of the `kept_groups` best groups keep their scores, the others have 0; a
/// group counts as its best expert, or with a bias as the sum of its two best.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Route {
    /// Experts per row.
    pub k: usize,
    /// Scores are sigmoids, not a softmax.
    pub sigmoid: bool,
    /// Groups of equal size that the experts fall into, in order.
    pub groups: usize,
    /// Groups that a row's experts come from.
    pub kept_groups: usize,
    /// Whether the weights are divided by their sum, if there is more than one.
    pub normalize: bool,
    /// Multiplies the weights.
    pub scale: f64,
}

impl OpDef for Route {
    const NAME: &'static str = "route";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let (logits, bias) = match args {
            [logits] => (logits, None),
            [logits, bias] => (logits, Some(bias)),
            _ => return Err(format!("takes 1 or 2 operands, got {}", args.len())),
        };
        expect_dtype(logits, DType::F32, "logits")?;
        expect(logits.rank() == 2, || format!("logits must be [n, e], are {logits}"))?;
        if let Some(bias) = bias {
            expect_dtype(bias, DType::F32, "bias")?;
            expect_shape(bias, &logits.shape[1..], "bias")?;
        }
        let e = logits.last()?.as_const().and_then(|e| usize::try_from(e).ok()).ok_or("the number of experts must be known")?;
        expect(self.k <= e, || format!("{} of {e} experts", self.k))?;
        let whole = self.groups > 0 && e.is_multiple_of(self.groups) && self.kept_groups <= self.groups;
        expect(whole, || format!("{} of {} groups of {e} experts", self.kept_groups, self.groups))?;
        expect(bias.is_none() || self.groups == 1 || e / self.groups > 1, || format!("groups of one expert have no two best: {logits}"))?;
        let shape = vec![logits.shape[0].clone(), Dim::from(self.k)];
        Ok([DType::I64, DType::F32].map(|dtype| Type { dtype, shape: shape.clone() }).into())
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let (logits, bias) = (args[0], args.get(1).copied());
        let (n, e) = (logits.dim(0), logits.dim(1));
        let sum = |x: Val<'g>, axis: usize| g.reduce(Reduce::Sum, x, &[axis]);
        let scores = if self.sigmoid { g.unary(Unary::Sigmoid, logits) } else { softmax(g, logits) };
        let marks = |index, count: &Dim| is_one_of(g, index, count);
        let mut choice = bias.map_or(scores, |b| scores + b);
        if self.groups > 1 {
            let groups = Dim::from(self.groups);
            let size = e.exact_div(&groups)?;
            let grouped = g.reshape(choice, [n.clone(), groups.clone(), size.clone()]);
            let worth = if bias.is_some() {
                let best = marks(g.top_k(grouped, 2), &size) * g.unsqueeze(grouped, 2);
                g.reduce(Reduce::Sum, best, &[2, 3])
            } else {
                g.reduce(Reduce::Max, grouped, &[2])
            };
            let kept = g.unsqueeze(sum(marks(g.top_k(worth, self.kept_groups), &groups), 1), 2);
            let zero = g.literal(Literal::scalar(DType::F32, 0.0));
            choice = g.reshape(g.select(g.binary(Binary::Lt, zero, kept), grouped, zero), [n, e.clone()]);
        }
        let experts = g.top_k(choice, self.k);
        let source = if bias.is_some() { scores } else { choice };
        let mut weights = sum(marks(experts, &e) * g.unsqueeze(source, 1), 2);
        if self.normalize && self.k > 1 {
            weights = weights / g.unsqueeze(sum(weights, 1) + 1e-20, 1);
        }
        Some(vec![experts, if self.scale == 1.0 { weights } else { weights * self.scale }])
    }
}
