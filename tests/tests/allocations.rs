//! Decoding a token takes no memory: all that a run needs is kept from the run before.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use smallvec::SmallVec;
use std::num::NonZero;
use vlmc::compile::{Model, Options};
use vlmc_passes::quantize::Policy;
use vlmc_runtime::{
    Artifact, CpuEngine, Engine, Tensor,
    artifact::{Bindings, DType, Port},
};

/// Counts what is taken, by any thread.
#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

/// Tokens before memory is counted: caches and places have grown by then, and the arena has given back what the prompt needed.
const WARM_UP: usize = 80;
const COUNTED: usize = 30;
/// Pieces of memory that kernels may take for a token of the tiny models here, all of them together: lists of what each thread does.
/// Nothing else takes any.
const KERNELS: u64 = 70;

type Feed<'t> = SmallVec<[(&'t str, &'t Tensor); 16]>;

/// An input for one token after `past`; symbols that a text does not have are 0.
fn input(port: &Port, past: usize) -> Tensor {
    let mut symbols: Bindings = [("batch", 1), ("seq", 1), ("past", past as i64), ("scored", 1)].into_iter().collect();
    port.shape.iter().for_each(|d| {
        d.for_each_symbol(&mut |s| {
            if symbols.get(s).is_none() {
                symbols.set(s, 0)
            }
        })
    });
    let shape: Vec<usize> = port.shape.iter().map(|d| d.eval(&symbols).unwrap() as usize).collect();
    let len = shape.iter().product();
    match port.dtype {
        DType::I64 => Tensor::new(shape, vec![i64::from(port.name != "logit_positions"); len]).unwrap(),
        DType::Bool => Tensor::new(shape, vec![false; len]).unwrap(),
        _ => Tensor::new(shape, vec![0.0f32; len]).unwrap(),
    }
}

/// Decodes tokens, and fails if memory is taken for one.
fn decode(fixture: &str, quant: &str, threads: usize) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("artifact");
    let model = Model::open(&vlmc_tests::fixture(fixture)).unwrap();
    let policy = Policy::named(quant).unwrap();
    model.compile(&Options { target: vlmc_tests::target("cpu"), policy: &policy, out: &out, allow_fallback: false, progress: &|_, _| {} }).unwrap();
    let mut engine = CpuEngine::open(&Artifact::open(&out).unwrap(), NonZero::new(threads)).unwrap();
    let entry = |name: &str| engine.manifest().entries.iter().find(|e| e.name == name).unwrap().clone();
    let (embed, decoder) = (entry("embed"), entry("decoder"));
    let inputs = |ports: &[Port], past| ports.iter().map(|p| input(p, past)).collect::<Vec<_>>();
    // All that the caller makes is made before.
    let tokens: Vec<_> = (0..WARM_UP + COUNTED).map(|past| (inputs(&embed.inputs, past), inputs(&decoder.inputs, past))).collect();
    let name = |p: &Port| p.name.clone();
    let (embed_names, decoder_names): (Vec<_>, Vec<_>) =
        (embed.inputs.iter().map(name).collect(), decoder.inputs.iter().map(name).collect());
    let made: Vec<Option<usize>> = decoder_names.iter().map(|n| embed.outputs.iter().position(|o| o.name == *n)).collect();
    let (mut embeds, mut logits, mut profiler) = (vec![], vec![], None);
    for (past, (ids, rest)) in tokens.iter().enumerate() {
        let feed: Feed<'_> = embed_names.iter().map(String::as_str).zip(ids).collect();
        if past == WARM_UP {
            // It counts from here on.
            profiler = Some(dhat::Profiler::builder().testing().build());
        }
        engine.run_into("embed", &feed, &mut embeds).unwrap();
        let given = decoder_names.iter().zip(rest).zip(&made);
        let feed: Feed<'_> = given.map(|((name, tensor), made)| (name.as_str(), made.map_or(tensor, |i| &embeds[i]))).collect();
        engine.run_into("decoder", &feed, &mut logits).unwrap();
        assert_eq!(engine.past(), past + 1);
        assert!(logits[0].f32().unwrap().iter().all(|v| v.is_finite()));
    }
    let taken = dhat::HeapStats::get().total_blocks;
    let most = KERNELS * COUNTED as u64;
    // When it fails, it writes where memory was taken to dhat-heap.json.
    dhat::assert!(taken <= most, "{fixture} with {quant} weights and {threads} thread(s): {taken} pieces of memory for {COUNTED} tokens");
    drop(profiler);
}

#[test]
fn a_token_takes_no_memory() {
    for (fixture, quant) in [("qwen2-vl", "none"), ("qwen2-vl", "int4"), ("llava-1.5", "int8")] {
        for threads in [1, 2] {
            decode(fixture, quant, threads);
        }
    }
}
