//! The weight file of a `cpu` artifact, mapped into memory.

use crate::{Error, Result};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use std::{fs::File, ops::Range, path::Path};
use vlmc_artifact::{
    DType,
    program::{Layout, PANEL, Weight},
};
use vlmc_kernels::Floats;

/// Weights of a program, in its order.
pub(super) struct Weights {
    map: Mmap,
    tensors: Vec<Tensor>,
}

struct Tensor {
    name: String,
    range: Range<usize>,
    dtype: DType,
    layout: Layout,
}

impl Weights {
    /// Maps the file and finds the program's weights in it.
    ///
    /// The file must not be changed while it is mapped: the operating system would show the change, or end the process if the
    /// file became shorter. Artifacts are replaced by renaming a new directory into place, which leaves mapped files alone.
    #[allow(unsafe_code)]
    pub(super) fn open(path: &Path, weights: &[Weight]) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the bytes are read as plain numbers, of which any are valid; a change of the file by others is excluded by
        // the contract above.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| Error::file(path, format!("is not a safetensors file: {e}")))?;
        let data = header + 8;
        let tensors = weights
            .iter()
            .map(|w| {
                let info = metadata.info(&w.name).ok_or_else(|| Error::file(path, format!("has no tensor '{}'", w.name)))?;
                let wrong = |what: String| Error::file(path, format!("tensor '{}' {what}", w.name));
                let dtype = match info.dtype {
                    Dtype::F32 => DType::F32,
                    Dtype::F16 => DType::F16,
                    Dtype::BF16 => DType::BF16,
                    other => return Err(wrong(format!("has type {other:?}, which is not supported"))),
                };
                let shape = match (w.layout, w.shape.as_slice()) {
                    (Layout::Rows, shape) => shape.to_vec(),
                    (Layout::Panel16, [n, k]) => vec![n.div_ceil(PANEL), *k, PANEL],
                    (Layout::Panel16, [e, n, k]) => vec![*e, n.div_ceil(PANEL), *k, PANEL],
                    (Layout::Panel16, shape) => return Err(wrong(format!("of shape {shape:?} cannot be in panels"))),
                };
                if dtype != w.dtype || info.shape != shape {
                    return Err(wrong(format!("is {dtype}{:?}, the program wants {}{shape:?}", info.shape, w.dtype)));
                }
                let range = data + info.data_offsets.0..data + info.data_offsets.1;
                // A map begins at a page.
                if !range.start.is_multiple_of(dtype.size()) {
                    return Err(wrong(format!("starts at byte {}, which is not aligned", range.start)));
                }
                Ok(Tensor { name: w.name.clone(), range, dtype, layout: w.layout })
            })
            .collect::<Result<_>>()?;
        Ok(Self { map, tensors })
    }

    /// Elements of weight `i`.
    pub(super) fn floats(&self, i: usize) -> Floats<'_> {
        let t = &self.tensors[i];
        let bytes = &self.map[t.range.clone()];
        match t.dtype {
            DType::F16 => Floats::F16(bytemuck::cast_slice::<u8, f16>(bytes)),
            DType::BF16 => Floats::BF16(bytemuck::cast_slice::<u8, bf16>(bytes)),
            _ => Floats::F32(bytemuck::cast_slice(bytes)),
        }
    }

    /// Name of weight `i`.
    pub(super) fn name(&self, i: usize) -> &str {
        &self.tensors[i].name
    }

    /// Order of the elements of weight `i`.
    pub(super) fn layout(&self, i: usize) -> Layout {
        self.tensors[i].layout
    }
}
