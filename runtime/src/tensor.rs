//! Tensors at the boundary of an engine.

use crate::{Error, Result};
use std::sync::Arc;
use vlmc_artifact::DType;

/// A dense row-major tensor. Copies share its elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Arc<Data>,
}

/// Elements of a [`Tensor`].
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Data {
    F32(Vec<f32>),
    I64(Vec<i64>),
    Bool(Vec<bool>),
}

impl Data {
    /// Number of elements.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::Bool(v) => v.len(),
        }
    }
}

/// A type of elements.
pub(crate) trait Element: Copy {
    /// The elements, if they are of this type.
    fn elements(data: &mut Data) -> Option<&mut Vec<Self>>;
}

macro_rules! element {
    ($t:ty, $variant:ident) => {
        impl From<Vec<$t>> for Data {
            fn from(v: Vec<$t>) -> Self {
                Self::$variant(v)
            }
        }
        impl Element for $t {
            fn elements(data: &mut Data) -> Option<&mut Vec<Self>> {
                if let Data::$variant(v) = data { Some(v) } else { None }
            }
        }
    };
}
element!(f32, F32);
element!(i64, I64);
element!(bool, Bool);

impl Default for Tensor {
    /// Without elements.
    fn default() -> Self {
        Self { shape: vec![0], data: Arc::new(Data::F32(vec![])) }
    }
}

/// Whether a shape holds so many elements.
fn check(shape: &[usize], elements: usize) -> Result<()> {
    if shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)) == Some(elements) {
        return Ok(());
    }
    Err(Error::Input(format!("a tensor of shape {shape:?} cannot have {elements} elements")))
}

impl Tensor {
    /// # Errors
    /// [`Error::Input`] if the shape does not hold as many elements as `data`.
    pub fn new(shape: impl Into<Vec<usize>>, data: impl Into<Data>) -> Result<Self> {
        Self::checked(shape.into(), Arc::new(data.into()))
    }

    /// The same elements in another shape.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn reshaped(&self, shape: impl Into<Vec<usize>>) -> Result<Self> {
        Self::checked(shape.into(), self.data.clone())
    }

    /// Makes it a tensor of `values`, in the memory that it has if that holds such elements and is not shared.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(crate) fn fill<T: Element>(&mut self, shape: &[usize], values: impl Iterator<Item = T>) -> Result<()>
    where
        Data: From<Vec<T>>,
    {
        match Arc::get_mut(&mut self.data).and_then(T::elements) {
            Some(elements) => {
                elements.clear();
                elements.extend(values);
            }
            None => self.data = Arc::new(values.collect::<Vec<T>>().into()),
        }
        self.shape.clear();
        self.shape.extend_from_slice(shape);
        check(shape, self.data.len())
    }

    fn checked(shape: Vec<usize>, data: Arc<Data>) -> Result<Self> {
        check(&shape, data.len())?;
        Ok(Self { shape, data })
    }

    /// Shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match *self.data {
            Data::F32(_) => DType::F32,
            Data::I64(_) => DType::I64,
            Data::Bool(_) => DType::Bool,
        }
    }

    /// # Errors
    /// [`Error::Input`] if the elements are not `f32`.
    pub fn f32(&self) -> Result<&[f32]> {
        match &*self.data {
            Data::F32(v) => Ok(v),
            _ => Err(Error::Input(format!("expected a tensor of f32, got {}", self.dtype()))),
        }
    }

    /// # Errors
    /// [`Error::Input`] if the elements are not `i64`.
    pub fn i64(&self) -> Result<&[i64]> {
        match &*self.data {
            Data::I64(v) => Ok(v),
            _ => Err(Error::Input(format!("expected a tensor of i64, got {}", self.dtype()))),
        }
    }
}
