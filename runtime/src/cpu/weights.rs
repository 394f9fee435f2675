//! The weight file of a `cpu` artifact, mapped into memory.

use crate::{Error, Result};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use std::{fs::File, ops::Range, path::Path};
use vlmc_artifact::{
    DType,
    program::{Layout, PANEL, Weight},
    quant::panel_bytes,
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

/// Type and shape of a weight's tensor in the file.
pub(super) fn stored(w: &Weight) -> Result<(DType, Vec<usize>), String> {
    let (stack, [n, k]) = match (w.layout, w.shape.as_slice()) {
        (Layout::Rows, shape) if w.dtype.scheme().is_none() => return Ok((w.dtype, shape.to_vec())),
        (Layout::Panel16, [n, k]) => (vec![], [*n, *k]),
        (Layout::Panel16, [e, n, k]) => (vec![*e], [*n, *k]),
        (layout, shape) => return Err(format!("of {} and shape {shape:?} cannot lie in {layout:?}", w.dtype)),
    };
    let panels = n.div_ceil(PANEL);
    Ok(match w.dtype.scheme() {
        Some(scheme) => {
            let bytes = panel_bytes(scheme, k).ok_or_else(|| format!("has rows of {k} numbers, which is too many"))?;
            (DType::U8, [stack, vec![panels, bytes]].concat())
        }
        None => (w.dtype, [stack, vec![panels, k, PANEL]].concat()),
    })
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
                    Dtype::U8 => DType::U8,
                    other => return Err(wrong(format!("has type {other:?}, which is not supported"))),
                };
                let (stored, shape) = stored(w).map_err(wrong)?;
                if dtype != stored || info.shape != shape {
                    return Err(wrong(format!("is {dtype}{:?}, the program wants {stored}{shape:?}", info.shape)));
                }
                let range = data + info.data_offsets.0..data + info.data_offsets.1;
                // A map begins at a page.
                if !range.start.is_multiple_of(dtype.size()) {
                    return Err(wrong(format!("starts at byte {}, which is not aligned", range.start)));
                }
                Ok(Tensor { name: w.name.clone(), range, dtype: w.dtype, layout: w.layout })
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
            DType::Quant(scheme) => Floats::Quant(bytes, scheme),
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

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::{TensorView, serialize_to_file};

    #[test]
    fn quantized_weights_are_bytes_of_panels() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        let scheme = "int4g32".parse().unwrap();
        let len = panel_bytes(scheme, 40).unwrap();
        let bytes: Vec<u8> = (0..6 * len).map(|i| i as u8).collect();
        let view = |shape: Vec<usize>| TensorView::new(Dtype::U8, shape, &bytes).unwrap();
        serialize_to_file([("m", view(vec![6, len])), ("e", view(vec![3, 2, len]))], None, &path).unwrap();
        let weight = |name: &str, dtype: DType, shape: &[usize], layout: Layout| {
            let w = Weight { name: name.into(), dtype, shape: shape.to_vec(), layout };
            let weights = Weights::open(&path, &[w]).map_err(|e| e.to_string())?;
            let Floats::Quant(bytes, scheme) = weights.floats(0) else { return Err("not quantized".into()) };
            Ok::<_, String>((bytes.to_vec(), scheme))
        };
        let (int4, panel) = (DType::Quant(scheme), Layout::Panel16);
        assert_eq!(weight("m", int4, &[90, 40], panel), Ok((bytes.clone(), scheme)));
        assert_eq!(weight("e", int4, &[3, 20, 40], panel), Ok((bytes.clone(), scheme)));
        for (name, dtype, shape, layout, why) in [
            ("m", int4, &[97, 40][..], panel, "wants u8[7, 384]"),
            ("m", int4, &[90, 41], panel, "wants u8[6, 448]"),
            ("m", "int8".parse().unwrap(), &[90, 40], panel, "wants u8[6, 704]"),
            ("m", int4, &[90, 40], Layout::Rows, "cannot lie in Rows"),
            ("m", int4, &[90], panel, "cannot lie in Panel16"),
            ("m", int4, &[90, usize::MAX], panel, "too many"),
            ("m", DType::F32, &[90, 40], panel, "wants f32[6, 40, 16]"),
        ] {
            let error = weight(name, dtype, shape, layout).unwrap_err();
            assert!(error.contains(why), "{dtype} {shape:?}: {error}");
        }
    }
}
