//! Convolutions and resizing.

use super::{OpDef, expect, expect_dtype, expect_float, expect_number, expect_shape, operands};
use crate::{Builder, DType, Dim, Literal, Type, Val};
use serde::{Deserialize, Serialize};
use vlmc_artifact::program::{Binary, Reduce, Unary};

/// 2-D convolution: `x f32[n, c, h, w]`, `weight [o, c, kh, kw]`, optional `bias [o]` to `f32[n, o, oh, ow]` with
/// `oh = (h + 2 padding - kh) / stride + 1`; padding is of zeros. `h` and `w` must be numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Conv2d {
    /// Pixels from one window to the next.
    pub stride: usize,
    /// Zeros on each side.
    pub padding: usize,
}

impl Conv2d {
    /// Kernel length and number of windows along an axis of the picture.
    fn windows(&self, length: &Dim, kernel: &Dim) -> Result<(i64, i64), String> {
        let known = |d: &Dim| d.as_const().ok_or_else(|| format!("{d} must be a number"));
        let (length, kernel) = (known(length)?, known(kernel)?);
        let room = length + 2 * self.padding as i64 - kernel;
        expect(room >= 0 && kernel > 0 && self.stride > 0, || format!("a kernel of {kernel} does not fit into {length}"))?;
        Ok((kernel, room / self.stride as i64 + 1))
    }
}

impl OpDef for Conv2d {
    const NAME: &'static str = "conv2d";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let (x, w, bias) = match args {
            [x, w] => (x, w, None),
            [x, w, b] => (x, w, Some(b)),
            _ => return Err(format!("takes 2 or 3 operands, got {}", args.len())),
        };
        expect_number(x, "x")?;
        expect_float(w, "weight")?;
        expect(x.rank() == 4 && w.rank() == 4 && x.shape[1] == w.shape[1], || format!("{x} and {w} are no picture and kernel"))?;
        if let Some(b) = bias {
            expect_float(b, "bias")?;
            expect_shape(b, &w.shape[..1], "bias")?;
        }
        let ((_, oh), (_, ow)) = (self.windows(&x.shape[2], &w.shape[2])?, self.windows(&x.shape[3], &w.shape[3])?);
        Ok(vec![Type::new(x.dtype, [x.shape[0].clone(), w.shape[0].clone(), oh.into(), ow.into()])])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let (mut x, weight) = (args[0], args[1]);
        let (tx, tw) = (x.ty(), weight.ty());
        let (n, c, o) = (tx.shape[0].clone(), tx.shape[1].clone(), tw.shape[0].clone());
        let ((kh, oh), (kw, ow)) = (self.windows(&tx.shape[2], &tw.shape[2]).ok()?, self.windows(&tx.shape[3], &tw.shape[3]).ok()?);
        for axis in [2, 3] {
            if self.padding > 0 {
                let mut shape = x.ty().shape;
                shape[axis] = self.padding.into();
                let zeros = g.broadcast(g.literal(Literal::scalar(DType::F32, 0.0)), shape);
                x = g.concat(&[zeros, x, zeros], axis);
            }
        }
        // Every window's pixels as a row (im2col), by gathering rows and then columns.
        let at = |count: i64, kernel: i64| {
            let index = (0..count).flat_map(|i| (0..kernel).map(move |k| (i * self.stride as i64 + k) as f64)).collect();
            g.literal(Literal { dtype: DType::I64, shape: vec![count as usize, kernel as usize], data: index })
        };
        let x = g.gather(g.gather(x, at(ow, kw), 3), at(oh, kh), 2);
        let rows = g.reshape(g.transpose(x, &[0, 2, 4, 1, 3, 5]), [n.clone(), (oh * ow).into(), &c * (kh * kw)]);
        let weight = g.reshape(g.cast(weight, DType::F32), [o.clone(), &c * (kh * kw)]);
        let y = g.matmul(rows, g.transpose(weight, &[1, 0]));
        let y = args.get(2).map_or(y, |b| y + g.cast(*b, DType::F32));
        Some(vec![g.reshape(g.transpose(y, &[0, 2, 1]), [n, o, oh.into(), ow.into()])])
    }
}

/// How [`ResizeWeights`] interpolates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Between the two nearest elements.
    Bilinear,
    /// As `Bilinear`, but when shrinking with a triangle as wide as the scale (`antialias=True`).
    BilinearAntialias,
    /// Keys' cubic with a = -0.75, of the four nearest elements.
    Bicubic,
}

/// The matrix that resizes an axis: `size i64[]` to `f32[rows, from]`, whose first `size` rows are the weights of the `from`
/// elements for each of `size` new ones; the rows after them repeat the last. Of several sizes, `i64[n]`, it makes as many
/// matrices, `f32[n, rows, from]`. As torch's `interpolate` with
/// `align_corners=False`: element `i` is centred at `(i + 1/2) from / size - 1/2`, and beyond the border stands the border.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResizeWeights {
    /// Length before.
    pub from: usize,
    /// Rows of the matrix.
    pub rows: Dim,
    /// Interpolation.
    pub filter: Filter,
}

impl OpDef for ResizeWeights {
    const NAME: &'static str = "resize_weights";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [size] = operands(args)?;
        expect_dtype(size, DType::I64, "size")?;
        expect(size.rank() <= 1, || format!("size must be i64[] or i64[n], is {size}"))?;
        expect(self.from > 0, || "there must be something to resize".into())?;
        let mut shape = size.shape.clone();
        shape.extend([self.rows.clone(), self.from.into()]);
        Ok(vec![Type { dtype: DType::F32, shape }])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        // One axis for the rows after that of several sizes.
        let lead = args[0].ty().rank();
        let size = g.cast(args[0], DType::F32);
        let size = if lead == 0 { size } else { g.unsqueeze(size, lead) };
        let scalar = |v: f64| g.literal(Literal::scalar(DType::F32, v));
        let (zero, one) = (scalar(0.0), scalar(1.0));
        let (min, max) = (|a, b| g.binary(Binary::Min, a, b), |a, b| g.binary(Binary::Max, a, b));
        // How many old elements a new one stands for.
        let scale = scalar(self.from as f64) / size;
        let row = min(g.cast(g.iota(self.rows.clone()), DType::F32), size - 1.0);
        let centre = g.unsqueeze((row + 0.5) * scale, lead + 1);
        let column = g.unsqueeze(g.cast(g.iota(self.from), DType::F32), 0);
        let scale = if lead == 0 { scale } else { g.unsqueeze(scale, lead + 1) };
        let triangle = |x: Val<'g>| max(one - g.unary(Unary::Abs, x), zero);
        Some(vec![match self.filter {
            Filter::BilinearAntialias => {
                // Pixels whose centres lie within the support, weighted, and the weights normalised (aten UpSampleKernel).
                let width = max(scale, one);
                let first = max(g.cast(g.cast(centre - width + 0.5, DType::I64), DType::F32), zero);
                let end = min(g.cast(g.cast(centre + width + 0.5, DType::I64), DType::F32), scalar(self.from as f64));
                let inside = g.binary(Binary::And, g.binary(Binary::Le, first, column), g.binary(Binary::Lt, column, end));
                let weights = triangle((column - centre + 0.5) / width) * g.cast(inside, DType::F32);
                weights / g.unsqueeze(g.reduce(Reduce::Sum, weights, &[lead + 1]), lead + 1)
            }
            Filter::Bilinear => {
                let source = min(max(centre - 0.5, zero), scalar(self.from as f64 - 1.0));
                triangle(column - source)
            }
            Filter::Bicubic => {
                let source = centre - 0.5;
                let floor = g.unary(Unary::Floor, source);
                let t = source - floor;
                // Taps beyond the border fall on it: each tap adds its weight where it lands.
                let a = -0.75;
                let near = |x: Val<'g>| ((x * (a + 2.0) - (a + 3.0)) * x) * x + 1.0;
                let far = |x: Val<'g>| ((x * a - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a;
                let taps = [(-1.0, far(t + 1.0)), (0.0, near(t)), (1.0, near(one - t)), (2.0, far(scalar(2.0) - t))];
                let landed = taps.map(|(offset, weight)| {
                    let at = min(max(floor + offset, zero), scalar(self.from as f64 - 1.0));
                    weight * g.cast(g.binary(Binary::Eq, at, column), DType::F32)
                });
                landed.into_iter().reduce(|a, b| a + b)?
            }
        }])
    }
}
