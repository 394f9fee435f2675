//! Codes that calibration has found, in a temporary file until they are written into an artifact.

use crate::{Error, Result, checkpoint::Checkpoint, stored::Stored};
use safetensors::Dtype;
use std::{collections::BTreeMap, fs::File, io::Write};
use vlmc_ir::{Scheme, quant::Codes};

/// Tensors in a file that is gone with it.
pub(super) struct Found {
    file: File,
    end: u64,
    tensors: BTreeMap<String, Stored>,
}

impl Found {
    pub(super) fn new() -> Result<Self> {
        let file = tempfile::tempfile().map_err(Error::io(std::env::temp_dir()))?;
        Ok(Self { file, end: 0, tensors: BTreeMap::new() })
    }

    /// Keeps codes of a weight of that shape as [`vlmc_ir::weights::Recipe::Codes`] of that name has them.
    pub(super) fn put(&mut self, name: &str, shape: &[usize], scheme: Scheme, codes: &Codes) -> Result<()> {
        let mut groups = shape.to_vec();
        if let Some(k) = groups.last_mut() {
            *k = scheme.groups(*k);
        }
        let scales: Vec<u8> = codes.scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        self.append(format!("{name}.codes"), Dtype::U8, shape, &codes.codes)?;
        self.append(format!("{name}.scales"), Dtype::F32, &groups, &scales)?;
        self.append(format!("{name}.zeros"), Dtype::U8, &groups, &codes.zeros)
    }

    /// Keeps a vector.
    pub(super) fn put_vector(&mut self, name: &str, vector: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = vector.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.append(name.into(), Dtype::F32, &[vector.len()], &bytes)
    }

    /// Codes that [`Self::put`] has kept.
    pub(super) fn get(&self, name: &str) -> Result<Codes> {
        let part = |part: &str| {
            let stored = self.tensors.get(&format!("{name}.{part}")).ok_or_else(|| Error::tensor(name, "has no codes"))?;
            let mut bytes = vec![];
            let rows = 0..stored.shape.first().copied().unwrap_or(1);
            stored.read_rows(&self.file, rows, &mut bytes).map_err(Error::io(std::env::temp_dir()))?;
            Ok::<_, Error>(bytes)
        };
        let scales = part("scales")?.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        Ok(Codes { codes: part("codes")?, scales, zeros: part("zeros")? })
    }

    fn append(&mut self, name: String, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(std::env::temp_dir()))?;
        let range = self.end..self.end + bytes.len() as u64;
        self.end = range.end;
        self.tensors.insert(name, Stored { dtype, shape: shape.to_vec(), range, strides: None });
        Ok(())
    }

    /// The checkpoint with these tensors.
    pub(super) fn added_to(self, checkpoint: Checkpoint) -> Checkpoint {
        checkpoint.with_found(self.file, self.tensors)
    }
}
