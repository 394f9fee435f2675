//! Matrix products and tables.

use super::{OpDef, broadcast_shapes, expect, expect_dtype, expect_float, expect_rank, expect_shape, operands};
use crate::{Bindings, Builder, DType, Dim, Literal, Type, Val, interp::Array};
use ndarray::ArrayD;
use serde::{Deserialize, Serialize};
use vlmc_artifact::program::{Binary, Unary};

/// `a f32[..., m, k]`, `b f32[..., k, n]` (leading axes broadcast) to `f32[..., m, n]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatMul {}

impl OpDef for MatMul {
    const NAME: &'static str = "matmul";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [a, b] = operands(args)?;
        for (t, what) in [(a, "left operand"), (b, "right operand")] {
            expect_dtype(t, DType::F32, what)?;
            expect_rank(t, 2, what)?;
        }
        let ((batch_a, [m, k]), (batch_b, [k2, n])) = (split2(&a.shape), split2(&b.shape));
        expect(k == k2, || format!("inner dims {k} and {k2} differ"))?;
        let mut shape = broadcast_shapes(batch_a, batch_b)?;
        shape.extend([m.clone(), n.clone()]);
        Ok(vec![Type { dtype: DType::F32, shape }])
    }

    fn eval(&self, args: &[Array], _: &Bindings) -> Result<Vec<Array>, String> {
        let (a, b) = (args[0].f32()?, args[1].f32()?);
        let ((batch_a, [m, k]), (batch_b, [_, n])) = (split2(a.shape()), split2(b.shape()));
        let dims = |s: &[usize]| s.iter().map(|d| Dim::from(*d)).collect::<Vec<_>>();
        let batch = broadcast_shapes(&dims(batch_a), &dims(batch_b))?;
        let batch: Vec<usize> = batch.iter().map(|d| d.as_const().unwrap_or(0) as usize).collect();
        let full = |m: usize, n: usize| [batch.as_slice(), &[m, n]].concat();
        let flat = |x: &ArrayD<f32>, m: usize, n: usize| -> Result<ndarray::Array3<f32>, String> {
            let x = x.broadcast(full(m, n)).ok_or("shapes do not broadcast")?;
            x.as_standard_layout().into_owned().into_shape_with_order((batch.iter().product(), m, n)).map_err(|e| e.to_string())
        };
        let (a, b) = (flat(a, *m, *k)?, flat(b, *k, *n)?);
        let mut out = ndarray::Array3::zeros((a.shape()[0], *m, *n));
        for ((a, b), mut out) in a.outer_iter().zip(b.outer_iter()).zip(out.outer_iter_mut()) {
            out.assign(&a.dot(&b));
        }
        Ok(vec![Array::F32(out.into_shape_with_order(full(*m, *n)).map_err(|e| e.to_string())?)])
    }
}

fn split2<T>(shape: &[T]) -> (&[T], [&T; 2]) {
    let (batch, last) = shape.split_at(shape.len() - 2);
    (batch, [&last[0], &last[1]])
}

/// `x f32[..., k]`, `weight [n, k]`, optional `bias [n]` to `act(x weightᵀ + bias)`, `f32[..., n]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Linear {
    /// Function of each element of the result, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act: Option<Unary>,
}

impl OpDef for Linear {
    const NAME: &'static str = "linear";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let (x, w, bias) = match args {
            [x, w] => (x, w, None),
            [x, w, b] => (x, w, Some(b)),
            _ => return Err(format!("takes 2 or 3 operands, got {}", args.len())),
        };
        expect_dtype(x, DType::F32, "x")?;
        expect_float(w, "weight")?;
        expect(w.rank() == 2, || format!("weight must have 2 axes, is {w}"))?;
        expect(x.last()? == &w.shape[1], || format!("last dim of {x} and {w} differ"))?;
        expect(self.act != Some(Unary::Not), || "the activation must be one of floats".into())?;
        if let Some(b) = bias {
            expect_float(b, "bias")?;
            expect_shape(b, &w.shape[..1], "bias")?;
        }
        let mut out = x.clone();
        out.shape[x.rank() - 1] = w.shape[0].clone();
        Ok(vec![out])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        if let Some(act) = self.act {
            let [y] = g.apply(Self { act: None }, args);
            return Some(vec![g.unary(act, y)]);
        }
        let y = g.matmul(args[0], g.transpose(g.cast(args[1], DType::F32), &[1, 0]));
        Some(vec![args.get(2).map_or(y, |bias| y + g.cast(*bias, DType::F32))])
    }
}

/// `table [entries, width]`, `ids i64[...]` to the rows chosen, `f32[..., width]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Embedding {}

impl OpDef for Embedding {
    const NAME: &'static str = "embedding";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [table, ids] = operands(args)?;
        expect_float(table, "table")?;
        expect(table.rank() == 2, || format!("table must have 2 axes, is {table}"))?;
        expect_dtype(ids, DType::I64, "ids")?;
        let mut shape = ids.shape.clone();
        shape.push(table.shape[1].clone());
        Ok(vec![Type { dtype: DType::F32, shape }])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        Some(vec![g.cast(g.gather(args[0], args[1], 0), DType::F32)])
    }
}

/// `embeds f32[batch, seq, width]`, `here bool[batch, seq]`, `features f32[n, width]`: rows of `embeds` where `here` holds are
/// replaced by the rows of `features`, in order, as long as there are any.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeFeatures {}

impl OpDef for MergeFeatures {
    const NAME: &'static str = "merge_features";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [embeds, here, features] = operands(args)?;
        expect_dtype(embeds, DType::F32, "embeds")?;
        expect_dtype(here, DType::Bool, "here")?;
        expect_dtype(features, DType::F32, "features")?;
        expect(embeds.rank() == 3, || format!("embeds must have 3 axes, is {embeds}"))?;
        expect_shape(here, &embeds.shape[..2], "here")?;
        expect(features.rank() == 2, || format!("features must have 2 axes, is {features}"))?;
        expect_shape(features, &[features.shape[0].clone(), embeds.shape[2].clone()], "features")?;
        Ok(vec![embeds.clone()])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let [embeds, here, features] = args.try_into().ok()?;
        let (batch, seq, width) = (embeds.dim(0), embeds.dim(1), embeds.dim(2));
        let positions = &batch * &seq;
        let flat = g.reshape(here, [positions.clone()]);
        // The n-th place takes row n, if there is one; all others take a row of zeros at the end, which the last select drops.
        let count = g.dim(features.dim(0));
        let row = g.cumsum(g.cast(flat, DType::I64), 0) - 1.0;
        let flat = g.binary(Binary::And, flat, g.binary(Binary::Lt, row, count));
        let row = g.select(flat, row, count);
        let nothing = g.broadcast(g.literal(Literal::scalar(DType::F32, 0.0)), vec![1.into(), width.clone()]);
        let rows = g.gather(g.concat(&[features, nothing], 0), row, 0);
        let rows = g.reshape(rows, [batch.clone(), seq.clone(), width]);
        Some(vec![g.select(g.reshape(flat, [batch, seq, 1.into()]), rows, embeds)])
    }
}
