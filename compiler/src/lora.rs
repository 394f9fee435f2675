//! LoRA adapters (Hu et al., 2021), as PEFT writes them, merged while weights are read: `W + scale * B A`.

use crate::{
    Error, Result,
    checkpoint::{Weights, read_json},
};
use half::{bf16, f16};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path};
use vlmc_artifact::DType;

/// The adapter of one matrix `[n, k]`.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// `[r, k]`
    a: Vec<f32>,
    /// `[n, r]`
    b: Vec<f32>,
    /// Width of the adapter.
    r: usize,
    /// Length of a row of the matrix.
    k: usize,
    scale: f32,
}

/// The adapters of a directory (`adapter_config.json` and `adapter_model.safetensors` or `.bin`), by the name of the weight that
/// they belong to, as the checkpoint names it.
///
/// # Errors
/// A file is missing or malformed, a setting is not supported, or a pair of matrices does not fit.
pub(crate) fn open(dir: &Path) -> Result<BTreeMap<String, Adapter>> {
    let path = dir.join("adapter_config.json");
    let config = read_json(&path)?;
    let invalid = |message: String| Error::file(&path, message);
    let flag = |field: &str| config.get(field).and_then(Value::as_bool).unwrap_or(false);
    for field in ["fan_in_fan_out", "use_dora", "lora_bias"] {
        if flag(field) {
            return Err(invalid(format!("`{field}`: true is not supported")));
        }
    }
    let number = |field: &str| {
        config
            .get(field)
            .and_then(Value::as_f64)
            .filter(|v| v.is_finite() && *v > 0.0)
            .ok_or_else(|| invalid(format!("`{field}` must be a positive number")))
    };
    let (alpha, r) = (number("lora_alpha")?, number("r")?);
    for field in ["alpha_pattern", "rank_pattern"] {
        if config.get(field).and_then(Value::as_object).is_some_and(|m| !m.is_empty()) {
            return Err(invalid(format!("`{field}` is not supported")));
        }
    }
    let scale = if flag("use_rslora") { alpha / r.sqrt() } else { alpha / r };
    let file = ["adapter_model.safetensors", "adapter_model.bin"].into_iter().find(|f| dir.join(f).exists());
    let file = file.ok_or_else(|| Error::file(dir, "has neither adapter_model.safetensors nor adapter_model.bin"))?;
    let weights = Weights::open(dir, &[file.to_string()].into())?;
    let mut out = BTreeMap::new();
    for name in weights.names() {
        let Some(module) = name.strip_suffix(".lora_A.weight") else {
            if name.ends_with(".lora_B.weight") {
                continue;
            }
            return Err(Error::file(
                dir,
                format!("tensor '{name}' is neither lora_A nor lora_B of a linear layer, which alone are supported"),
            ));
        };
        let (a, a_shape) = weights.floats(&name)?;
        let b_name = format!("{module}.lora_B.weight");
        let (b, b_shape) = weights.floats(&b_name)?;
        let (&[r, k], &[_, r2]) = (&a_shape[..], &b_shape[..]) else {
            return Err(Error::file(dir, format!("'{name}' and '{b_name}' must be matrices, are {a_shape:?} and {b_shape:?}")));
        };
        if r != r2 || r == 0 {
            return Err(Error::file(dir, format!("'{name}' {a_shape:?} and '{b_name}' {b_shape:?} do not fit")));
        }
        let module = module.strip_prefix("base_model.model.").unwrap_or(module);
        out.insert(format!("{module}.weight"), Adapter { a, b, r, k, scale: scale as f32 });
    }
    if out.is_empty() {
        return Err(Error::file(dir, "has no adapters"));
    }
    Ok(out)
}

impl Adapter {
    /// Shape of the matrix.
    pub(crate) fn shape(&self) -> [usize; 2] {
        [self.b.len() / self.r, self.k]
    }

    /// Adds its rows from `first` on to rows of the matrix in `bytes`, and rounds to the matrix's type.
    pub(crate) fn add(&self, first: usize, dtype: DType, bytes: &mut [u8]) {
        let row_bytes = (self.k * dtype.size()).max(1);
        let mut delta = vec![0.0f32; self.k];
        for (row, bytes) in bytes.chunks_exact_mut(row_bytes).enumerate() {
            delta.fill(0.0);
            let b = &self.b[(first + row) * self.r..][..self.r];
            for (b, a) in b.iter().zip(self.a.chunks_exact(self.k)) {
                delta.iter_mut().zip(a).for_each(|(d, a)| *d += b * a);
            }
            let scaled = delta.iter().map(|d| d * self.scale);
            match dtype {
                DType::F16 => bytes
                    .as_chunks_mut()
                    .0
                    .iter_mut()
                    .zip(scaled)
                    .for_each(|(w, d)| *w = f16::from_f32(f16::from_le_bytes(*w).to_f32() + d).to_le_bytes()),
                DType::BF16 => bytes
                    .as_chunks_mut()
                    .0
                    .iter_mut()
                    .zip(scaled)
                    .for_each(|(w, d)| *w = bf16::from_f32(bf16::from_le_bytes(*w).to_f32() + d).to_le_bytes()),
                _ => bytes.as_chunks_mut().0.iter_mut().zip(scaled).for_each(|(w, d)| *w = (f32::from_le_bytes(*w) + d).to_le_bytes()),
            }
        }
    }
}
