//! Backends: they write a verified, legalised program down, and obey the target's table.

pub mod native;
pub mod onnx;
mod weights;

pub(crate) use weights::write;

use crate::{Error, Result, weights_writer::TensorSpec};
use vlmc_artifact::{program::PANEL, quant};
use vlmc_ir::{DType, weights::WeightDef};

/// Where the bytes of a stored weight are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// File of the artifact.
    pub file: String,
    /// Offset in it, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

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
    /// Of a quantized matrix: [`vlmc_artifact::program::Layout::Planes16`].
    Planes,
    /// Of a quantized matrix `[n, k]`, or each of a stack of them, as ONNX Runtime's MatMulNBits and QMoE want it, in blocks of that
    /// many columns: three tensors, of the weight's name and `.codes` (`u8[n, blocks, bytes]`, low half first), `.scales`
    /// (`[n, blocks]`, of the type given), and `.zeros` (`u8[n, bytes]`, packed along the blocks) if it has zero points.
    Blocks(DType, usize),
    /// Of a quantized matrix `[n, k]` without zero points, as DequantizeLinear wants it: two tensors, of the weight's name and
    /// `.codes` (`i8[n, k]`, or of 4 bits `u8[n, k / 2]`, low half first), which are signed, and `.scales` (`[n, groups]`, or `[n]`
    /// for whole rows, of the type given).
    Signed(DType),
}

impl Stored {
    /// Names, element types and shapes in the file.
    ///
    /// # Errors
    /// The weight cannot be stored so.
    pub(crate) fn specs(&self, def: &WeightDef) -> Result<Vec<TensorSpec>> {
        let one = |dtype, shape| vec![TensorSpec { name: self.name.clone(), dtype, shape }];
        let unfit = || Error::tensor(&self.weight, format!("of type {}{:?} cannot be stored as {:?}", def.dtype, def.shape, self.layout));
        Ok(match (self.layout, def.shape.as_slice(), def.dtype) {
            (Layout::Planes, [n, k], DType::Quant(scheme)) => {
                let planes = quant::plane_bytes(scheme, *k).ok_or_else(unfit)?;
                one(DType::U8, vec![n.div_ceil(PANEL), planes.iter().sum()])
            }
            (Layout::Panels, [lead @ .., n, k], DType::Quant(scheme)) => {
                let bytes = quant::panel_bytes(scheme, *k).ok_or_else(unfit)?;
                one(DType::U8, [lead, &[n.div_ceil(PANEL), bytes]].concat())
            }
            (Layout::Signed(float), [n, k], DType::Quant(scheme)) => {
                let spec = |part, dtype, shape| TensorSpec { name: format!("{}.{part}", self.name), dtype, shape };
                let codes = match scheme.bits {
                    4 => spec("codes", DType::U8, vec![*n, k / 2]),
                    _ => spec("codes", DType::I8, vec![*n, *k]),
                };
                let scales = if scheme.group.is_some() { vec![*n, scheme.groups(*k)] } else { vec![*n] };
                vec![codes, spec("scales", float, scales)]
            }
            (Layout::Blocks(float, block), [rows @ .., k], DType::Quant(scheme)) => {
                let (blocks, bits) = (k.div_ceil(block), usize::from(scheme.bits));
                let shape = |row: &[usize]| [rows, row].concat();
                let mut parts = vec![("codes", DType::U8, shape(&[blocks, block * bits / 8])), ("scales", float, shape(&[blocks]))];
                if scheme.zero_points {
                    parts.push(("zeros", DType::U8, shape(&[(blocks * bits).div_ceil(8)])));
                }
                let name = |part| format!("{}.{part}", self.name);
                parts.into_iter().map(|(part, dtype, shape)| TensorSpec { name: name(part), dtype, shape }).collect()
            }
            (_, _, DType::Quant(_)) => return Err(unfit()),
            (Layout::Transposed, [n, k], dtype) => one(dtype, vec![*k, *n]),
            (Layout::Panels, [n, k], dtype) => one(dtype, vec![n.div_ceil(PANEL), *k, PANEL]),
            (Layout::Panels, [e, n, k], dtype) => one(dtype, vec![*e, n.div_ceil(PANEL), *k, PANEL]),
            (_, shape, dtype) => one(dtype, shape.to_vec()),
        })
    }
}
