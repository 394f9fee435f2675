//! Matrix products and tables.

use super::{OpDef, broadcast_shapes, expect, expect_dtype, expect_float, expect_number, expect_rank, expect_shape, operands};
use crate::{Bindings, Builder, DType, Dim, Literal, Type, Val, interp::Array};
use ndarray::{Array2, ArrayD, ArrayView2, ArrayViewD, ArrayViewMut2, Axis, Dimension, linalg::general_mat_mul};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use vlmc_artifact::{
    Scheme,
    program::{Binary, Reduce, Unary},
};

/// `a f32[..., m, k]`, `b f32[..., k, n]` (leading axes broadcast) to `f32[..., m, n]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MatMul {}

impl OpDef for MatMul {
    const NAME: &'static str = "matmul";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [a, b] = operands(args)?;
        for (t, what) in [(a, "left operand"), (b, "right operand")] {
            expect_number(t, what)?;
            expect_dtype(t, a.dtype, what)?;
            expect_rank(t, 2, what)?;
        }
        let ((batch_a, [m, k]), (batch_b, [k2, n])) = (split2(&a.shape), split2(&b.shape));
        expect(k == k2, || format!("inner dims {k} and {k2} differ"))?;
        let mut shape = broadcast_shapes(batch_a, batch_b)?;
        shape.extend([m.clone(), n.clone()]);
        Ok(vec![Type { dtype: a.dtype, shape }])
    }

    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        let (a, b) = (args[0].f32()?, args[1].f32()?);
        let ((batch_a, [m, k]), (batch_b, [_, n])) = (split2(a.shape()), split2(b.shape()));
        let dims = |s: &[usize]| s.iter().map(|d| Dim::from(*d)).collect::<Vec<_>>();
        let batch = broadcast_shapes(&dims(batch_a), &dims(batch_b))?;
        let batch: Vec<usize> = batch.iter().map(|d| d.as_const().unwrap_or(0) as usize).collect();
        let full = |m: usize, n: usize| [batch.as_slice(), &[m, n]].concat();
        let views = || Some((a.broadcast(full(*m, *k))?, b.broadcast(full(*k, *n))?));
        let (a, b) = views().ok_or("shapes do not broadcast")?;
        let mut out = ArrayD::zeros(full(*m, *n));
        for at in ndarray::indices(batch.as_slice()) {
            let (a, b) = (matrix_at(&a, at.slice())?, matrix_at(&b, at.slice())?);
            let mut out = out.view_mut();
            at.slice().iter().for_each(|i| out.index_axis_inplace(Axis(0), *i));
            let mut out = out.into_dimensionality().map_err(|e| e.to_string())?;
            product(&a, &b, &mut out);
        }
        Ok(vec![Array::F32(out)])
    }
}

/// The matrix at an index of the leading axes.
fn matrix_at<'a>(x: &ArrayViewD<'a, f32>, at: &[usize]) -> Result<ArrayView2<'a, f32>, String> {
    let mut x = x.clone();
    at.iter().for_each(|i| x.index_axis_inplace(Axis(0), *i));
    x.into_dimensionality().map_err(|e| e.to_string())
}

/// `out = a b`, on all cores: blocks of columns of a fixed width, so that the sums do not depend on their number.
fn product(a: &ArrayView2<'_, f32>, b: &ArrayView2<'_, f32>, out: &mut ArrayViewMut2<'_, f32>) {
    const WIDTH: usize = 256;
    let columns = out.axis_chunks_iter_mut(Axis(1), WIDTH).zip(b.axis_chunks_iter(Axis(1), WIDTH)).collect::<Vec<_>>();
    columns.into_par_iter().for_each(|(mut out, b)| general_mat_mul(1.0, a, &b, 0.0, &mut out));
}

fn split2<T>(shape: &[T]) -> (&[T], [&T; 2]) {
    let (batch, last) = shape.split_at(shape.len() - 2);
    (batch, [&last[0], &last[1]])
}

/// `x f32[..., k]`, `weight [n, k]`, optional `bias [n]` to `act(x weightᵀ + bias)`, `f32[..., n]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Linear {
    /// `x` is first rounded to 8 bits, to -127..=127 with the scale max|x| / 127 of a row's columns, in the groups that the
    /// columns of `weight` have, which must be quantized.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dynamic: bool,
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
        expect_number(x, "x")?;
        expect_float(w, "weight")?;
        expect(w.rank() == 2, || format!("weight must have 2 axes, is {w}"))?;
        expect(x.last()? == &w.shape[1], || format!("last dim of {x} and {w} differ"))?;
        expect(self.act != Some(Unary::Not), || "the activation must be one of floats".into())?;
        expect(!self.dynamic || w.dtype.scheme().is_some(), || format!("x is rounded for quantized weights only, not {w}"))?;
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
            let [y] = g.apply(Self { act: None, ..self.clone() }, args);
            return Some(vec![g.unary(act, y)]);
        }
        if let (true, Some(scheme)) = (self.dynamic, args[1].ty().dtype.scheme()) {
            let x = round_to_8_bits(g, args[0], scheme)?;
            return Some(g.apply_op(Self { dynamic: false, ..self.clone() }.into(), &[&[x], &args[1..]].concat()));
        }
        let y = g.matmul(args[0], g.transpose(g.cast(args[1], DType::F32), &[1, 0]));
        Some(vec![args.get(2).map_or(y, |bias| y + g.cast(*bias, DType::F32))])
    }

    /// As the decomposition of what is not dynamic, without copies of the weight.
    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        let (x, w) = (args[0].f32()?, args[1].f32()?);
        let [n, k] = *w.shape() else { return Err(format!("weight must have 2 axes, has shape {:?}", w.shape())) };
        let mut shape = x.shape().to_vec();
        shape.pop();
        let rows = shape.iter().product();
        shape.push(n);
        let failed = |e: ndarray::ShapeError| e.to_string();
        let x = x.to_shape((rows, k)).map_err(failed)?;
        let w = w.view().into_dimensionality().map_err(failed)?;
        let mut y = Array2::zeros((rows, n));
        product(&x.view(), &w.reversed_axes(), &mut y.view_mut());
        if let Some(bias) = args.get(2) {
            y += bias.f32()?;
        }
        Ok(vec![Array::F32(y.into_shape_with_order(shape).map_err(failed)?)])
    }
}

/// `x` in steps of max|x| / 127 of a row's columns, in groups as `scheme` has them. The columns must be of known number.
pub(super) fn round_to_8_bits<'g>(g: &'g Builder<'g>, x: Val<'g>, scheme: Scheme) -> Option<Val<'g>> {
    let axis = x.ty().rank().checked_sub(1)?;
    let k = usize::try_from(x.dim(axis).as_const()?).ok()?;
    let len = scheme.group_len(k);
    let number = |v: f64| g.literal(Literal::scalar(DType::F32, v));
    let part = |start: usize, groups: usize, len: usize| {
        let part = g.slice(x, axis, start, groups * len);
        let mut grouped = x.ty().shape;
        grouped.splice(axis.., [groups.into(), len.into()]);
        let y = g.reshape(part, grouped);
        let largest = g.unsqueeze(g.reduce(Reduce::Max, g.unary(Unary::Abs, y), &[axis + 1]), axis + 1);
        // Zeros have no largest number; any scale serves them.
        let inverse = number(127.0) / g.binary(Binary::Max, largest, number(1e-30));
        g.reshape(g.unary(Unary::Round, y * inverse) * (largest / 127.0), part.ty().shape)
    };
    let whole = k / len;
    let rest = k % len;
    let parts: Vec<Val<'g>> =
        [(0, whole, len), (whole * len, 1, rest)].into_iter().filter(|p| p.1 * p.2 > 0).map(|(s, n, l)| part(s, n, l)).collect();
    Some(if parts.is_empty() { x } else { g.concat(&parts, axis) })
}

/// `x f32[...]` in steps of `scale`: `round(x / scale)`, ties to even, kept in -128 ..= 127, times `scale`. ONNX has it as
/// QuantizeLinear and then DequantizeLinear.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FakeQuantize {
    /// Of all elements.
    pub scale: f64,
}

impl OpDef for FakeQuantize {
    const NAME: &'static str = "fake_quantize";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        expect_number(x, "x")?;
        expect(self.scale > 0.0 && self.scale.is_finite(), || format!("scale must be positive, is {}", self.scale))?;
        Ok(vec![x.clone()])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let number = |v: f64| g.literal(Literal::scalar(DType::F32, v));
        let steps = g.unary(Unary::Round, *args.first()? / number(self.scale));
        let kept = g.binary(Binary::Min, g.binary(Binary::Max, steps, number(-128.0)), number(127.0));
        Some(vec![kept * number(self.scale)])
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
