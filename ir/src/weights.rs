//! Weights as recipes: how a weight's elements follow from checkpoint tensors. No bytes are held here; the backends pull
//! them through in tiles of rows when they write an artifact.

use crate::DType;
use serde::{Deserialize, Serialize};

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
}

impl Recipe {
    /// Names of the checkpoint tensors that go into it.
    pub fn sources(&self) -> Vec<&str> {
        match self {
            Self::Source(name) => vec![name],
            Self::Reshape(inner, _) | Self::Cast(inner, _) | Self::Transpose(inner, _) => inner.sources(),
            Self::Concat(parts) => parts.iter().flat_map(Self::sources).collect(),
        }
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

    /// The same weight in another float type.
    pub fn cast(&self, dtype: DType) -> Self {
        if self.dtype == dtype {
            return self.clone();
        }
        Self { dtype, shape: self.shape.clone(), recipe: Recipe::Cast(Box::new(self.recipe.clone()), dtype) }
    }
}
