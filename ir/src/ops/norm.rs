//! Normalisations.

use super::{OpDef, expect, expect_dtype, expect_float, expect_number, expect_shape, operands};
use crate::{Builder, DType, Type, Val};
use serde::{Deserialize, Serialize};
use vlmc_artifact::program::{Reduce, Unary};

fn check(x: &Type, vectors: &[(&Type, &str)], eps: f64) -> Result<Vec<Type>, String> {
    expect_number(x, "x")?;
    let n = x.last()?.clone();
    for (t, what) in vectors {
        expect_float(t, what)?;
        expect_shape(t, std::slice::from_ref(&n), what)?;
    }
    expect(eps.is_finite() && eps >= 0.0, || format!("eps must be a finite number of at least 0, is {eps}"))?;
    Ok(vec![x.clone()])
}

fn mean_last<'g>(g: &'g Builder<'g>, x: Val<'g>) -> Val<'g> {
    let axis = x.ty().rank() - 1;
    g.unsqueeze(g.reduce(Reduce::Mean, x, &[axis]), axis)
}

/// `x f32[..., n]`, `weight [n]`, `bias [n]` to `(x - mean) / sqrt(var + eps) * weight + bias` with the biased variance
/// (Ba et al., 2016).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f64,
}

impl OpDef for LayerNorm {
    const NAME: &'static str = "layer_norm";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x, weight, bias] = operands(args)?;
        check(x, &[(weight, "weight"), (bias, "bias")], self.eps)
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let centred = args[0] - mean_last(g, args[0]);
        let y = centred / g.unary(Unary::Sqrt, mean_last(g, centred * centred) + self.eps);
        Some(vec![y * g.cast(args[1], DType::F32) + g.cast(args[2], DType::F32)])
    }
}

/// `x f32[..., n]`, `weight [n]` to `x / sqrt(mean(x²) + eps) * weight` (Zhang and Sennrich, 2019).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f64,
}

impl OpDef for RmsNorm {
    const NAME: &'static str = "rms_norm";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x, weight] = operands(args)?;
        check(x, &[(weight, "weight")], self.eps)
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let x = args[0];
        let y = x / g.unary(Unary::Sqrt, mean_last(g, x * x) + self.eps);
        Some(vec![y * g.cast(args[1], DType::F32)])
    }
}

/// `x`, `y f32[..., n]` and what [`LayerNorm`] takes to two results: the sum `x + y` and its layer norm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddLayerNorm {
    /// Added to the variance.
    pub eps: f64,
}

impl OpDef for AddLayerNorm {
    const NAME: &'static str = "add_layer_norm";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x, y, weight, bias] = operands(args)?;
        expect(x == y, || format!("x and y must have one type, are {x} and {y}"))?;
        Ok([check(x, &[(weight, "weight"), (bias, "bias")], self.eps)?, vec![x.clone()]].concat())
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let sum = args[0] + args[1];
        let [normed] = g.apply(LayerNorm { eps: self.eps }, &[sum, args[2], args[3]]);
        Some(vec![sum, normed])
    }
}

/// `x`, `y f32[..., n]` and what [`RmsNorm`] takes to two results: the sum `x + y` and its RMS norm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddRmsNorm {
    /// Added to the mean square.
    pub eps: f64,
}

impl OpDef for AddRmsNorm {
    const NAME: &'static str = "add_rms_norm";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x, y, weight] = operands(args)?;
        expect(x == y, || format!("x and y must have one type, are {x} and {y}"))?;
        Ok([check(x, &[(weight, "weight")], self.eps)?, vec![x.clone()]].concat())
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let sum = args[0] + args[1];
        let [normed] = g.apply(RmsNorm { eps: self.eps }, &[sum, args[2]]);
        Some(vec![sum, normed])
    }
}

/// `x f32[n, c, h, w]` and `weight`, `bias`, `mean`, `var` `[c]` to `(x - mean) / sqrt(var + eps) * weight + bias` per channel
/// (Ioffe and Szegedy, 2015, at inference).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchNorm {
    /// Added to the variance.
    pub eps: f64,
}

impl OpDef for BatchNorm {
    const NAME: &'static str = "batch_norm";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x, vectors @ ..] = args else { return Err("takes 5 operands, got 0".into()) };
        let [weight, bias, mean, var] = operands(vectors).map_err(|_| format!("takes 5 operands, got {}", args.len()))?;
        expect(x.rank() == 4, || format!("x must be [n, c, h, w], is {x}"))?;
        expect_dtype(x, DType::F32, "x")?;
        for (t, what) in [(weight, "weight"), (bias, "bias"), (mean, "mean"), (var, "var")] {
            expect_float(t, what)?;
            expect_shape(t, &x.shape[1..2], what)?;
        }
        expect(self.eps.is_finite() && self.eps >= 0.0, || format!("eps must be a finite number of at least 0, is {}", self.eps))?;
        Ok(vec![x.clone()])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let x = args[0];
        let [weight, bias, mean, var] = [1, 2, 3, 4].map(|i| g.cast(args[i], DType::F32));
        let scale = weight / g.unary(Unary::Sqrt, var + self.eps);
        let shift = bias - mean * scale;
        let per_channel = |v: Val<'g>| g.reshape(v, [x.dim(1), 1.into(), 1.into()]);
        Some(vec![x * per_channel(scale) + per_channel(shift)])
    }
}
