//! LoRA adapters: compiling with them gives what compiling the merged weights gives.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use half::bf16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use vlmc::compile::{Model, Options};
use vlmc_passes::quantize::Policy;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/qwen2-vl")
}

fn weights(model: Model, out: &Path) -> Vec<u8> {
    model
        .compile(&Options {
            target: vlmc::target::named("cpu").unwrap(),
            out,
            policy: &Policy::none(),
            allow_fallback: false,
            progress: &|_, _| {},
        })
        .unwrap();
    fs::read(out.join("weights.safetensors")).unwrap()
}

fn floats(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect()
}

fn bytes(v: &[f32]) -> Vec<u8> {
    v.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn write_adapter(dir: &Path, module: &str, [n, k]: [usize; 2], r: usize) {
    fs::create_dir_all(dir).unwrap();
    let config = serde_json::json!({"peft_type": "LORA", "r": r, "lora_alpha": 6, "target_modules": ["q_proj"], "fan_in_fan_out": false});
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let (a, b) = (bytes(&floats(1, r * k)), bytes(&floats(2, n * r)));
    let view = |shape: [usize; 2], data| TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap();
    let tensors = [
        (format!("base_model.model.{module}.lora_A.weight"), view([r, k], &a)),
        (format!("base_model.model.{module}.lora_B.weight"), view([n, r], &b)),
    ];
    fs::write(dir.join("adapter_model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
}

#[test]
fn adapters_are_merged() {
    let dir = tempfile::tempdir().unwrap();
    let (n, k, r) = (64, 64, 3);
    // As newer versions of transformers name it; the checkpoint has the older name.
    let adapter = dir.path().join("adapter");
    write_adapter(&adapter, "model.language_model.layers.1.self_attn.q_proj", [n, k], r);

    // The same by hand: W + 6/3 * B A, rounded to bf16.
    let merged = dir.path().join("merged");
    fs::create_dir(&merged).unwrap();
    for name in ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture().join(name), merged.join(name)).unwrap();
    }
    let file = fs::read(fixture().join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut all: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> =
        tensors.tensors().into_iter().map(|(name, t)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect();
    let target = &mut all.get_mut("model.layers.1.self_attn.q_proj.weight").unwrap().2;
    let (a, b) = (floats(1, r * k), floats(2, n * r));
    for (i, w) in target.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let delta: f32 = (0..r).map(|j| b[i / k * r + j] * a[j * k + i % k]).sum();
        *w = bf16::from_f32(bf16::from_le_bytes(*w).to_f32() + 2.0 * delta).to_le_bytes();
    }
    let views = all.iter().map(|(n, (d, s, b))| (n, TensorView::new(*d, s.clone(), b).unwrap()));
    fs::write(merged.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();

    let with_lora = weights(Model::open_with_lora(&fixture(), &adapter).unwrap(), &dir.path().join("a"));
    assert!(with_lora == weights(Model::open(&merged).unwrap(), &dir.path().join("b")), "other weights than those merged by hand");
    assert!(with_lora != weights(Model::open(&fixture()).unwrap(), &dir.path().join("c")), "the adapter did nothing");
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = |adapter: &Path| Model::open_with_lora(&fixture(), adapter).err().unwrap().to_string();
    let adapter = dir.path().join("name");
    write_adapter(&adapter, "model.layers.9.self_attn.q_proj", [64, 64], 2);
    assert!(error(&adapter).contains("'model.layers.9.self_attn.q_proj.weight' is missing"), "{}", error(&adapter));
    let adapter = dir.path().join("shape");
    write_adapter(&adapter, "model.layers.1.self_attn.q_proj", [64, 32], 2);
    assert!(error(&adapter).contains("has shape [64, 64], expected [64, 32]"), "{}", error(&adapter));
    fs::write(adapter.join("adapter_config.json"), r#"{"r": 2, "lora_alpha": 1, "use_dora": true}"#).unwrap();
    assert!(error(&adapter).contains("`use_dora`"), "{}", error(&adapter));
    fs::remove_file(adapter.join("adapter_config.json")).unwrap();
    assert!(error(&adapter).contains("adapter_config.json"), "{}", error(&adapter));
}
