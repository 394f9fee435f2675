//! Checkpoints of published sizes with random weights: for benchmarks and capacity planning without a download.

use crate::{
    Error, Result,
    arch::{ARCHITECTURES, Architecture, Preset, SideFiles},
    artifact_dir::StagedDir,
    weights_writer::{TensorSpec, WeightsWriter},
};
use half::bf16;
use rayon::prelude::*;
use serde_json::{Value, json};
use std::{
    cell::RefCell,
    fs,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};
use vlmc_ir::{DType, WeightSource, Weights};

/// Bytes per shard, at most, unless one tensor is larger.
const SHARD: u64 = 4_000_000_000;
/// Elements per piece of work.
const TILE: usize = 1 << 20;

/// All presets of all architectures.
fn all() -> impl Iterator<Item = &'static Preset> {
    ARCHITECTURES.iter().flat_map(|a| a.presets)
}

/// Names of the presets.
pub fn presets() -> Vec<&'static str> {
    all().map(|p| p.name).collect()
}

/// The preset of that name.
///
/// # Errors
/// [`Error::Model`] lists the presets there are.
pub fn preset(name: &str) -> Result<&'static Preset> {
    all().find(|p| p.name == name).ok_or_else(|| Error::Model {
        model: name.into(),
        message: format!("there is no such preset; presets are {}", presets().join(", ")),
    })
}

/// Notes which tensors a frontend asks for.
struct Recorder {
    tied: bool,
    tensors: RefCell<Vec<TensorSpec>>,
}

impl WeightSource for Recorder {
    fn contains(&self, name: &str) -> Option<bool> {
        Some(name != "lm_head.weight" || !self.tied)
    }

    fn resolve(&self, name: &str, shape: &[usize]) -> Result<DType, String> {
        let mut tensors = self.tensors.borrow_mut();
        if tensors.iter().all(|t| t.name != name) {
            tensors.push(TensorSpec { name: name.into(), dtype: DType::BF16, shape: shape.into() });
        }
        Ok(DType::BF16)
    }
}

/// Number of weights of the model that a config describes, each counted once.
///
/// # Errors
/// The config does not fit its architecture.
pub fn parameters(config: &Value) -> Result<u64> {
    let tensors = tensors(config)?;
    // Running statistics of batch norms are no parameters, and published figures do not count them.
    let is_statistic = |t: &&TensorSpec| t.name.ends_with("running_mean") || t.name.ends_with("running_var");
    Ok(tensors.iter().filter(|t| !is_statistic(t)).map(|t| t.shape.iter().map(|d| *d as u64).product::<u64>()).sum())
}

/// The tensors of the checkpoint of a config, in the order in which the model has them.
fn tensors(config: &Value) -> Result<Vec<TensorSpec>> {
    let recorder = Recorder { tied: config["tie_word_embeddings"] == true, tensors: RefCell::default() };
    Architecture::of(config)?.lower(config, Weights::new(&recorder), &SideFiles::default())?;
    Ok(recorder.tensors.into_inner())
}

/// Writes a checkpoint in hub layout to `out`, with weights that depend on the seed only, or without a seed no weights: enough to
/// look at the model's structure. `progress` gets the bytes written and in all, from any thread.
///
/// # Errors
/// There is no such preset, `out` exists and is not empty, or the disk is full.
pub fn synth(name: &str, out: &Path, seed: Option<u64>, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<()> {
    let preset = preset(name)?;
    write(&(preset.config)(), &(preset.files)(), out, seed, progress)
}

/// [`synth`] of another config, with other files.
///
/// # Errors
/// As [`synth`], or the config does not fit its architecture.
pub fn write(config: &Value, files: &[(&str, Value)], out: &Path, seed: Option<u64>, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<()> {
    let tensors = tensors(config)?;
    let dir = StagedDir::create(out, "an empty directory", |_| false)?;
    if let Some(seed) = seed {
        write_weights(dir.path(), &tensors, seed, progress)?;
    }
    write_json(dir.path(), "config.json", config)?;
    for (name, content) in files {
        write_json(dir.path(), name, content)?;
    }
    dir.commit()
}

fn write_json(dir: &Path, name: &str, value: &Value) -> Result<()> {
    let path = dir.join(name);
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::file(&path, e.to_string()))?;
    fs::write(&path, text + "\n").map_err(Error::io(&path))
}

/// The weight files, and their index if there are several.
fn write_weights(dir: &Path, tensors: &[TensorSpec], seed: u64, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<()> {
    let mut shards: Vec<Vec<TensorSpec>> = vec![vec![]];
    let mut size = 0;
    let bytes = |t: &TensorSpec| t.bytes().unwrap_or(u64::MAX);
    for t in tensors {
        if size > 0 && size + bytes(t) > SHARD {
            shards.push(vec![]);
            size = 0;
        }
        size += bytes(t);
        if let Some(shard) = shards.last_mut() {
            shard.push(t.clone());
        }
    }
    let total: u64 = tensors.iter().map(bytes).sum();
    let done = AtomicU64::new(0);
    let mut weight_map = serde_json::Map::new();
    let count = shards.len();
    for (i, shard) in shards.iter().enumerate() {
        let name = if count == 1 { "model.safetensors".to_string() } else { format!("model-{:05}-of-{count:05}.safetensors", i + 1) };
        let writer = WeightsWriter::create(dir.join(&name), shard)?;
        for t in shard {
            weight_map.insert(t.name.clone(), json!(name));
            fill(&writer, t, seed, &|n| progress(done.fetch_add(n, Ordering::Relaxed) + n, total))?;
        }
        writer.finish()?;
    }
    if count > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(dir, "model.safetensors.index.json", &index)?;
    }
    Ok(())
}

/// Random elements: norms around 1, biases around 0, matrices with a standard deviation of 0.02.
fn fill(writer: &WeightsWriter, t: &TensorSpec, seed: u64, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
    let elements: usize = t.shape.iter().product();
    let name = t.name.bytes().fold(seed, |h, b| mix(h ^ u64::from(b)));
    let is_norm = t.shape.len() == 1 && (t.name.ends_with("weight") || t.name.ends_with("running_var"));
    let (centre, deviation) = if is_norm { (1.0, 0.05) } else { (0.0, 0.02) };
    (0..elements.div_ceil(TILE)).into_par_iter().try_for_each(|tile| {
        let range = tile * TILE..elements.min((tile + 1) * TILE);
        let mut bytes = Vec::with_capacity(2 * range.len());
        for i in range.clone() {
            bytes.extend_from_slice(&bf16::from_f32(centre + deviation * normal(name ^ i as u64)).to_le_bytes());
        }
        writer.write_at(&t.name, 2 * range.start as u64, &bytes)?;
        progress(bytes.len() as u64);
        Ok(())
    })
}

/// The finalizer of SplitMix64 (Steele et al., 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// About normal: the sum of four uniform numbers, with mean 0 and variance 1.
fn normal(counter: u64) -> f32 {
    let bits = mix(counter);
    let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum();
    // Four uniform numbers on 0..65536 have a standard deviation of 65536 / sqrt(3) in sum.
    (sum as f32 - 131_070.0) / 37_837.2
}

/// `tokenizer.json` of a byte-level tokenizer with special tokens at the ids from `first` on, and names for the ids in between, so
/// that what a random model writes can be seen.
pub(crate) fn tokenizer(first: usize, specials: &[&str]) -> Value {
    // GPT-2's printable stand-ins for bytes.
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 256u32;
    let mut vocab = serde_json::Map::new();
    for b in 0..=255u8 {
        let c = if printable(b) {
            char::from(b)
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap_or('?')
        };
        vocab.insert(c.to_string(), json!(b));
    }
    for id in 256..first {
        vocab.insert(format!("Ġw{id}"), json!(id));
    }
    let mut added = vec![];
    for (i, name) in specials.iter().enumerate() {
        let id = first + i;
        vocab.insert((*name).into(), json!(id));
        added.push(json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}));
    }
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_about_normal() {
        let n = 100_000;
        let (sum, squares) = (0..n).map(|i| f64::from(normal(i))).fold((0.0, 0.0), |(s, q), v| (s + v, q + v * v));
        let (mean, variance) = (sum / n as f64, squares / n as f64);
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
    }

    #[test]
    fn a_checkpoint_is_what_its_seed_says() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, seed: u64| {
            let out = dir.path().join(name);
            synth("qwen2-vl-tiny", &out, Some(seed), &|_, _| {}).unwrap();
            fs::read(out.join("model.safetensors")).unwrap()
        };
        assert!(write("a", 1) == write("b", 1));
        assert!(write("c", 2) != write("d", 1));
        assert!(synth("qwen2-vl-tiny", &dir.path().join("a"), Some(1), &|_, _| {}).is_err(), "it would overwrite a checkpoint");
        let model = crate::compile::Model::open(&dir.path().join("a")).unwrap();
        assert_eq!(model.lower().unwrap().unused, Vec::<String>::new());
        tokenizers::Tokenizer::from_file(dir.path().join("a/tokenizer.json")).unwrap();
    }
}
