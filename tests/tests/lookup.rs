//! Prompt lookup: the same answers in fewer runs of the decoder.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use std::path::Path;
use vlmc::compile::Model;
use vlmc_passes::quantize::Policy;
use vlmc_runtime::{Artifact, Finish, Part, Pipeline, Reply, Scored, Tensor, Tensors, artifact::DType, image, open_engine};
use vlmc_tests::{CPU, fixture};

fn compile(name: &str, target: &str, policy: &str, kv: DType, out: &Path) {
    let model = Model::open(&fixture(name)).unwrap().with_kv(kv);
    let policy = Policy::named(policy).unwrap();
    vlmc_tests::compile_with(&model, target, &policy, out).unwrap_or_else(|e| panic!("{name}: {e}"));
}

/// Two turns, the first about a picture.
fn turns(artifact: &Path, prompt_lookup: bool, length: usize) -> Vec<(Reply, Vec<i64>)> {
    let mut model = vlmc_runtime::Model::open(artifact, &CPU).unwrap();
    let mut options = model.defaults();
    (options.sampling.do_sample, options.max_new_tokens, options.prompt_lookup) = (false, length, prompt_lookup);
    let picture = Part::Image(image::read(&fixture("pictures").join("wide.png")).unwrap());
    let text = |s: &str| Part::Text(s.into());
    let quotes = text("a b c d, a b c d, a b c d, a b");
    let mut conversation = model.conversation(None).unwrap();
    [vec![picture, quotes], vec![text("And a b c d?")]]
        .iter()
        .map(|parts| {
            let reply = conversation.send(parts, &options, &mut |_| {}).unwrap_or_else(|e| panic!("{e}"));
            (reply, conversation.tokens().to_vec())
        })
        .collect()
}

/// Returns how many tokens were accepted.
fn answers_are_the_same(artifact: &Path, what: &str) -> usize {
    let mut accepted = 0;
    // Lengths that end an answer within what was run ahead.
    for length in [40, 7] {
        let (plain, ahead) = (turns(artifact, false, length), turns(artifact, true, length));
        for ((a, cached), (b, cached_ahead)) in plain.iter().zip(&ahead) {
            assert_eq!((&a.ids, &a.text, a.finish, a.prompt_tokens), (&b.ids, &b.text, b.finish, b.prompt_tokens), "{what}");
            assert_eq!(cached, cached_ahead, "{what}: the cache holds what was accepted");
            assert_eq!(a.lookup, None);
            let report = b.lookup.unwrap();
            // The prompt's run chose one token, each other run one and what was accepted; the end of an answer counts as one.
            let chosen = b.ids.len() + usize::from(b.finish == Finish::Eos);
            assert_eq!(1 + report.passes + report.accepted, chosen, "{what}");
            assert!(report.accepted <= report.proposed);
            accepted += report.accepted;
        }
    }
    accepted
}

#[test]
fn answers_of_all_kinds_of_decoders_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let mut accepted = 0;
    for name in [
        "qwen2-vl",
        "qwen2.5-vl",
        "qwen3-vl",
        "qwen-vl",
        "llava-1.5",
        "llama-3.2-vision",
        "deepseek-vl",
        "deepseek-vl2-mha",
        "deepseek-vl2-mla",
    ] {
        let artifact = dir.path().join(name);
        compile(name, "cpu", "none", DType::F32, &artifact);
        let here = answers_are_the_same(&artifact, name);
        eprintln!("{name}: {here} accepted");
        accepted += here;
    }
    assert!(accepted > 0);
}

#[test]
fn answers_of_quantized_models_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let mut accepted = 0;
    for (policy, kv) in [("int4", DType::F32), ("int8", DType::BF16), ("int4", DType::I8), ("none", DType::BF16), ("none", DType::I8)] {
        for name in ["shapes-vl", "qwen2-vl"] {
            let what = format!("{name} {policy} {kv}");
            let artifact = dir.path().join(&what);
            compile(name, "cpu", policy, kv, &artifact);
            let here = answers_are_the_same(&artifact, &what);
            eprintln!("{what}: {here} accepted");
            accepted += here;
        }
    }
    assert!(accepted > 0);
}

#[test]
fn answers_on_onnx_runtime_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for (name, target) in [
        ("qwen2-vl", "onnx-cpu"),
        ("llama-3.2-vision", "onnx-cpu"),
        ("qwen2-vl", "onnx-cuda:f32"),
        ("qwen2-vl", "onnx-tensorrt:f32"),
        ("llama-3.2-vision", "onnx-tensorrt:f32"),
    ] {
        let artifact = dir.path().join(format!("{name} {target}"));
        compile(name, target, "none", DType::F32, &artifact);
        let accepted = answers_are_the_same(&artifact, &format!("{name} {target}"));
        eprintln!("{name} {target}: {accepted} accepted");
    }
}

/// A row's logits are the same to the last bit alone and among as many as prompt lookup runs. What is retracted leaves no trace.
#[test]
fn rows_do_not_depend_on_their_number() {
    let dir = tempfile::tempdir().unwrap();
    for (i, (name, policy, kv)) in [
        ("qwen2-vl", "none", DType::F32),
        ("qwen2-vl", "none", DType::I8),
        ("shapes-vl", "none", DType::BF16),
        ("shapes-vl", "int8", DType::F32),
        ("shapes-vl", "int4", DType::I8),
        ("deepseek-vl2-mla", "none", DType::F32),
    ]
    .into_iter()
    .enumerate()
    {
        let artifact = dir.path().join(i.to_string());
        compile(name, "cpu", policy, kv, &artifact);
        let mut pipeline = Pipeline::new(open_engine(&Artifact::open(&artifact).unwrap(), &CPU).unwrap()).unwrap();
        let prompt = Tensors::from([("input_ids".into(), Tensor::new([1, 5], vec![5i64, 6, 7, 5, 6]).unwrap())]);
        let features = pipeline.features(&prompt).unwrap();
        let start = |pipeline: &mut Pipeline| {
            pipeline.clear().unwrap();
            pipeline.prefill(&prompt, &features, Scored::Last).unwrap();
        };
        let ids: Vec<i64> = (0..16).map(|i| 3 + i * 7 % 11).collect();
        start(&mut pipeline);
        let alone: Vec<Vec<f32>> = ids.iter().map(|id| pipeline.extend(&[*id]).unwrap().f32().unwrap().to_vec()).collect();
        for rows in [1, 2, 3, 4, 5, 8, 15, 16] {
            start(&mut pipeline);
            // Others, which are forgotten.
            pipeline.extend(&[9, 9]).unwrap();
            pipeline.retract(2).unwrap();
            let logits = pipeline.extend(&ids[..rows]).unwrap();
            let (got, wanted) = (logits.f32().unwrap(), alone[..rows].concat());
            assert_eq!(got, wanted, "{name} {policy} {kv}: {rows} rows");
        }
        // Where only the largest is wanted, heads in planes are not read whole.
        start(&mut pipeline);
        let mut left_out = 0;
        for (id, wanted) in ids.iter().zip(&alone) {
            let logits = pipeline.extend_greedily(&[*id]).unwrap();
            let largest = wanted.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for (got, wanted) in logits.f32().unwrap().iter().zip(wanted) {
                assert!(got == wanted || wanted < got && *got < largest, "{name} {policy} {kv}: {got}, not {wanted}, of {largest}");
                left_out += usize::from(got != wanted);
            }
            assert!(logits.f32().unwrap().contains(&largest), "{name} {policy} {kv}");
        }
        assert_eq!(left_out > 0, policy != "none", "{name} {policy} {kv}: {left_out}");
    }
}

#[test]
fn drawn_answers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let artifact = dir.path().join("a");
    compile("qwen2-vl", "cpu", "none", DType::F32, &artifact);
    let mut model = vlmc_runtime::Model::open(&artifact, &CPU).unwrap();
    let mut options = model.defaults();
    (options.sampling.do_sample, options.sampling.temperature, options.prompt_lookup) = (true, 0.5, true);
    let error = model.conversation(None).unwrap().send(&[Part::Text("a".into())], &options, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("prompt_lookup") && error.contains("temperature 0.5"), "{error}");
}
