//! Backends: they write a verified, legalised program down, and obey the target's table.

pub mod native;
pub mod onnx;
mod weights;

pub(crate) use weights::write;

use crate::weights_writer::TensorSpec;
use vlmc_artifact::program::PANEL;
use vlmc_ir::weights::WeightDef;

/// A weight as it lies in the weight file of an artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Name in the weight file.
    pub name: String,
    /// Name in the program.
    pub weight: String,
    /// Order of the elements.
    pub layout: Layout,
}

/// Order of the elements of a stored weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Layout {
    /// Row-major, as in the program.
    Rows,
    /// Of a matrix `[n, k]`: row-major `[k, n]`.
    Transposed,
    /// Of a matrix, or each of a stack of them: [`vlmc_artifact::program::Layout::Panel16`].
    Panels,
}

impl Stored {
    /// Name, element type and shape in the file.
    pub(crate) fn spec(&self, def: &WeightDef) -> TensorSpec {
        let shape = match (self.layout, def.shape.as_slice()) {
            (Layout::Transposed, [n, k]) => vec![*k, *n],
            (Layout::Panels, [n, k]) => vec![n.div_ceil(PANEL), *k, PANEL],
            (Layout::Panels, [e, n, k]) => vec![*e, n.div_ceil(PANEL), *k, PANEL],
            _ => def.shape.clone(),
        };
        TensorSpec { name: self.name.clone(), dtype: def.dtype, shape }
    }
}
