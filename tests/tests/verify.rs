//! `vlmc verify`: clean artifacts pass, and of one with a fault the layer with the fault is named.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use half::{bf16, f16};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;
use vlmc::{
    artifact_dir::certify,
    calibrate,
    compile::Model,
    samples,
    verify::{Options, Report, Request, html, verify},
};
use vlmc_ir::interp::Array;
use vlmc_passes::quantize::Policy;
use vlmc_runtime::{Artifact, artifact::Manifest, open_engine, prepare::Preparer};
use vlmc_tests::{CPU, compile, difference, fixture, load};

const TARGETS: [&str; 2] = ["cpu", "onnx-cpu"];
const OPTIONS: Options<'_> = Options { engine: CPU, new_tokens: 3, progress: &|_| {} };

fn compiled(name: &str, target: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let artifact = dir.path().join("artifact");
    compile(&fixture(name), target, &artifact);
    (dir, artifact)
}

fn preparer(artifact: &Artifact) -> Preparer {
    let Manifest { task, processor, .. } = artifact.manifest().clone();
    Preparer::new(task, processor, |name| artifact.path(name)).unwrap()
}

fn verified(artifact: &Path, name: &str) -> Report {
    let artifact = Artifact::open(artifact).unwrap();
    let request = Request { name: "synthetic".into(), tensors: preparer(&artifact).synthetic().unwrap() };
    verify(&artifact, Model::open(&fixture(name)).unwrap(), &[request], &OPTIONS).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn clean_artifacts_agree() {
    for name in ["qwen2-vl", "llama-3.2-vision", "deepseek-vl2-mla", "clip-openai-rn", "siglip2-naflex", "vit"] {
        for target in TARGETS {
            let (_dir, artifact) = compiled(name, target);
            let report = verified(&artifact, name);
            assert!(report.is_right(), "{name} for {target}: {:?} {:?}", report.first_wrong(), report.wrong_output());
            assert!(
                report.nodes.iter().all(|n| n.local.is_some()),
                "{name} for {target}: {:?}",
                report.nodes.iter().find(|n| n.local.is_none())
            );
            assert!(report.nodes.len() > 20 && !report.requests[0].outputs.is_empty(), "{name} for {target}");
            if let Some(logits) = &report.requests[0].logits {
                assert_eq!(logits.top1, 1.0, "{name} for {target}");
                assert!(logits.kl.iter().all(|kl| *kl < 1e-6), "{name} for {target}");
                assert_eq!(logits.greedy, (name != "vit").then_some([3, 3]), "{name} for {target}");
            }
        }
    }
}

/// Graphs that compute in f16 are held to what f16 rounds, and a fault is still found.
#[test]
fn artifacts_in_f16_agree() {
    for name in ["qwen2-vl", "llama-3.2-vision", "deepseek-vl2-mla", "siglip2-naflex", "shapes-vl"] {
        for target in ["onnx-cuda", "onnx-tensorrt"] {
            let (_dir, artifact) = compiled(name, target);
            let report = verified(&artifact, name);
            assert!(report.is_right(), "{name} for {target}: {:?} {:?}", report.first_wrong(), report.wrong_output());
            assert!(report.output_tolerance.is_some_and(|t| (1e-2..3e-2).contains(&t)), "{name} for {target}");
            let largest = report.nodes.iter().filter_map(|n| n.local).fold(0.0, |m, e| e.relative.max(m));
            assert!((1e-4..2e-3).contains(&largest), "{name} for {target}: {largest}: not in f16, or not exactly so");
            if name == "shapes-vl" {
                edit(&artifact, "model.layers.2.input_layernorm.weight", |w| w.iter_mut().for_each(|v| *v *= 1.01));
                assert_eq!(verified(&artifact, name).first_wrong().map(|n| n.layer()), Some("model.layers.2".into()), "{target}");
            }
        }
    }
}

/// Errors of quantized weights are told from faults, and are about as large as the codes make them.
#[test]
fn quantized_artifacts_agree() {
    let checkpoint = fixture("shapes-vl");
    for (policy, expected) in [("int8", 2e-3..0.025), ("int4", 0.03..0.15)] {
        for target in TARGETS {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("artifact");
            let model = Model::open(&checkpoint).unwrap();
            let policy = Policy::named(policy).unwrap();
            vlmc_tests::compile_with(&model, target, &policy, &out).unwrap();
            let report = verified(&out, "shapes-vl");
            assert!(report.is_right(), "{target}: {:?}", report.first_wrong());
            let mlp = report.nodes.iter().filter(|n| n.weights[0].starts_with("model.layers.") && n.weights[0].contains("mlp"));
            let errors: Vec<f64> = mlp.map(|n| n.local.unwrap().relative).collect();
            assert!(errors.len() == 12 && errors.iter().all(|e| expected.contains(e)), "{target}: {errors:?}");
            // A norm is stored exactly, whatever the rest is.
            edit(&out, "model.layers.2.input_layernorm.weight", |w| w.iter_mut().for_each(|v| *v *= 1.05));
            assert_eq!(verified(&out, "shapes-vl").first_wrong().map(|n| n.layer()), Some("model.layers.2".into()), "{target}");
        }
    }
}

/// Factors that calibration moves from a norm into the layers that read it are no faults, but a norm that they do not undo is.
#[test]
fn calibrated_artifacts_agree() {
    let rules = "base = \"int4\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4g32\"\nmethod = \"awq\"\n";
    let policy = Policy::parse(rules).unwrap();
    for target in TARGETS {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("artifact");
        let model = Model::open(&fixture("shapes-vl")).unwrap();
        let samples = samples::read(&fixture("shapes-vl/heldout.jsonl"), Some(4)).unwrap();
        let requests = calibrate::requests(&model, &samples).unwrap();
        let (model, _) = model.calibrate(vlmc_tests::target(target), &calibrate::chosen(&policy), &requests, &|_| {}).unwrap();
        vlmc_tests::compile_with(&model, target, &policy, &out).unwrap();
        let artifact = Artifact::open(&out).unwrap();
        let report = verify(&artifact, Model::open(&fixture("shapes-vl")).unwrap(), &requests[..2], &OPTIONS).unwrap();
        assert!(report.is_right(), "{target}: {:?}", report.first_wrong());
        // The factors are there: norms have other weights than in the checkpoint.
        let (stored, given) = (load(&out.join("weights.safetensors")), load(&fixture("shapes-vl/model.safetensors")));
        let norms = given.iter().filter(|(n, _)| n.contains("norm") && n.ends_with(".weight"));
        let factor = |(n, w): (&String, &Array)| difference(stored[n].f32().unwrap(), w.f32().unwrap()).0;
        let largest = norms.map(factor).fold(0.0, f32::max);
        assert!(largest > 0.05, "{target}: nothing was scaled: {largest}");
        edit(&out, "model.layers.2.input_layernorm.weight", |w| w.iter_mut().for_each(|v| *v *= 1.5));
        assert_eq!(verified(&out, "shapes-vl").first_wrong().map(|n| n.layer()), Some("model.layers.2".into()), "{target}");
    }
}

/// Changes the `bf16` or `f32` numbers of a tensor of an artifact's weight file, and the digests that speak of them.
fn edit(artifact: &Path, tensor: &str, change: impl FnOnce(&mut [f32])) {
    let path = artifact.join("weights.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    let info = header[tensor].clone();
    let offset = |i: usize| data + info["data_offsets"][i].as_u64().unwrap() as usize;
    let part = &mut bytes[offset(0)..offset(1)];
    let dtype = info["dtype"].as_str().unwrap();
    let mut numbers: Vec<f32> = match dtype {
        "F32" => part.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        "F16" => part.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        "BF16" => part.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        other => panic!("{tensor} is of {other}"),
    };
    change(&mut numbers);
    let new: Vec<u8> = match dtype {
        "F32" => numbers.iter().flat_map(|v| v.to_le_bytes()).collect(),
        "F16" => numbers.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
    };
    part.copy_from_slice(&new);

    let digest: String = Sha256::digest(&bytes[data..]).iter().map(|b| format!("{b:02x}")).collect();
    header["__metadata__"]["data_sha256"] = digest.clone().into();
    let mut json = serde_json::to_vec(&header).unwrap();
    assert!(json.len() <= data - 8);
    json.resize(data - 8, b' ');
    bytes[8..data].copy_from_slice(&json);
    fs::write(&path, bytes).unwrap();
    let path = artifact.join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    manifest["files"]["weights.safetensors"]["sha256"] = digest.into();
    fs::write(path, serde_json::to_vec(&manifest).unwrap()).unwrap();
    Artifact::open(artifact).unwrap().verify(|_| {}).unwrap();
}

/// The transpose of a square matrix, in rows or (`cpu`) in panels of 16 rows.
fn transpose(numbers: &mut [f32], target: &str) {
    let n = numbers.len().isqrt();
    assert_eq!((n * n, n % 16), (numbers.len(), 0));
    let at = |r: usize, c: usize| if target == "cpu" { (r / 16 * n + c) * 16 + r % 16 } else { r * n + c };
    let before = numbers.to_vec();
    (0..n).flat_map(|r| (0..n).map(move |c| (r, c))).for_each(|(r, c)| numbers[at(r, c)] = before[at(c, r)]);
}

/// Only the node with the fault is wrong, however far its consequences reach.
fn fault_is_found(target: &str, layer: &str, weight: &str, change: impl Fn(&mut [f32])) {
    let (_dir, artifact) = compiled("qwen2-vl", target);
    let stored = if target == "cpu" || !weight.contains("proj") && !weight.contains("fc") { weight.into() } else { format!("{weight}.T") };
    edit(&artifact, &stored, change);
    let report = verified(&artifact, "qwen2-vl");
    let wrong: Vec<_> = report.nodes.iter().filter(|n| n.is_wrong()).map(|n| (n.layer(), n.weights[0].clone())).collect();
    assert_eq!(wrong, [(layer.to_string(), weight.to_string())], "{target}");
    let first = report.first_wrong().unwrap();
    assert!(first.local.unwrap().relative > 0.01, "{first:?}");
    assert!(!report.is_right() && report.wrong_output().is_some());
    assert!(!report.certificate().right);
    assert_eq!(report.certificate().worst_weights[0], weight);
}

#[test]
fn a_scaled_matrix_is_found() {
    for target in TARGETS {
        fault_is_found(target, "model.layers.1", "model.layers.1.mlp.down_proj.weight", |w| w.iter_mut().for_each(|v| *v *= 1.2));
        fault_is_found(target, "visual.blocks.0", "visual.blocks.0.mlp.fc2.weight", |w| w.iter_mut().for_each(|v| *v *= 1.2));
    }
}

#[test]
fn a_transposed_matrix_is_found() {
    for target in TARGETS {
        fault_is_found(target, "model.layers.0", "model.layers.0.self_attn.o_proj.weight", |w| transpose(w, target));
    }
}

#[test]
fn a_scaled_norm_is_found() {
    for target in TARGETS {
        fault_is_found(target, "model.layers.1", "model.layers.1.input_layernorm.weight", |w| w.iter_mut().for_each(|v| *v *= 1.2));
    }
}

/// What was found is in the manifest, the same each time, and the artifact is the same otherwise.
#[test]
fn certificates() {
    let (_dir, dir) = compiled("shapes-vl", "cpu");
    let artifact = Artifact::open(&dir).unwrap();
    assert_eq!(artifact.manifest().certificate, None);
    let preparer = preparer(&artifact);
    let samples = samples::read(&fixture("shapes-vl/heldout.jsonl"), Some(2)).unwrap();
    let request = |s: &samples::Sample| Request { name: s.name.clone(), tensors: s.tensors(&preparer).unwrap() };
    let requests: Vec<Request> = samples.iter().map(request).collect();
    let run = |artifact: &Artifact| verify(artifact, Model::open(&fixture("shapes-vl")).unwrap(), &requests, &OPTIONS).unwrap();
    let report = run(&artifact);
    certify(&artifact, report.certificate()).unwrap();

    let certified = Artifact::open(&dir).unwrap();
    let certificate = certified.manifest().certificate.clone().unwrap();
    assert!(certificate.right && certificate.requests.len() == 2 && certificate.nodes > 50, "{certificate:?}");
    assert!(certificate.worst_relative_error.unwrap() < 1e-5 && certificate.top1_agreement == Some(1.0), "{certificate:?}");
    assert_eq!(Manifest { certificate: None, ..certified.manifest().clone() }, *artifact.manifest());
    open_engine(&certified, &CPU).unwrap();
    let text = fs::read(dir.join("manifest.json")).unwrap();
    certify(&certified, run(&certified).certificate()).unwrap();
    assert_eq!(fs::read(dir.join("manifest.json")).unwrap(), text);

    let page = html(&report, &certified).unwrap();
    for part in ["agrees with its checkpoint", "Relative error, worst of each layer", "KL divergence", "decoder: peak", "model.layers.3"] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("<script") && page.matches("src=").count() + page.matches("href=").count() == 0);
}

#[test]
fn another_checkpoint_is_refused() {
    let (_dir, dir) = compiled("qwen2-vl", "cpu");
    let artifact = Artifact::open(&dir).unwrap();
    let failed = verify(&artifact, Model::open(&fixture("shapes-vl")).unwrap(), &[], &OPTIONS).unwrap_err().to_string();
    assert!(failed.contains("shapes-vl: is not what the artifact was compiled from"), "{failed}");
}
