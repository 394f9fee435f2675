//! What the artifact computed, kept in a temporary file until the reference gets there: a long prompt's results are larger than a
//! layer's weights, and need not be in memory.

use crate::{Error, Result};
use std::{fs::File, io::Write, os::unix::fs::FileExt, path::Path};
use vlmc_runtime::{Data, Tensor, artifact::DType};

/// Tensors in a file that is gone with it.
pub(super) struct Spool {
    file: File,
    end: u64,
}

/// A tensor in the file.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) offset: u64,
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
}

impl Spool {
    pub(super) fn new() -> Result<Self> {
        Ok(Self { file: tempfile::tempfile().map_err(Error::io(std::env::temp_dir()))?, end: 0 })
    }

    pub(super) fn put(&mut self, t: &Tensor) -> std::io::Result<Kept> {
        let bytes: Vec<u8> = match t.data() {
            Data::F32(v) => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Data::I64(v) => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Data::Bool(v) => v.iter().map(|v| u8::from(*v)).collect(),
        };
        self.file.write_all(&bytes)?;
        let kept = Kept { offset: self.end, dtype: t.dtype(), shape: t.shape().to_vec() };
        self.end += bytes.len() as u64;
        Ok(kept)
    }

    pub(super) fn get(&self, kept: &Kept) -> Result<Tensor> {
        let mut bytes = vec![0; kept.shape.iter().product::<usize>() * kept.dtype.size()];
        self.file.read_exact_at(&mut bytes, kept.offset).map_err(Error::io(Path::new("temporary file")))?;
        let data: Data = match kept.dtype {
            DType::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect::<Vec<_>>().into(),
            DType::Bool => bytes.iter().map(|b| *b != 0).collect::<Vec<_>>().into(),
            _ => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>().into(),
        };
        Ok(Tensor::new(kept.shape.clone(), data)?)
    }
}
