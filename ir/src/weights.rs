//! Weights as recipes: how a weight's elements follow from checkpoint tensors. No bytes are held here; the backends pull
//! them through in tiles of rows when they write an artifact.

use crate::DType;
use serde::{Deserialize, Serialize};
use vlmc_artifact::{Scheme, quant::Method};

/// How the elements of a weight follow from checkpoint tensors. All steps but [`Recipe::Transpose`] keep "row `r`
/// needs a known range of source rows", so that any range of rows can be made on its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recipe {
    /// A checkpoint tensor as it is.
    Source(String),
    /// Another shape, same elements; the number of rows (first axis) is the same or a divisor of it.
    Reshape(Box<Recipe>, Vec<usize>),
    /// Conversion to another float type, rounding to nearest even.
    Cast(Box<Recipe>, DType),
    /// Of a matrix of that many rows, its transpose; the whole matrix is read for any row, so it should be small.
    Transpose(Box<Recipe>, usize),
    /// Recipes with equal row shapes, one after the other along the first axis.
    Concat(Vec<Recipe>),
    /// Stacks of matrices of that many rows and of equal shapes, as one stack of matrices with more rows: the first row of each, the
    /// second of each, and so on.
    Interleave(Vec<Recipe>, usize),
    /// Multiplied along the last axis by a tensor of that length.
    Scale(Box<Recipe>, String),
    /// Codes for the numbers of the inner recipe, found row by row of the last axis. Only in a weight of that quantized type,
    /// at the top or in a `Concat` or `Interleave` there.
    Quantize(Box<Recipe>, Scheme, Method),
    /// Codes that were found before: checkpoint tensors of that name and `.codes` (`u8`, of the weight's shape), `.scales` (`f32`,
    /// of its rows and their groups) and `.zeros` (`u8`, as the scales). Only where `Quantize` may stand.
    Codes(String, Scheme),
}

impl Recipe {
    /// Names of the checkpoint tensors that go into it.
    pub fn sources(&self) -> Vec<&str> {
        match self {
            Self::Source(name) | Self::Codes(name, _) => vec![name],
            Self::Reshape(inner, _) | Self::Cast(inner, _) | Self::Transpose(inner, _) | Self::Quantize(inner, ..) => inner.sources(),
            Self::Scale(inner, by) => [inner.sources(), vec![by]].concat(),
            Self::Concat(parts) | Self::Interleave(parts, _) => parts.iter().flat_map(Self::sources).collect(),
        }
    }

    /// The same with other names of sources, or what was wrong with one; in the order of [`Self::sources`].
    ///
    /// # Errors
    /// What `f` said.
    pub fn map_sources<E>(&self, f: &mut impl FnMut(&str) -> Result<String, E>) -> Result<Self, E> {
        let all = |parts: &[Recipe], f: &mut _| parts.iter().map(|p| p.map_sources(f)).collect::<Result<_, _>>();
        let mut boxed = |r: &Recipe| r.map_sources(f).map(Box::new);
        Ok(match self {
            Self::Reshape(inner, shape) => Self::Reshape(boxed(inner)?, shape.clone()),
            Self::Cast(inner, dtype) => Self::Cast(boxed(inner)?, *dtype),
            Self::Transpose(inner, rows) => Self::Transpose(boxed(inner)?, *rows),
            Self::Quantize(inner, scheme, method) => Self::Quantize(boxed(inner)?, *scheme, *method),
            Self::Scale(inner, by) => Self::Scale(boxed(inner)?, f(by)?),
            Self::Concat(parts) => Self::Concat(all(parts, f)?),
            Self::Interleave(parts, rows) => Self::Interleave(all(parts, f)?, *rows),
            Self::Source(name) => Self::Source(f(name)?),
            Self::Codes(name, scheme) => Self::Codes(f(name)?, *scheme),
        })
    }
}

/// A weight of a program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightDef {
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<usize>,
    /// Where its elements come from.
    pub recipe: Recipe,
}

impl WeightDef {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|d| *d as u64).product()
    }

    /// The checkpoint tensor whose bytes are the weight's, if it is of the weight's own type: nothing is done to it but to change its
    /// shape, and to convert it to a type that holds it exactly and back.
    pub fn untouched(&self) -> Option<&str> {
        let mut recipe = &self.recipe;
        loop {
            recipe = match recipe {
                Recipe::Source(name) => return Some(name),
                Recipe::Reshape(inner, _) => inner,
                Recipe::Cast(inner, to) if *to == DType::F32 || *to == self.dtype => inner,
                _ => return None,
            };
        }
    }

    /// The same weight in another float type.
    pub fn cast(&self, dtype: DType) -> Self {
        if self.dtype == dtype {
            return self.clone();
        }
        Self { dtype, shape: self.shape.clone(), recipe: Recipe::Cast(Box::new(self.recipe.clone()), dtype) }
    }

    /// The same weight, quantized.
    pub fn quantize(&self, scheme: Scheme, method: Method) -> Self {
        let recipe = Recipe::Quantize(Box::new(self.recipe.clone()), scheme, method);
        Self { dtype: DType::Quant(scheme), shape: self.shape.clone(), recipe }
    }
}
