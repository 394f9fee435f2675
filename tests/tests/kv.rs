//! A KV cache of narrower types.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use std::path::Path;
use vlmc::compile::Model;
use vlmc_passes::quantize::Policy;
use vlmc_runtime::{Artifact, Pipeline, Scored, Tensor, Tensors, artifact::DType, open_engine};
use vlmc_tests::{CPU, exec_case, fixture, floats, load};

fn compile(name: &str, target: &str, kv: DType, out: &Path) -> Result<(), String> {
    let model = Model::open(&fixture(name)).unwrap().with_kv(kv);
    vlmc_tests::compile_with(&model, target, &Policy::none(), out).map(|_| ()).map_err(|e| e.to_string())
}

/// Size of the difference of two tensors, relative to the second.
fn error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let (d, n) = a.iter().zip(b).fold((0.0, 0.0), |(d, n), (a, b)| (d + square(a - b), n + square(*b)));
    (d / n).sqrt()
}

/// Rounding keys and values costs little, even on a model of random weights, and costs something.
#[test]
fn rounded_caches_stay_close() {
    let dir = tempfile::tempdir().unwrap();
    let logits = |kv: DType| {
        let artifact = dir.path().join(kv.to_string());
        compile("qwen2-vl", "cpu", kv, &artifact).unwrap();
        let states = Artifact::open(&artifact).unwrap().manifest().entries.iter().flat_map(|e| e.states.clone()).collect::<Vec<_>>();
        assert!(!states.is_empty() && states.iter().all(|s| s.dtype == kv));
        exec_case(&fixture("qwen2-vl"), &artifact, "two", &[], 0)
    };
    let exact = logits(DType::F32);
    let exact = floats(&exact, "logits").unwrap().as_slice().unwrap();
    for (kv, limit) in [(DType::BF16, 5e-3), (DType::I8, 2e-2)] {
        let rounded = logits(kv);
        let e = error(floats(&rounded, "logits").unwrap().as_slice().unwrap(), exact);
        assert!((1e-5..limit).contains(&e), "{kv}: {e}");
    }
}

/// Tokens one by one see what a whole prompt sees, also after the cache was cut back.
#[test]
fn decoding_agrees_with_one_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let golden = load(&fixture("qwen2-vl").join("golden.safetensors"));
    let ids: Vec<i64> = golden["text/input_ids"].i64().unwrap().iter().copied().collect();
    let half = ids.len() / 2;
    assert!(half > 2);
    for kv in [DType::F32, DType::BF16, DType::I8] {
        let artifact = dir.path().join(kv.to_string());
        compile("qwen2-vl", "cpu", kv, &artifact).unwrap();
        let mut pipeline = Pipeline::new(open_engine(&Artifact::open(&artifact).unwrap(), &CPU).unwrap()).unwrap();
        // All logits of the tokens from `first` on, after those before it.
        let prefill = |pipeline: &mut Pipeline, first: usize, end: usize| {
            let tensor = |shape: &[usize], data: Vec<i64>| Tensor::new(shape.to_vec(), data).unwrap();
            let positions: Vec<i64> = (first as i64..end as i64).collect();
            let inputs = Tensors::from([
                ("input_ids".into(), tensor(&[1, end - first], ids[first..end].to_vec())),
                ("position_ids".into(), tensor(&[3, 1, end - first], positions.repeat(3))),
            ]);
            let features = pipeline.features(&inputs).unwrap();
            pipeline.prefill(&inputs, &features, Scored::All).unwrap()
        };
        let whole = prefill(&mut pipeline, 0, ids.len());
        let vocab = *whole.shape().last().unwrap();
        let whole = whole.f32().unwrap();
        pipeline.clear().unwrap();
        prefill(&mut pipeline, 0, half);
        for (i, id) in ids.iter().enumerate().skip(half) {
            let logits = pipeline.extend(&[*id]).unwrap();
            let e = error(logits.f32().unwrap(), &whole[i * vocab..(i + 1) * vocab]);
            assert!(e < 1e-5, "{kv}: token {i}: {e}");
        }
        pipeline.truncate(half).unwrap();
        let again = prefill(&mut pipeline, half, ids.len());
        let e = error(again.f32().unwrap(), &whole[half * vocab..]);
        assert!(e < 1e-5, "{kv}: after truncation: {e}");
    }
}

#[test]
fn other_targets_say_that_they_keep_f32() {
    let dir = tempfile::tempdir().unwrap();
    let error = compile("qwen2-vl", "onnx-cpu", DType::I8, &dir.path().join("a")).unwrap_err();
    assert!(error.contains("target 'onnx-cpu'") && error.contains("states are inputs and outputs of f32, not i8"), "{error}");
}
