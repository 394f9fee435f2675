//! Decoding a token takes no memory: all that a run needs is kept from the run before.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use std::num::NonZero;
use vlmc::compile::Model;
use vlmc_passes::quantize::Policy;
use vlmc_runtime::{
    Artifact, CpuEngine, EngineOptions, Features, Pipeline, Scored, Tensor, Tensors,
    sample::{Sampler, Sampling},
};

/// Counts what is taken, by any thread.
#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

/// Tokens before memory is counted: caches and places have grown by then, and the arena has given back what the prompt needed.
const WARM_UP: usize = 80;
const COUNTED: usize = 30;

/// Decodes tokens, and fails if memory is taken for one. What text takes, which is made of tokens, is not counted.
fn decode(fixture: &str, quant: &str, threads: usize) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("artifact");
    let model = Model::open(&vlmc_tests::fixture(fixture)).unwrap();
    let policy = Policy::named(quant).unwrap();
    vlmc_tests::compile_with(&model, "cpu", &policy, &out).unwrap();
    let engine =
        CpuEngine::open(&Artifact::open(&out).unwrap(), &EngineOptions { threads: NonZero::new(threads), ..EngineOptions::default() })
            .unwrap();
    let mut pipeline = Pipeline::new(Box::new(engine)).unwrap();
    let prompt = Tensors::from([("input_ids".into(), Tensor::new([1, 3], vec![5i64, 6, 7]).unwrap())]);
    pipeline.prefill(&prompt, &Features::default(), Scored::Last).unwrap();
    let greedy = Sampling { do_sample: false, temperature: 1.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 0 };
    let (mut sampler, mut profiler) = (Sampler::new(greedy).unwrap(), None);
    for i in 0..WARM_UP + COUNTED {
        if i == WARM_UP {
            // It counts from here on.
            profiler = Some(dhat::Profiler::builder().testing().build());
        }
        let id = sampler.next(pipeline.logits().unwrap().f32().unwrap(), &[]);
        // As answers run, and every other token as samplers want it.
        let logits = if i % 2 == 0 { pipeline.extend_greedily(&[id]) } else { pipeline.extend(&[id]) }.unwrap();
        assert!(logits.f32().unwrap().iter().all(|v| v.is_finite()));
    }
    let taken = dhat::HeapStats::get().total_blocks;
    // When it fails, it writes where memory was taken to dhat-heap.json.
    dhat::assert!(taken == 0, "{fixture} with {quant} weights and {threads} thread(s): {taken} pieces of memory for {COUNTED} tokens");
    drop(profiler);
}

#[test]
fn a_token_takes_no_memory() {
    for (fixture, quant) in [("qwen2-vl", "none"), ("qwen2-vl", "int4"), ("llava-1.5", "int8"), ("deepseek-vl2-mla", "int4")] {
        for threads in [1, 2] {
            decode(fixture, quant, threads);
        }
    }
}
