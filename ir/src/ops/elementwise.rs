//! Functions of each element.

use super::{OpDef, broadcast_shapes, expect, expect_dtype, expect_float, expect_number, operands};
use crate::{
    Bindings, Builder, DType, Dim, Type, Val,
    interp::{Array, broadcast2},
};
use half::{bf16, f16};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use vlmc_artifact::program::{Binary, Unary};

fn function_name(f: &impl Serialize) -> String {
    serde_json::to_value(f).ok().and_then(|v| v.as_str().map(String::from)).unwrap_or_default()
}

fn function_named<F: DeserializeOwned>(name: &str) -> Option<F> {
    serde_json::from_value(Value::String(name.into())).ok()
}

/// A function of one operand, named as the function: `exp`, `silu`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Elementwise1 {
    /// The function.
    pub f: Unary,
}

impl OpDef for Elementwise1 {
    const NAME: &'static str = "unary";

    fn mnemonic(&self) -> String {
        function_name(&self.f)
    }

    fn attributes(&self) -> Map<String, Value> {
        Map::new()
    }

    fn parse(name: &str, _: &Map<String, Value>) -> Option<Result<Self, String>> {
        function_named(name).map(|f| Ok(Self { f }))
    }

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        match self.f {
            Unary::Not => expect_dtype(x, DType::Bool, "operand")?,
            _ => expect_number(x, "operand")?,
        }
        Ok(vec![x.clone()])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let x = args[0];
        let one_plus = |f: Unary, x: Val<'g>| g.unary(f, x) + 1.0;
        Some(vec![match self.f {
            Unary::Silu => x * g.unary(Unary::Sigmoid, x),
            // CLIP's approximation: x * sigmoid(1.702 x).
            Unary::QuickGelu => x * g.unary(Unary::Sigmoid, x * 1.702),
            // Hendrycks and Gimpel, 2016, exact and with tanh.
            Unary::Gelu => x * 0.5 * one_plus(Unary::Erf, x * std::f64::consts::FRAC_1_SQRT_2),
            Unary::GeluTanh => x * 0.5 * one_plus(Unary::Tanh, (x + x * x * x * 0.044715) * (2.0 / std::f64::consts::PI).sqrt()),
            _ => return None,
        }])
    }

    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        let f: fn(f32) -> f32 = match self.f {
            Unary::Not => return Ok(vec![Array::Bool(args[0].bool()?.mapv(|v| !v))]),
            Unary::Neg => |x| -x,
            Unary::Abs => f32::abs,
            Unary::Exp => f32::exp,
            Unary::Log => f32::ln,
            Unary::Sqrt => f32::sqrt,
            Unary::Sin => f32::sin,
            Unary::Cos => f32::cos,
            Unary::Tanh => f32::tanh,
            Unary::Erf => erf,
            Unary::Sigmoid => |x| 1.0 / (1.0 + (-x).exp()),
            Unary::Floor => f32::floor,
            Unary::Round => f32::round_ties_even,
            Unary::Silu | Unary::QuickGelu | Unary::Gelu | Unary::GeluTanh => return Err(format!("'{}' is composite", self.mnemonic())),
        };
        Ok(vec![Array::F32(args[0].f32()?.mapv(f))])
    }
}

/// The error function by its Maclaurin series, or for |x| > 3 by the continued fraction of its complement (DLMF 7.6.1 and
/// 7.9.1): slow and good to the last bit of an `f32`.
fn erf(x: f32) -> f32 {
    let x = f64::from(x);
    let a = x.abs();
    if a > 6.0 {
        return x.signum() as f32;
    }
    let scale = std::f64::consts::FRAC_2_SQRT_PI;
    if a <= 3.0 {
        let (mut term, mut sum) = (x, x);
        for n in 1..80 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return (scale * sum) as f32;
    }
    // erfc(a) sqrt(pi) exp(a²) = 1 / (a + (1/2) / (a + 1 / (a + (3/2) / (a + ...))))
    let fraction = (1..60).rev().fold(a, |f, n| a + f64::from(n) / 2.0 / f);
    let complement = (-a * a).exp() / fraction * scale / 2.0;
    ((1.0 - complement) * x.signum()) as f32
}

/// `x f32[..., 2 n]` to `act(a) * b`, `f32[..., n]`, for the halves `a` and `b` of the last axis: the gated linear units of
/// Shazeer, 2020, over packed projections.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gated {
    /// Function of the first half.
    pub act: Unary,
}

impl Gated {
    fn half(x: &Type) -> Result<Dim, String> {
        let width = x.last()?;
        width.exact_div(&2.into()).ok_or_else(|| format!("last dim of {x} has no halves"))
    }
}

impl OpDef for Gated {
    const NAME: &'static str = "gated";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        expect_dtype(x, DType::F32, "x")?;
        expect(self.act != Unary::Not, || "the activation must be one of floats".into())?;
        let mut out = x.clone();
        out.shape[x.rank() - 1] = Self::half(x)?;
        Ok(vec![out])
    }

    fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        let (x, axis) = (args[0], args[0].ty().rank() - 1);
        let half = Self::half(&x.ty()).ok()?;
        let (a, b) = (g.slice(x, axis, 0, half.clone()), g.slice(x, axis, half.clone(), half));
        Some(vec![g.unary(self.act, a) * b])
    }
}

/// A function of two operands of one dtype with NumPy broadcasting, named as the function: `add`, `lt`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Elementwise2 {
    /// The function.
    pub f: Binary,
}

impl OpDef for Elementwise2 {
    const NAME: &'static str = "binary";

    fn mnemonic(&self) -> String {
        function_name(&self.f)
    }

    fn attributes(&self) -> Map<String, Value> {
        Map::new()
    }

    fn parse(name: &str, _: &Map<String, Value>) -> Option<Result<Self, String>> {
        function_named(name).map(|f| Ok(Self { f }))
    }

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [a, b] = operands(args)?;
        expect(a.dtype == b.dtype, || format!("operands must have one dtype, are {} and {}", a.dtype, b.dtype))?;
        const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
        let allowed: &[DType] = match self.f {
            Binary::And | Binary::Or => &[DType::Bool],
            Binary::Mod => &[DType::I64],
            Binary::Pow => &FLOATS,
            _ => &[DType::F32, DType::F16, DType::BF16, DType::I64],
        };
        expect(allowed.contains(&a.dtype), || format!("does not take {}", a.dtype))?;
        let dtype = if matches!(self.f, Binary::Eq | Binary::Lt | Binary::Le) { DType::Bool } else { a.dtype };
        Ok(vec![Type { dtype, shape: broadcast_shapes(&a.shape, &b.shape)? }])
    }

    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        let (a, b) = (&args[0], &args[1]);
        let floats = |f: fn(f32, f32) -> f32| Ok(Array::F32(broadcast2(a.f32()?, b.f32()?, f)?));
        let ints = |f: fn(i64, i64) -> i64| Ok::<_, String>(Array::I64(broadcast2(a.i64()?, b.i64()?, f)?));
        let nonzero = || {
            let zero = b.i64()?.iter().any(|v| *v == 0);
            expect(!zero, || format!("'{}' by zero", self.mnemonic()))
        };
        macro_rules! both {
            ($float:expr, $int:expr) => {
                if a.dtype() == DType::I64 { ints($int) } else { floats($float) }
            };
        }
        macro_rules! compare {
            ($float:expr, $int:expr) => {
                Ok(Array::Bool(if a.dtype() == DType::I64 {
                    broadcast2(a.i64()?, b.i64()?, $int)?
                } else {
                    broadcast2(a.f32()?, b.f32()?, $float)?
                }))
            };
        }
        let out: Result<Array, String> = match self.f {
            Binary::Add => both!(|a, b| a + b, i64::wrapping_add),
            Binary::Sub => both!(|a, b| a - b, i64::wrapping_sub),
            Binary::Mul => both!(|a, b| a * b, i64::wrapping_mul),
            Binary::Div if a.dtype() == DType::I64 => nonzero().and_then(|()| ints(floor_div)),
            Binary::Div => floats(|a, b| a / b),
            Binary::Mod => nonzero().and_then(|()| ints(|a, b| a.wrapping_sub(floor_div(a, b).wrapping_mul(b)))),
            Binary::Pow => floats(f32::powf),
            Binary::Min => both!(f32::min, i64::min),
            Binary::Max => both!(f32::max, i64::max),
            Binary::Eq => compare!(|a, b| a == b, |a, b| a == b),
            Binary::Lt => compare!(|a, b| a < b, |a, b| a < b),
            Binary::Le => compare!(|a, b| a <= b, |a, b| a <= b),
            Binary::And => Ok(Array::Bool(broadcast2(a.bool()?, b.bool()?, |a, b| a && b)?)),
            Binary::Or => Ok(Array::Bool(broadcast2(a.bool()?, b.bool()?, |a, b| a || b)?)),
        };
        Ok(vec![out?])
    }
}

/// Rounds towards minus infinity; `b` is not 0.
fn floor_div(a: i64, b: i64) -> i64 {
    let q = a.wrapping_div(b);
    if a.wrapping_rem(b) != 0 && (a < 0) != (b < 0) { q - 1 } else { q }
}

/// `condition bool`, `a`, `b` of one dtype: `a` where the condition holds, else `b`; NumPy broadcasting.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Select {}

impl OpDef for Select {
    const NAME: &'static str = "select";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [c, a, b] = operands(args)?;
        expect_dtype(c, DType::Bool, "condition")?;
        expect(a.dtype == b.dtype, || format!("operands must have one dtype, are {} and {}", a.dtype, b.dtype))?;
        Ok(vec![Type { dtype: a.dtype, shape: broadcast_shapes(&c.shape, &broadcast_shapes(&a.shape, &b.shape)?)? }])
    }

    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        let c = args[0].bool()?;
        Ok(vec![match (&args[1], &args[2]) {
            (Array::F32(a), Array::F32(b)) => {
                Array::F32(broadcast2(c, &broadcast2(a, b, |a, b| (a, b))?, |c, (a, b)| if c { a } else { b })?)
            }
            (Array::I64(a), Array::I64(b)) => {
                Array::I64(broadcast2(c, &broadcast2(a, b, |a, b| (a, b))?, |c, (a, b)| if c { a } else { b })?)
            }
            (Array::Bool(a), Array::Bool(b)) => {
                Array::Bool(broadcast2(c, &broadcast2(a, b, |a, b| (a, b))?, |c, (a, b)| if c { a } else { b })?)
            }
            _ => return Err("operands of two dtypes".into()),
        }])
    }
}

/// Conversion to another dtype. Float to integer truncates towards zero, to a narrower float rounds to nearest even.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cast {
    /// The result's.
    pub dtype: DType,
}

impl OpDef for Cast {
    const NAME: &'static str = "cast";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        let known = |d: DType| d.is_float() || matches!(d, DType::I64 | DType::Bool);
        expect(known(x.dtype) && known(self.dtype), || format!("no conversion from {} to {}", x.dtype, self.dtype))?;
        if self.dtype.is_float() && x.dtype.is_float() {
            expect_float(x, "operand")?;
        }
        Ok(vec![x.with_dtype(self.dtype)])
    }

    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        Ok(vec![match (&args[0], self.dtype) {
            (Array::F32(x), DType::F32) => Array::F32(x.clone()),
            (Array::F32(x), DType::F16) => Array::F32(x.mapv(|v| f16::from_f32(v).to_f32())),
            (Array::F32(x), DType::BF16) => Array::F32(x.mapv(|v| bf16::from_f32(v).to_f32())),
            (Array::F32(x), DType::I64) => Array::I64(x.mapv(|v| v as i64)),
            (Array::F32(x), DType::Bool) => Array::Bool(x.mapv(|v| v != 0.0)),
            (Array::I64(x), DType::I64) => Array::I64(x.clone()),
            (Array::I64(x), DType::Bool) => Array::Bool(x.mapv(|v| v != 0)),
            (Array::I64(x), d) if d.is_float() => {
                return Self { dtype: d }.eval(&[&Array::F32(x.mapv(|v| v as f32))], &Bindings::default());
            }
            (Array::Bool(x), DType::Bool) => Array::Bool(x.clone()),
            (Array::Bool(x), DType::I64) => Array::I64(x.mapv(i64::from)),
            (Array::Bool(x), _) => Array::F32(x.mapv(|v| f32::from(u8::from(v)))),
            (_, d) => return Err(format!("no conversion to {d}")),
        }])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_matches_tables() {
        // Abramowitz and Stegun, table 7.1.
        for (x, y) in [(0.0, 0.0), (0.5, 0.520_499_9), (1.0, 0.842_700_8), (2.0, 0.995_322_3), (3.5, 0.999_999_3), (-1.5, -0.966_105_1)] {
            assert!((erf(x) - y).abs() < 1e-7, "erf({x}) = {} instead of {y}", erf(x));
        }
    }

    #[test]
    fn integer_division_rounds_down() {
        for (a, b, q) in [(7, 2, 3), (-7, 2, -4), (7, -2, -4), (-7, -2, 3), (6, 3, 2), (-6, 3, -2)] {
            assert_eq!(floor_div(a, b), q, "{a} / {b}");
        }
    }
}
