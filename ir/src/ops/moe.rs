//! Mixtures of experts.

use super::{OpDef, expect, expect_dtype, expect_float, expect_shape, operands};
use crate::{Bindings, Builder, DType, Dim, Type, Val, interp::Array};
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

    fn eval(&self, args: &[Array], _: &Bindings) -> Result<Vec<Array>, String> {
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
/// and of each of `e` experts `gate`, `up [e, m, h]` and `down [e, h, m]`, to `f32[n, h]`:
/// the sum over the chosen of `weight * down(act(gate x) * up x)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moe {
    /// Activation of the gate.
    pub act: Unary,
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
        // [n, k, e]: the weight where the expert is the chosen one.
        let chosen = g.binary(Binary::Eq, g.unsqueeze(experts, 2), g.reshape(g.iota(e.clone()), [1.into(), 1.into(), e.clone()]));
        let share = g.reduce(Reduce::Sum, g.cast(chosen, DType::F32) * g.unsqueeze(weights, 2), &[1]);
        let share = g.reshape(g.transpose(share, &[1, 0]), [e, n.clone(), 1.into()]);
        let x3 = g.reshape(x, [1.into(), n, h]);
        let product = |x: Val<'g>, w: Val<'g>| g.matmul(x, g.transpose(g.cast(w, DType::F32), &[0, 2, 1]));
        let inner = g.unary(self.act, product(x3, gate)) * product(x3, up);
        Some(vec![g.reduce(Reduce::Sum, product(inner, down) * share, &[0])])
    }
}
