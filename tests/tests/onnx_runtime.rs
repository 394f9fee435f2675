//! The engine of ONNX artifacts: the cache between runs, on the processor. How its buffers stay is tested beside the engine.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use vlmc_runtime::{Artifact, Features, Pipeline, Scored, Tensor, Tensors, artifact::State, open_engine};
use vlmc_tests::{CPU, compile, fixture, target, tolerance};

const TARGETS: [&str; 5] = ["onnx-cpu", "onnx-cuda:f32", "onnx-cuda:f16", "onnx-tensorrt:f32", "onnx-tensorrt:f32:17"];

/// Tokens one by one, over several doublings of the cache and after some were forgotten, have the logits that they have in a prompt.
#[test]
fn tokens_one_by_one_are_those_of_a_prompt() {
    // Attention in groups, with pictures beside it, and latent, which has no kernel of its own.
    for name in ["qwen2-vl", "llama-3.2-vision", "deepseek-vl2-mla"] {
        for to in TARGETS {
            let dir = tempfile::tempdir().unwrap();
            let artifact = dir.path().join("artifact");
            compile(&fixture(name), to, &artifact);
            let mut pipeline = Pipeline::new(open_engine(&Artifact::open(&artifact).unwrap(), &CPU).unwrap()).unwrap();
            let ids: Vec<i64> = (0..40).map(|i| 3 + i * 7 % 29).collect();
            let prompt = |n: usize| Tensors::from([("input_ids".to_string(), Tensor::new([1, n], ids[..n].to_vec()).unwrap())]);
            let start = |pipeline: &mut Pipeline, n: usize| {
                pipeline.clear().unwrap();
                pipeline.prefill(&prompt(n), &Features::default(), Scored::All).unwrap()
            };
            let whole = start(&mut pipeline, ids.len());
            let vocab = whole.shape()[2];
            start(&mut pipeline, 3);
            for at in 3..ids.len() {
                if at % 9 == 0 {
                    // Others, which are forgotten.
                    pipeline.extend(&[5, 6, 7, 8, 9]).unwrap();
                    pipeline.retract(5).unwrap();
                }
                let logits = pipeline.extend(&ids[at..=at]).unwrap();
                let expected = &whole.f32().unwrap()[at * vocab..][..vocab];
                let largest = expected.iter().fold(1f32, |m, v| m.max(v.abs()));
                let difference = logits.f32().unwrap().iter().zip(expected).fold(0f32, |d, (a, b)| d.max((a - b).abs()));
                assert!(difference <= tolerance(target(to)) * largest, "{name} for {to}: token {at}: {difference}");
            }
            assert_eq!(pipeline.past(), ids.len());
        }
    }
}

/// The manifest says which states a client may give a longer buffer.
#[test]
fn states_that_are_written_in_place_are_told() {
    for (name, to, in_place) in [
        ("qwen2-vl", "onnx-cpu", true),
        ("qwen2-vl", "onnx-cuda:f16", true),
        ("qwen2-vl", "onnx-tensorrt:f16", false),
        ("deepseek-vl2-mla", "onnx-cuda:f16", false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let artifact = dir.path().join("artifact");
        compile(&fixture(name), to, &artifact);
        let artifact = Artifact::open(&artifact).unwrap();
        let states: Vec<&State> = artifact.manifest().entries.iter().flat_map(|e| &e.states).collect();
        assert!(!states.is_empty() && states.iter().all(|s| s.in_place == in_place), "{name} for {to}");
    }
}

/// A manifest that says so of a graph that does not, or that would load libraries, gives an error and no panic.
#[test]
fn false_manifests_are_errors() {
    let axis = "\"axis\":2";
    for (from, to) in [
        (axis, "\"axis\":2,\"in_place\":true"),
        (axis, "\"axis\":4"),
        (axis, "\"axis\":3"),
        ("trt_profile_min_shapes", "trt_extra_plugin_lib_paths"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let artifact = dir.path().join("artifact");
        compile(&fixture("qwen2-vl"), "onnx-tensorrt:f32", &artifact);
        let path = artifact.join("manifest.json");
        let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let changed = manifest.to_string().replace(from, to);
        assert_ne!(changed, manifest.to_string());
        std::fs::write(&path, changed).unwrap();
        let ask = || {
            let mut pipeline = Pipeline::new(open_engine(&Artifact::open(&artifact)?, &CPU)?)?;
            let inputs = Tensors::from([("input_ids".to_string(), Tensor::new([1, 3], vec![5i64, 6, 7])?)]);
            pipeline.prefill(&inputs, &Features::default(), Scored::Last)?;
            pipeline.extend(&[5])?;
            pipeline.retract(1)?;
            pipeline.extend(&[5]).map(drop)
        };
        let error: vlmc_runtime::Error = ask().unwrap_err();
        assert!(error.to_string().len() > 20, "{error}");
    }
}
