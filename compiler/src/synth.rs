//! Checkpoints of published sizes with random weights: for benchmarks and capacity planning without a download.

use crate::{
    Error, Result,
    arch::{Architecture, SideFiles},
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

/// Sizes of a decoder, as published, and of the vision tower.
struct Preset {
    name: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    vocab_size: usize,
    tie_word_embeddings: bool,
    vision_depth: usize,
    vision_embed_dim: usize,
    mrope_section: [usize; 3],
}

const QWEN2_VL_2B: Preset = Preset {
    name: "qwen2-vl-2b",
    hidden_size: 1536,
    intermediate_size: 8960,
    num_hidden_layers: 28,
    num_attention_heads: 12,
    num_key_value_heads: 2,
    vocab_size: 151_936,
    tie_word_embeddings: true,
    vision_depth: 32,
    vision_embed_dim: 1280,
    mrope_section: [16, 24, 24],
};

static PRESETS: [Preset; 4] = [
    QWEN2_VL_2B,
    Preset {
        name: "qwen2-vl-7b",
        hidden_size: 3584,
        intermediate_size: 18944,
        num_attention_heads: 28,
        num_key_value_heads: 4,
        vocab_size: 152_064,
        tie_word_embeddings: false,
        ..QWEN2_VL_2B
    },
    Preset {
        name: "qwen2-vl-72b",
        hidden_size: 8192,
        intermediate_size: 29568,
        num_hidden_layers: 80,
        num_attention_heads: 64,
        num_key_value_heads: 8,
        vocab_size: 152_064,
        tie_word_embeddings: false,
        ..QWEN2_VL_2B
    },
    // Not published: the 2B model's structure in a size for tests.
    Preset {
        name: "qwen2-vl-tiny",
        hidden_size: 64,
        intermediate_size: 128,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        vision_depth: 2,
        vision_embed_dim: 64,
        mrope_section: [2, 3, 3],
        ..QWEN2_VL_2B
    },
];

/// Names of the presets.
pub fn presets() -> Vec<&'static str> {
    PRESETS.iter().map(|p| p.name).collect()
}

/// The `config.json` of a preset, as published on the hub.
///
/// # Errors
/// [`Error::Model`] lists the presets there are.
pub fn config(preset: &str) -> Result<Value> {
    let p = PRESETS.iter().find(|p| p.name == preset).ok_or_else(|| Error::Model {
        model: preset.into(),
        message: format!("there is no such preset; presets are {}", presets().join(", ")),
    })?;
    Ok(json!({
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "vision_start_token_id": 151_652,
        "vision_end_token_id": 151_653,
        "vision_token_id": 151_654,
        "image_token_id": 151_655,
        "video_token_id": 151_656,
        "hidden_act": "silu",
        "hidden_size": p.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": p.intermediate_size,
        "max_position_embeddings": 32768,
        "max_window_layers": p.num_hidden_layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": p.num_attention_heads,
        "num_hidden_layers": p.num_hidden_layers,
        "num_key_value_heads": p.num_key_value_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": p.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": true,
        "use_sliding_window": false,
        "vision_config": {
            "depth": p.vision_depth,
            "embed_dim": p.vision_embed_dim,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": p.hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2
        },
        "rope_scaling": {"type": "mrope", "mrope_section": p.mrope_section},
        "vocab_size": p.vocab_size
    }))
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

/// Writes a checkpoint in hub layout to `out`, with weights that depend on the seed only. `progress` gets the bytes written
/// and in all, from any thread.
///
/// # Errors
/// There is no such preset, `out` exists and is not empty, or the disk is full.
pub fn synth(preset: &str, out: &Path, seed: u64, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<()> {
    let config = config(preset)?;
    let recorder = Recorder { tied: config["tie_word_embeddings"] == true, tensors: RefCell::default() };
    Architecture::of(&config)?.lower(&config, Weights::new(&recorder), &SideFiles::default())?;
    let tensors = recorder.tensors.into_inner();
    let dir = StagedDir::create(out, "an empty directory", |_| false)?;

    let mut shards: Vec<Vec<TensorSpec>> = vec![vec![]];
    let mut size = 0;
    let bytes = |t: &TensorSpec| t.bytes().unwrap_or(u64::MAX);
    for t in &tensors {
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
        let writer = WeightsWriter::create(dir.path().join(&name), shard)?;
        for t in shard {
            weight_map.insert(t.name.clone(), json!(name));
            fill(&writer, t, seed, &|n| progress(done.fetch_add(n, Ordering::Relaxed) + n, total))?;
        }
        writer.finish()?;
    }
    let write = |name: &str, value: &Value| {
        let path = dir.path().join(name);
        let text = serde_json::to_string_pretty(value).map_err(|e| Error::file(&path, e.to_string()))?;
        fs::write(&path, text + "\n").map_err(Error::io(&path))
    };
    if count > 1 {
        write("model.safetensors.index.json", &json!({"metadata": {"total_size": total}, "weight_map": weight_map}))?;
    }
    write("config.json", &config)?;
    write(
        "generation_config.json",
        &json!({"bos_token_id": 151_643, "pad_token_id": 151_643, "do_sample": true, "eos_token_id": [151_645, 151_643],
                "repetition_penalty": 1.0, "temperature": 0.01, "top_p": 0.001, "top_k": 1}),
    )?;
    write(
        "preprocessor_config.json",
        &json!({"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
                "image_mean": [0.481_454_66, 0.457_827_5, 0.408_210_73], "image_std": [0.268_629_54, 0.261_302_58, 0.275_777_11],
                "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}),
    )?;
    let (tokenizer, tokenizer_config) = tokenizer();
    write("tokenizer.json", &tokenizer)?;
    write("tokenizer_config.json", &tokenizer_config)?;
    dir.commit()
}

/// Random elements: norms around 1, biases around 0, matrices with a standard deviation of 0.02.
fn fill(writer: &WeightsWriter, t: &TensorSpec, seed: u64, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
    let elements: usize = t.shape.iter().product();
    let name = t.name.bytes().fold(seed, |h, b| mix(h ^ u64::from(b)));
    let is_norm = t.shape.len() == 1 && t.name.ends_with("weight");
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

/// A byte-level tokenizer with Qwen2-VL's special tokens at their published ids, and names for the ids in between, so that what
/// a random model writes can be seen.
fn tokenizer() -> (Value, Value) {
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
    for id in 256..151_643 {
        vocab.insert(format!("Ġw{id}"), json!(id));
    }
    let names = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
        "<|box_end|>",
        "<|quad_start|>",
        "<|quad_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ];
    let mut added = vec![];
    for (i, name) in names.iter().enumerate() {
        let id = 151_643 + i;
        vocab.insert((*name).into(), json!(id));
        added.push(json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}));
    }
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    });
    let template = "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let config = json!({
        "bos_token": null, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 32768,
        "tokenizer_class": "Qwen2Tokenizer", "chat_template": template
    });
    (tokenizer, config)
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
            synth("qwen2-vl-tiny", &out, seed, &|_, _| {}).unwrap();
            fs::read(out.join("model.safetensors")).unwrap()
        };
        assert!(write("a", 1) == write("b", 1));
        assert!(write("c", 2) != write("d", 1));
        assert!(synth("qwen2-vl-tiny", &dir.path().join("a"), 1, &|_, _| {}).is_err(), "it would overwrite a checkpoint");
        let model = crate::compile::Model::open(&dir.path().join("a")).unwrap();
        assert_eq!(model.lower().unwrap().unused, Vec::<String>::new());
        tokenizers::Tokenizer::from_file(dir.path().join("a/tokenizer.json")).unwrap();
    }
}
