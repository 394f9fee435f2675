//! Vectors of pictures or texts as files: `.npy` or `.safetensors`.

use crate::{Error, Result};
use safetensors::{Dtype, tensor::TensorView};
use std::{collections::HashMap, fs, path::Path};

/// Writes `vectors f32[names.len(), width]`. A `.npy` file has the vectors only; a `.safetensors` file has them as the tensor `name`
/// and in its metadata, under `names`, a JSON list of what they are of.
///
/// # Errors
/// The file's name ends in something else, or it cannot be written.
pub fn write(path: &Path, name: &str, vectors: &[f32], width: usize, names: &[String]) -> Result<()> {
    let data: Vec<u8> = vectors.iter().flat_map(|v| v.to_le_bytes()).collect();
    let bytes = match format(path)? {
        Format::Npy => npy([names.len(), width], &data),
        Format::Safetensors => {
            let failed = |e: safetensors::SafeTensorError| Error::file(path, e.to_string());
            let view = TensorView::new(Dtype::F32, vec![names.len(), width], &data).map_err(failed)?;
            let list = serde_json::to_string(names).map_err(|e| Error::file(path, e.to_string()))?;
            let metadata = HashMap::from([("names".to_string(), list)]);
            safetensors::serialize([(name, view)], Some(metadata)).map_err(failed)?
        }
    };
    // Under another name first, so that a reader never sees half a file.
    let part = path.with_extension("part");
    fs::write(&part, bytes).and_then(|()| fs::rename(&part, path)).map_err(|cause| {
        // Already failing: what cannot be removed either stays.
        let _ = fs::remove_file(&part);
        Error::io(path)(cause)
    })
}

/// Checks that a file's name says how vectors are to be written.
///
/// # Errors
/// It does not.
pub fn check_name(path: &Path) -> Result<()> {
    format(path).map(|_| ())
}

enum Format {
    Npy,
    Safetensors,
}

fn format(path: &Path) -> Result<Format> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("npy") => Ok(Format::Npy),
        Some("safetensors") => Ok(Format::Safetensors),
        _ => Err(Error::file(path, "the name must end in .npy or .safetensors")),
    }
}

/// NumPy's format, version 1.0: a magic number, a header padded to 64 bytes, the data.
fn npy([rows, columns]: [usize; 2], data: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    let before = 10;
    let padded = (before + header.len() + 1).next_multiple_of(64) - before;
    header.extend(std::iter::repeat_n(' ', padded - header.len() - 1));
    header.push('\n');
    [b"\x93NUMPY\x01\x00", &(padded as u16).to_le_bytes()[..], header.as_bytes(), data].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn npy_is_what_numpy_writes() {
        // numpy.save(f, numpy.array([[1, 2]], 'f4'))
        let bytes = npy([1, 2], &[1f32, 2.0].map(f32::to_le_bytes).concat());
        assert_eq!(bytes.len(), 128 + 8);
        assert!(bytes.starts_with(b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }  "));
        assert_eq!(bytes[127], b'\n');
    }
}
