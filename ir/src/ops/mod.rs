//! All ops. An op is a struct of its attributes in one of the files below, with its type rule ([`OpDef::infer`]) and its
//! meaning: [`OpDef::eval`] if it is a primitive, [`OpDef::decompose`] into smaller ops if it is a composite. The text form
//! prints and parses attributes through serde, so that a new op needs its struct, its `impl OpDef` and one line in `ops!`.

mod attention;
mod elementwise;
mod image;
mod matrix;
mod moe;
mod norm;
mod positions;
mod shape;
mod tiles;

pub use attention::{
    Append, Attention, GroupQueryAttention, Mask, MergeHeads, MergedRotary, MultiHeadAttention, PackedAttention, Rotary, RotaryAttention,
    SplitHeads, causal_mask, segment_mask,
};
pub use elementwise::{Cast, Elementwise1, Elementwise2, Gated, Select};
pub use image::{Conv2d, Filter, ResizeWeights};
pub use matrix::{Embedding, FakeQuantize, Linear, MatMul, MergeFeatures};
pub use moe::{Moe, Route, RoutedMoe, TopK, shares};
pub use norm::{AddLayerNorm, AddRmsNorm, BatchNorm, LayerNorm, RmsNorm};
pub use positions::{GridPositions, LogN, Mrope, NtkRope, Rope, RopeScaling, Rotary2d, StretchedPositions, WindowOrder};
pub use shape::{Broadcast, Concat, CumSum, DimValue, Gather, Iota, ReduceOp, Reshape, Slice, Transpose};
pub use tiles::{GridRelative, TileRows};

use crate::{Bindings, Builder, DType, Dim, Type, Val, interp::Array};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// What every op defines.
pub trait OpDef: Serialize + DeserializeOwned {
    /// Name in the text form. Ops that are one of a family (`add`, `mul`) override [`Self::mnemonic`] and [`Self::parse`].
    const NAME: &'static str;

    /// Operands that may be states, with the results that are the states' next values.
    const APPENDS: &'static [(usize, usize)] = &[];

    /// Types of the results for operands of types `args`. An op that computes with `f32` may take `f16` or `bf16` instead, for all
    /// operands but weights: its results then have that type, and are those of `f32`, rounded.
    ///
    /// # Errors
    /// Why the op does not accept them.
    fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String>;

    /// Meaning of a composite in smaller ops: the values of its results. `None` for a primitive.
    fn decompose<'g>(&self, _g: &'g Builder<'g>, _args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
        None
    }

    /// Meaning of a primitive: its results for operands that fit the type rule. Float types compute in `f32`.
    ///
    /// # Errors
    /// Values that have no meaning: an index out of range, a division by zero.
    fn eval(&self, _args: &[&Array], _symbols: &Bindings) -> Result<Vec<Array>, String> {
        Err(format!("'{}' has no meaning of its own, only a decomposition", self.mnemonic()))
    }

    /// Name of this op in the text form.
    fn mnemonic(&self) -> String {
        Self::NAME.into()
    }

    /// Attributes as the text form shows them.
    fn attributes(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(m)) => m,
            _ => Map::new(),
        }
    }

    /// The op of that name with these attributes; `None` if the name is another op's.
    fn parse(name: &str, attributes: &Map<String, Value>) -> Option<Result<Self, String>> {
        (name == Self::NAME).then(|| serde_json::from_value(Value::Object(attributes.clone())).map_err(|e| e.to_string()))
    }
}

macro_rules! ops {
    ($($Op:ident),* $(,)?) => {
        /// An op with its attributes.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs)]
        pub enum Op {
            $($Op($Op),)*
        }

        $(impl From<$Op> for Op {
            fn from(op: $Op) -> Self {
                Self::$Op(op)
            }
        })*

        impl Op {
            /// Name in the text form.
            pub fn name(&self) -> String {
                match self { $(Self::$Op(op) => op.mnemonic(),)* }
            }

            /// See [`OpDef::attributes`].
            pub fn attributes(&self) -> Map<String, Value> {
                match self { $(Self::$Op(op) => op.attributes(),)* }
            }

            /// The op of that name with these attributes.
            ///
            /// # Errors
            /// No op has the name, or it has other attributes.
            pub fn parse(name: &str, attributes: &Map<String, Value>) -> Result<Self, String> {
                $(if let Some(op) = $Op::parse(name, attributes) {
                    return op.map(Self::$Op).map_err(|e| format!("{name}: {e}"));
                })*
                Err(format!("unknown op '{name}'"))
            }

            /// See [`OpDef::infer`].
            ///
            /// # Errors
            /// Why the op does not accept the operands.
            pub fn infer(&self, args: &[Type]) -> Result<Vec<Type>, String> {
                match self { $(Self::$Op(op) => op.infer(args),)* }
            }

            /// See [`OpDef::APPENDS`].
            pub fn appends(&self) -> &'static [(usize, usize)] {
                match self { $(Self::$Op(_) => $Op::APPENDS,)* }
            }

            /// See [`OpDef::decompose`].
            pub fn decompose<'g>(&self, g: &'g Builder<'g>, args: &[Val<'g>]) -> Option<Vec<Val<'g>>> {
                match self { $(Self::$Op(op) => op.decompose(g, args),)* }
            }

            /// See [`OpDef::eval`].
            ///
            /// # Errors
            /// Values that have no meaning, and composites.
            pub fn eval(&self, args: &[&Array], symbols: &Bindings) -> Result<Vec<Array>, String> {
                match self { $(Self::$Op(op) => op.eval(args, symbols),)* }
            }
        }
    };
}

ops! {
    // Primitives.
    Elementwise1, Elementwise2, Select, Cast,
    Iota, DimValue, Reshape, Transpose, Broadcast, Concat, Slice, Gather, ReduceOp, CumSum,
    MatMul, Append, TopK,
    // Composites.
    Linear, Embedding, MergeFeatures, LayerNorm, RmsNorm,
    SplitHeads, MergeHeads, Rotary, Attention,
    GridPositions, Rotary2d, Mrope, Rope, StretchedPositions, WindowOrder, NtkRope, LogN,
    Conv2d, ResizeWeights, BatchNorm, Moe, Route, TileRows, GridRelative,
    // Composites that no frontend writes: passes make them of the ones above.
    Gated, AddLayerNorm, AddRmsNorm, RotaryAttention, PackedAttention, MergedRotary, MultiHeadAttention, GroupQueryAttention,
    RoutedMoe, FakeQuantize,
}

// What type rules share.

/// The operands, if there are `N` of them.
fn operands<const N: usize>(args: &[Type]) -> Result<&[Type; N], String> {
    args.try_into().map_err(|_| format!("takes {N} operands, got {}", args.len()))
}

fn expect(holds: bool, message: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(message()) }
}

fn expect_dtype(t: &Type, dtype: DType, what: &str) -> Result<(), String> {
    expect(t.dtype == dtype, || format!("{what} must be {dtype}, is {}", t.dtype))
}

fn expect_float(t: &Type, what: &str) -> Result<(), String> {
    expect(t.dtype.is_float(), || format!("{what} must be f32, f16 or bf16, is {}", t.dtype))
}

/// Numbers that are computed with: floats that are not packed.
fn expect_number(t: &Type, what: &str) -> Result<(), String> {
    expect(t.dtype.is_float() && t.dtype.scheme().is_none(), || format!("{what} must be f32, f16 or bf16, is {}", t.dtype))
}

fn expect_rank(t: &Type, at_least: usize, what: &str) -> Result<(), String> {
    expect(t.rank() >= at_least, || format!("{what} needs at least {at_least} axes, has {}", t.rank()))
}

fn expect_shape(t: &Type, shape: &[Dim], what: &str) -> Result<(), String> {
    let wanted = || Type { dtype: t.dtype, shape: shape.into() };
    expect(t.shape == shape, || format!("{what} must be {}, is {t}", wanted()))
}

/// NumPy broadcasting of two shapes. Dims must be equal, or one of them 1, whatever the symbols' values.
pub(crate) fn broadcast_shapes(a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>, String> {
    let rank = a.len().max(b.len());
    let one = Dim::from(1);
    let at = |s: &[Dim], i: usize| (i + s.len()).checked_sub(rank).map_or(one.clone(), |i| s[i].clone());
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y || y == one => Ok(x),
            (x, y) if x == one => Ok(y),
            (x, y) => Err(format!("dims {x} and {y} do not broadcast")),
        })
        .collect()
}
