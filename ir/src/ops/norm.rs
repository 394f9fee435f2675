//! Normalisations over the last axis.

use super::{OpDef, expect, expect_dtype, expect_float, expect_shape, operands};
use crate::{Builder, DType, Type, Val};
use serde::{Deserialize, Serialize};
use vlmc_artifact::program::{Reduce, Unary};

fn check(x: &Type, vectors: &[(&Type, &str)], eps: f64) -> Result<Vec<Type>, String> {
    expect_dtype(x, DType::F32, "x")?;
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
