//! Indices, reductions, and ops that move elements.

use super::{OpDef, broadcast_shapes, expect, expect_dtype, expect_rank, operands};
use crate::{
    Bindings, DType, Dim, Type,
    interp::{Array, extents},
    types::elements,
};
use ndarray::{ArrayD, Axis};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use vlmc_artifact::program::Reduce;

/// `f` applied to the array inside, whatever its element type; the result has the same element type.
macro_rules! any {
    ($array:expr, $x:ident => $f:expr) => {
        match $array {
            Array::F32($x) => Array::F32($f),
            Array::I64($x) => Array::I64($f),
            Array::Bool($x) => Array::Bool($f),
        }
    };
}

fn expect_axis(t: &Type, axis: usize) -> Result<(), String> {
    expect(axis < t.rank(), || format!("axis {axis} of {t} does not exist"))
}

/// `i64[len]` = 0, 1, ...
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Iota {
    /// Number of elements.
    pub len: Dim,
}

impl OpDef for Iota {
    const NAME: &'static str = "iota";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [] = operands(args)?;
        Ok(vec![Type::new(DType::I64, [&self.len])])
    }

    fn eval(&self, _: &[&Array], symbols: &Bindings) -> Result<Vec<Array>, String> {
        let len = extents(std::slice::from_ref(&self.len), symbols)?;
        Ok(vec![Array::I64(ndarray::Array1::from_iter(0..len[0] as i64).into_dyn())])
    }
}

/// The value of a dim as `i64[]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DimValue {
    /// The dim.
    pub dim: Dim,
}

impl OpDef for DimValue {
    const NAME: &'static str = "dim";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [] = operands(args)?;
        Ok(vec![Type { dtype: DType::I64, shape: vec![] }])
    }

    fn eval(&self, _: &[&Array], symbols: &Bindings) -> Result<Vec<Array>, String> {
        let value = self.dim.eval(symbols).map_err(|e| e.to_string())?;
        Ok(vec![Array::I64(ndarray::arr0(value).into_dyn())])
    }
}

/// Same elements in row-major order, another shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reshape {
    /// The result's.
    pub shape: Vec<Dim>,
}

impl OpDef for Reshape {
    const NAME: &'static str = "reshape";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        let (from, to) = (x.elements(), elements(&self.shape));
        expect(from == to, || format!("operand has {from} elements, the new shape {to}"))?;
        Ok(vec![Type { dtype: x.dtype, shape: self.shape.clone() }])
    }

    fn eval(&self, args: &[&Array], symbols: &Bindings) -> Result<Vec<Array>, String> {
        let shape = extents(&self.shape, symbols)?;
        Ok(vec![any!(&args[0], x => x.to_shape(shape).map_err(|e| e.to_string())?.to_owned())])
    }
}

/// Axis `i` of the result is axis `perm[i]` of the operand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Transpose {
    /// A permutation of the axes.
    pub perm: Vec<usize>,
}

impl OpDef for Transpose {
    const NAME: &'static str = "transpose";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        let mut sorted = self.perm.clone();
        sorted.sort_unstable();
        expect(sorted.into_iter().eq(0..x.rank()), || format!("{:?} is not a permutation of the axes of {x}", self.perm))?;
        Ok(vec![Type { dtype: x.dtype, shape: self.perm.iter().map(|p| x.shape[*p].clone()).collect() }])
    }

    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        Ok(vec![any!(&args[0], x => x.view().permuted_axes(self.perm.as_slice()).as_standard_layout().into_owned())])
    }
}

/// NumPy broadcast to a shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Broadcast {
    /// The result's.
    pub shape: Vec<Dim>,
}

impl OpDef for Broadcast {
    const NAME: &'static str = "broadcast";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        let fits = broadcast_shapes(&x.shape, &self.shape)? == self.shape;
        expect(fits, || "operand has larger dims than the new shape".into())?;
        Ok(vec![Type { dtype: x.dtype, shape: self.shape.clone() }])
    }

    fn eval(&self, args: &[&Array], symbols: &Bindings) -> Result<Vec<Array>, String> {
        let shape = extents(&self.shape, symbols)?;
        Ok(vec![any!(&args[0], x => x.broadcast(shape).ok_or("shapes do not broadcast")?.to_owned())])
    }
}

/// Operands joined along an axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Concat {
    /// The axis.
    pub axis: usize,
}

impl OpDef for Concat {
    const NAME: &'static str = "concat";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let first = args.first().ok_or("takes at least one operand")?;
        expect_axis(first, self.axis)?;
        let mut out = first.clone();
        for t in &args[1..] {
            let same = t.dtype == first.dtype
                && t.rank() == first.rank()
                && t.shape.iter().zip(&first.shape).enumerate().all(|(i, (a, b))| i == self.axis || a == b);
            expect(same, || format!("{first} and {t} differ outside axis {}", self.axis))?;
            out.shape[self.axis] = &out.shape[self.axis] + &t.shape[self.axis];
        }
        Ok(vec![out])
    }

    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        macro_rules! join {
            ($get:ident, $kind:ident) => {{
                let views = args.iter().map(|a| Ok(a.$get()?.view())).collect::<Result<Vec<_>, String>>()?;
                Array::$kind(ndarray::concatenate(Axis(self.axis), &views).map_err(|e| e.to_string())?)
            }};
        }
        Ok(vec![match &args[0] {
            Array::F32(_) => join!(f32, F32),
            Array::I64(_) => join!(i64, I64),
            Array::Bool(_) => join!(bool, Bool),
        }])
    }
}

/// `len` elements of an axis from `start`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slice {
    /// The axis.
    pub axis: usize,
    /// First element.
    pub start: Dim,
    /// Number of elements.
    pub len: Dim,
}

impl OpDef for Slice {
    const NAME: &'static str = "slice";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        expect_axis(x, self.axis)?;
        let end = &self.start + &self.len;
        let room = &x.shape[self.axis] - &end;
        let negative = |d: &Dim| d.as_const().is_some_and(|v| v < 0);
        let outside = negative(&room) || negative(&self.start) || negative(&self.len);
        expect(!outside, || format!("elements {}..{end} of an axis of {}", self.start, x.shape[self.axis]))?;
        let mut out = x.clone();
        out.shape[self.axis] = self.len.clone();
        Ok(vec![out])
    }

    fn eval(&self, args: &[&Array], symbols: &Bindings) -> Result<Vec<Array>, String> {
        let bounds = extents(&[self.start.clone(), self.len.clone()], symbols)?;
        let (start, end) = (bounds[0], bounds[0].saturating_add(bounds[1]));
        let have = args[0].shape()[self.axis];
        expect(end <= have, || format!("elements {start}..{end} of an axis of {have}"))?;
        Ok(vec![any!(&args[0], x => x.slice_axis(Axis(self.axis), (start..end).into()).to_owned())])
    }
}

/// `data`, `index i64[...]`: `data` with `axis` replaced by the index's axes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gather {
    /// The axis.
    pub axis: usize,
}

impl OpDef for Gather {
    const NAME: &'static str = "gather";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [data, index] = operands(args)?;
        expect_axis(data, self.axis)?;
        expect_dtype(index, DType::I64, "index")?;
        let mut shape = data.shape.clone();
        shape.splice(self.axis..=self.axis, index.shape.iter().cloned());
        Ok(vec![Type { dtype: data.dtype, shape }])
    }

    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        let index = args[1].i64()?;
        let len = args[0].shape()[self.axis];
        let flat: Vec<usize> = index
            .iter()
            .map(|i| usize::try_from(*i).ok().filter(|i| *i < len).ok_or_else(|| format!("index {i} of an axis of {len}")))
            .collect::<Result<_, _>>()?;
        let mut shape = args[0].shape().to_vec();
        shape.splice(self.axis..=self.axis, index.shape().iter().copied());
        Ok(vec![any!(&args[0], x => x.select(Axis(self.axis), &flat).to_shape(shape).map_err(|e| e.to_string())?.to_owned())])
    }
}

/// Reduction over axes, which leave the shape. Named `reduce_sum`, `reduce_mean`, `reduce_max`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReduceOp {
    /// The function; `mean` for floats only.
    #[serde(skip, default = "sum")]
    pub f: Reduce,
    /// Sorted axes.
    pub axes: Vec<usize>,
}

fn sum() -> Reduce {
    Reduce::Sum
}

impl OpDef for ReduceOp {
    const NAME: &'static str = "reduce";

    fn mnemonic(&self) -> String {
        match self.f {
            Reduce::Sum => "reduce_sum",
            Reduce::Mean => "reduce_mean",
            Reduce::Max => "reduce_max",
        }
        .into()
    }

    fn parse(name: &str, attributes: &Map<String, Value>) -> Option<Result<Self, String>> {
        let f = match name {
            "reduce_sum" => Reduce::Sum,
            "reduce_mean" => Reduce::Mean,
            "reduce_max" => Reduce::Max,
            _ => return None,
        };
        let op = serde_json::from_value::<Self>(Value::Object(attributes.clone())).map_err(|e| e.to_string());
        Some(op.map(|op| Self { f, ..op }))
    }

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        let float_only = self.f == Reduce::Mean;
        expect(x.dtype == DType::F32 || (x.dtype == DType::I64 && !float_only), || format!("does not take {}", x.dtype))?;
        expect(self.axes.is_sorted_by(|a, b| a < b), || "axes must be sorted".into())?;
        self.axes.iter().try_for_each(|a| expect_axis(x, *a))?;
        let shape = x.shape.iter().enumerate().filter(|(i, _)| !self.axes.contains(i)).map(|(_, d)| d.clone()).collect();
        Ok(vec![Type { dtype: x.dtype, shape }])
    }

    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        let count: usize = self.axes.iter().map(|a| args[0].shape()[*a]).product();
        let defined = match self.f {
            Reduce::Sum => true,
            // Of no floats it is -inf.
            Reduce::Max => count > 0 || args[0].dtype() == DType::F32,
            Reduce::Mean => count > 0,
        };
        expect(defined, || format!("'{}' of no elements", self.mnemonic()))?;
        fn fold<T: Clone>(x: &ArrayD<T>, axes: &[usize], init: T, f: fn(&T, &T) -> T) -> ArrayD<T> {
            axes.iter().rev().fold(x.clone(), |x, a| x.fold_axis(Axis(*a), init.clone(), f))
        }
        Ok(vec![match (&args[0], self.f) {
            (Array::F32(x), Reduce::Sum) => Array::F32(fold(x, &self.axes, 0.0, |a, b| a + b)),
            (Array::F32(x), Reduce::Mean) => Array::F32(fold(x, &self.axes, 0.0, |a, b| a + b) / count as f32),
            (Array::F32(x), Reduce::Max) => Array::F32(fold(x, &self.axes, f32::NEG_INFINITY, |a, b| a.max(*b))),
            (Array::I64(x), Reduce::Sum) => Array::I64(fold(x, &self.axes, 0, |a, b| a.wrapping_add(*b))),
            (Array::I64(x), Reduce::Max) => Array::I64(fold(x, &self.axes, i64::MIN, |a, b| *a.max(b))),
            (x, _) => return Err(format!("does not take {}", x.dtype())),
        }])
    }
}

/// Running sum along an axis, including the element itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CumSum {
    /// The axis.
    pub axis: usize,
}

impl OpDef for CumSum {
    const NAME: &'static str = "cumsum";

    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
        let [x] = operands(args)?;
        expect_rank(x, self.axis + 1, "operand")?;
        expect(matches!(x.dtype, DType::F32 | DType::I64), || format!("does not take {}", x.dtype))?;
        Ok(vec![x.clone()])
    }

    fn eval(&self, args: &[&Array], _: &Bindings) -> Result<Vec<Array>, String> {
        let mut out = args[0].clone();
        match &mut out {
            Array::F32(x) => x.accumulate_axis_inplace(Axis(self.axis), |a, b| *b += a),
            Array::I64(x) => x.accumulate_axis_inplace(Axis(self.axis), |a, b| *b = b.wrapping_add(*a)),
            Array::Bool(_) => return Err("does not take bool".into()),
        }
        Ok(vec![out])
    }
}
