//! Types of values, and literal values.

use crate::{DType, Dim};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Element type and shape. Prints as `f32[batch, seq, 1536]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Type {
    /// Element type.
    pub dtype: DType,
    /// One dim per axis; empty for a scalar.
    pub shape: Vec<Dim>,
}

impl Type {
    /// A type from anything that converts to dims.
    pub fn new<D: Into<Dim>>(dtype: DType, shape: impl IntoIterator<Item = D>) -> Self {
        Self { dtype, shape: shape.into_iter().map(Into::into).collect() }
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements.
    pub fn elements(&self) -> Dim {
        elements(&self.shape)
    }

    /// The same shape with another element type.
    pub fn with_dtype(&self, dtype: DType) -> Self {
        Self { dtype, shape: self.shape.clone() }
    }

    /// The last dim, or an error for a scalar.
    pub(crate) fn last(&self) -> Result<&Dim, String> {
        self.shape.last().ok_or_else(|| "needs at least one axis".into())
    }
}

/// Product of dims.
pub(crate) fn elements(shape: &[Dim]) -> Dim {
    shape.iter().fold(Dim::from(1), |n, d| &n * d)
}

pub(crate) struct Shape<'a>(pub(crate) &'a [Dim]);

impl fmt::Display for Shape<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, d) in self.0.iter().enumerate() {
            write!(f, "{}{d}", if i > 0 { ", " } else { "" })?;
        }
        f.write_str("]")
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.dtype, Shape(&self.shape))
    }
}

/// A value known at compile time. Prints as `f32(0.5)` or `i64[3](0, 1, 1)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Literal {
    /// `f32`, `i64` or `bool`.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<usize>,
    /// Elements, row-major; integers are exact up to 2^53.
    pub data: Vec<f64>,
}

impl Literal {
    /// A scalar.
    pub fn scalar(dtype: DType, v: f64) -> Self {
        Self { dtype, shape: vec![], data: vec![v] }
    }

    /// A vector.
    pub fn vector(dtype: DType, data: Vec<f64>) -> Self {
        Self { dtype, shape: vec![data.len()], data }
    }

    /// Its type.
    pub fn ty(&self) -> Type {
        Type::new(self.dtype, self.shape.iter().copied())
    }
}

impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dtype)?;
        if !self.shape.is_empty() {
            write!(f, "{:?}", self.shape)?;
        }
        f.write_str("(")?;
        for (i, v) in self.data.iter().enumerate() {
            write!(f, "{}{}", if i > 0 { ", " } else { "" }, Element(*v))?;
        }
        f.write_str(")")
    }
}

/// An element of a literal: the shortest digits that give the number back, with an exponent if it is tiny or huge.
pub(crate) struct Element(pub(crate) f64);

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:?}", self.0);
        f.write_str(text.strip_suffix(".0").unwrap_or(&text))
    }
}
