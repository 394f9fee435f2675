//! Artifacts from anywhere: whatever their files hold, opening and running them gives an answer or an error, never a panic, a
//! crash or another file's bytes.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha12Rng;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{fs, path::Path};
use vlmc_runtime::{Artifact, CpuEngine, Engine, EngineOptions};
use vlmc_tests::{compile, fixture, write_inputs};

/// Visits every leaf and container of a document.
fn count(v: &Value) -> usize {
    1 + match v {
        Value::Array(a) => a.iter().map(count).sum(),
        Value::Object(o) => o.values().map(count).sum(),
        _ => 0,
    }
}

/// The `n`th value of a document, in the order of [`count`].
fn nth<'v>(v: &'v mut Value, n: &mut usize) -> Option<&'v mut Value> {
    if *n == 0 {
        return Some(v);
    }
    *n -= 1;
    match v {
        Value::Array(a) => a.iter_mut().find_map(|v| nth(v, n)),
        Value::Object(o) => o.values_mut().find_map(|v| nth(v, n)),
        _ => None,
    }
}

/// Changes one value into one of another value, length or kind, often one that stands elsewhere in the document.
fn mutate(document: &mut Value, rng: &mut ChaCha12Rng) {
    let size = count(document);
    let donor = nth(document, &mut rng.random_range(0..size)).cloned();
    let Some(v) = nth(document, &mut rng.random_range(1..size)) else { return };
    let change: u32 = rng.random_range(0..6);
    *v = match (&*v, change) {
        (Value::Number(n), 0..=3) => {
            let n = n.as_i64().unwrap_or(0);
            json!([n.wrapping_add(1), n.wrapping_sub(1), 0, 1, 2, -1, 7, 65_536, i64::MAX, i64::MIN].choose(rng))
        }
        (Value::Array(a), 0..=3) if !a.is_empty() => {
            let mut a = a.clone();
            let (i, j) = (rng.random_range(0..a.len()), rng.random_range(0..a.len()));
            match change {
                0 => _ = a.remove(i),
                1 => a.push(a[i].clone()),
                _ => a.swap(i, j),
            }
            Value::Array(a)
        }
        (Value::String(s), 0..2) => json!(
            [s.replace("seq", "past"), s.replace("batch", "seq"), format!("2*{s}"), String::new(), "4294967296*seq".into()].choose(rng)
        ),
        (_, 5) => Value::Null,
        _ => donor.unwrap_or(Value::Null),
    };
}

/// Writes a file of an artifact anew, with the entry in its manifest that belongs to it.
fn replace(artifact: &Path, name: &str, content: &Value) {
    let bytes = serde_json::to_vec(content).unwrap();
    let path = artifact.join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let digest: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    manifest["files"][name] = json!({"bytes": bytes.len(), "sha256": digest});
    fs::write(path, serde_json::to_vec(&manifest).unwrap()).unwrap();
    fs::write(artifact.join(name), bytes).unwrap();
}

/// Prefill and two steps; what was wrong, if it did not run.
fn attempt(artifact: &Path, inputs: &Path, outputs: &Path) -> Result<(), String> {
    let artifact = Artifact::open(artifact).map_err(|e| e.to_string())?;
    let engine: Box<dyn Engine> = Box::new(
        CpuEngine::open(&artifact, &EngineOptions { threads: std::num::NonZero::new(2), ..EngineOptions::default() })
            .map_err(|e| e.to_string())?,
    );
    vlmc::exec::exec(engine, inputs, outputs, 2).map(|_| ()).map_err(|e| e.to_string())
}

fn fuzz(model: &str, case: &str, file: &str, cases: u64) {
    let dir = tempfile::tempdir().unwrap();
    let (artifact, inputs, outputs) = (dir.path().join("artifact"), dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    compile(&fixture(model), "cpu", &artifact);
    write_inputs(&fixture(model), case, &[], &inputs);
    attempt(&artifact, &inputs, &outputs).unwrap();
    let good: Value = serde_json::from_slice(&fs::read(artifact.join(file)).unwrap()).unwrap();
    let (mut ran, mut refused) = (0, 0);
    for seed in 0..cases {
        let mut rng = ChaCha12Rng::seed_from_u64(seed);
        let mut bad = good.clone();
        (0..rng.random_range(1..4)).for_each(|_| mutate(&mut bad, &mut rng));
        if file == "manifest.json" {
            fs::write(artifact.join(file), serde_json::to_vec(&bad).unwrap()).unwrap();
        } else {
            replace(&artifact, file, &bad);
        }
        let result =
            std::panic::catch_unwind(|| attempt(&artifact, &inputs, &outputs)).unwrap_or_else(|_| panic!("{model}: seed {seed} panics"));
        match result {
            Ok(()) => ran += 1,
            Err(why) => {
                assert!(!why.trim().is_empty(), "{model}: seed {seed}: an error that says nothing");
                refused += 1;
            }
        }
    }
    // Otherwise the changes are not of the kind that this test is for.
    assert!(ran > 0 && refused > cases / 4, "{ran} ran, {refused} were refused");
}

#[test]
fn programs() {
    fuzz("qwen2-vl", "two", "program.json", 600);
}

/// Experts and latent attention; masks as tensors and a cache of pictures; a model without prompts.
#[test]
fn programs_of_other_kinds() {
    fuzz("deepseek-vl2-mla", "chat", "program.json", 200);
    fuzz("llama-3.2-vision", "two", "program.json", 200);
    fuzz("siglip2-naflex", "", "program.json", 200);
}

#[test]
fn manifests() {
    fuzz("qwen2-vl", "two", "manifest.json", 300);
    fuzz("deepseek-vl2-mla", "chat", "manifest.json", 150);
    fuzz("llama-3.2-vision", "two", "manifest.json", 150);
    fuzz("qwen3-vl", "video", "manifest.json", 150);
}

/// Bytes that changed after compiling are noticed.
#[test]
fn changed_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let artifact = dir.path().join("artifact");
    compile(&fixture("qwen2-vl"), "cpu", &artifact);
    for name in ["program.json", "tokenizer.json", "tokenizer_config.json"] {
        let path = artifact.join(name);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        fs::write(&path, bad).unwrap();
        let error = Artifact::open(&artifact).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("does not belong to this artifact"), "{error}");
        fs::write(&path, good).unwrap();
    }
    let path = artifact.join("weights.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    // Gigabytes are not hashed at each start, only when asked for.
    assert!(Artifact::open(&artifact).unwrap().verify(|_| {}).unwrap_err().to_string().contains("weights.safetensors"));
}
