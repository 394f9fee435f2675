//! Every engine against the numbers of the reference implementation (`fixtures/gen/qwen2_vl.py`).
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use ndarray::{ArrayD, Axis, IxDyn};
use std::{collections::BTreeMap, path::Path};
use vlmc::compile::Model;
use vlmc_ir::{
    Bindings, Verified,
    interp::{self, Array, Env},
};
use vlmc_runtime::{Artifact, open_engine};
use vlmc_tests::{assert_close, compile, fixture, load, write_inputs};

const CASES: [&str; 5] = ["chat", "two", "video", "batch", "text"];

type Tensors = BTreeMap<String, Array>;

fn floats<'t>(t: &'t Tensors, name: &str) -> Option<&'t ArrayD<f32>> {
    t.get(name).map(|a| a.f32().unwrap())
}

/// Compares logits where the mask is 1: padded positions mean nothing.
fn check(case: &str, golden: &Tensors, out: &Tensors) {
    let reference = floats(golden, &format!("{case}/logits")).unwrap();
    let mask = golden[&format!("{case}/attention_mask")].i64().unwrap();
    let logits = floats(out, "logits").unwrap();
    // The golden has the last positions only if there are many.
    let (seq, kept) = (logits.shape()[1], reference.shape()[1]);
    for row in 0..logits.shape()[0] {
        let live = mask.index_axis(Axis(0), row).iter().filter(|m| **m != 0).count().min(kept);
        assert!(live > 0, "{case}: nothing to compare in row {row}");
        let part = |a: &ArrayD<f32>, from: usize| a.index_axis(Axis(0), row).slice_axis(Axis(0), (from..).into()).to_owned();
        assert_close(&part(logits, seq - live), &part(reference, kept - live), &format!("{case}: logits of row {row}"));
    }
    let features = floats(golden, &format!("{case}/image_features")).or(floats(golden, &format!("{case}/video_features")));
    assert_eq!(features.is_some(), out.contains_key("image_features"));
    if let Some(features) = features {
        assert_close(floats(out, "image_features").unwrap(), features, &format!("{case}: image_features"));
    }
    if let Some(ids) = out.get("generated_ids") {
        assert_eq!(ids.i64().unwrap(), golden[&format!("{case}/generated_ids")].i64().unwrap(), "{case}: generated_ids");
    }
}

fn engine_agrees(target: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (fixture, artifact) = (fixture("qwen2-vl"), dir.path().join("artifact"));
    compile(&fixture, target, &artifact);
    let golden = load(&fixture.join("golden.safetensors"));
    for case in CASES {
        let (inputs, outputs) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
        write_inputs(&fixture, case, &inputs);
        let engine = open_engine(&Artifact::open(&artifact).unwrap(), None).unwrap_or_else(|e| panic!("{e}"));
        let warnings = vlmc::exec::exec(engine, &inputs, &outputs, 8).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(warnings, Vec::<String>::new());
        let out = load(&outputs);
        assert!(out.contains_key("generated_ids"));
        check(case, &golden, &out);
    }
}

#[test]
fn cpu() {
    engine_agrees("cpu");
}

#[test]
fn onnx_cpu() {
    engine_agrees("onnx-cpu");
}

/// Prefill by the reference interpreter.
fn interpret(program: &Verified, golden: &Tensors, case: &str, weights: &Tensors) -> Tensors {
    let get = |n: &str| golden.get(&format!("{case}/{n}")).cloned();
    let ids = get("input_ids").unwrap();
    let [batch, seq] = [ids.shape()[0], ids.shape()[1]];
    let mut symbols: Bindings =
        [("batch", batch as i64), ("seq", seq as i64), ("past", 0), ("scored", seq as i64), ("features", 0)].into_iter().collect();
    let graph = |name: &str| program.graphs.iter().find(|g| g.name == name).unwrap();
    let run = |name: &str, inputs: Vec<(&str, Array)>, symbols: &Bindings| {
        let inputs = inputs.into_iter().map(|(n, a)| (n.to_string(), a)).collect();
        interp::run(graph(name), &Env { symbols, inputs: &inputs, weights }).unwrap_or_else(|e| panic!("{case}: {e}"))
    };
    let mut out = Tensors::new();
    let mut features =
        Array::F32(ArrayD::zeros(IxDyn(&[0, graph("embed").ty(graph("embed").inputs[1].value).shape[1].as_const().unwrap() as usize])));
    if let (Some(pixels), Some(grid)) =
        (get("pixel_values").or(get("pixel_values_videos")), get("image_grid_thw").or(get("video_grid_thw")))
    {
        symbols.set("image_tokens", pixels.shape()[0] as i64 / 4);
        symbols.set("images", grid.shape()[0] as i64);
        features = run("vision", vec![("pixel_values", pixels), ("image_grid_thw", grid)], &symbols).remove("image_features").unwrap();
        symbols.set("features", features.shape()[0] as i64);
        out.insert("image_features".into(), features.clone());
    }
    let embeds = run("embed", vec![("input_ids", ids), ("image_features", features)], &symbols).remove("inputs_embeds").unwrap();
    let text_positions = || Array::I64(ArrayD::from_shape_fn(IxDyn(&[3, batch, seq]), |i| i[2] as i64));
    let decoder = graph("decoder");
    let mut inputs = vec![
        ("inputs_embeds", embeds),
        ("position_ids", get("position_ids").unwrap_or_else(text_positions)),
        ("attention_mask", get("attention_mask").unwrap()),
        ("logit_positions", Array::I64(ArrayD::from_shape_fn(IxDyn(&[seq]), |i| i[0] as i64))),
    ];
    for s in &decoder.states {
        let shape: Vec<usize> = decoder.ty(s.past).shape.iter().map(|d| d.eval(&symbols).unwrap() as usize).collect();
        inputs.push((&s.past_name, Array::F32(ArrayD::zeros(IxDyn(&shape)))));
    }
    out.insert("logits".into(), run("decoder", inputs, &symbols).remove("logits").unwrap());
    out
}

/// The frontend is right, and every pass of every target keeps the meaning.
#[test]
fn the_interpreter_agrees_after_every_pass() {
    let dir = fixture("qwen2-vl");
    let golden = load(&dir.join("golden.safetensors"));
    let tensors = load(&dir.join("model.safetensors"));
    let source = |name: &str| Ok(tensors[name].f32()?.iter().copied().collect());
    let model = Model::open(&dir).unwrap();
    let check_program = |program: &Verified| {
        let weights = interp::weights(program, &source).unwrap();
        for case in CASES {
            check(case, &golden, &interpret(program, &golden, case, &weights));
        }
    };
    check_program(&model.lower().unwrap().program);
    for target in vlmc::target::TARGETS {
        model.lower_for(target, |_, program| check_program(program)).unwrap();
    }
}

/// What the runtime's image processor makes of a picture is what the reference's made.
#[test]
fn the_processor_makes_the_reference_pixels() {
    let dir = fixture("qwen2-vl");
    let golden = load(&dir.join("golden.safetensors"));
    let Some(vlmc_runtime::artifact::Processor::Qwen2Vl(processor)) = Model::open(&dir).unwrap().processor().unwrap() else {
        panic!("no processor")
    };
    for (case, pictures) in [("chat", vec!["tall"]), ("two", vec!["small", "wide"])] {
        let read = |name: &&str| vlmc_runtime::image::read(&fixture("pictures").join(format!("{name}.png"))).unwrap();
        let patches: Vec<_> = pictures.iter().map(|p| vlmc_runtime::processor::image(&processor, &read(p)).unwrap()).collect();
        let (pixels, grid) = vlmc_runtime::processor::batch(&patches).unwrap().unwrap();
        let reference = golden[&format!("{case}/pixel_values")].f32().unwrap();
        assert_eq!(grid.i64().unwrap(), golden[&format!("{case}/image_grid_thw")].i64().unwrap().as_slice().unwrap());
        let got = ArrayD::from_shape_vec(IxDyn(pixels.shape()), pixels.f32().unwrap().to_vec()).unwrap();
        let (difference, _) = vlmc_tests::difference(&got, reference);
        assert!(difference <= 1e-6, "{case}: pixels differ by {difference}");
    }
}

/// From messages and pictures to text, as the reference does it.
#[test]
fn a_conversation_gives_the_reference_answer() {
    let dir = fixture("qwen2-vl");
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
    let out = tempfile::tempdir().unwrap();
    let artifact = out.path().join("artifact");
    compile(&dir, "cpu", &artifact);
    let mut model = vlmc_runtime::Model::open(Path::new(&artifact), None).unwrap();
    let mut options = model.defaults();
    for case in golden["end_to_end"].as_array().unwrap() {
        let expected: Vec<i64> = case["generated_ids"].as_array().unwrap().iter().map(|i| i.as_i64().unwrap()).collect();
        options.sampling.do_sample = false;
        options.max_new_tokens = expected.len();
        let mut parts = vec![];
        for part in case["messages"][0]["content"].as_array().unwrap() {
            parts.push(match part["type"].as_str().unwrap() {
                "image" => vlmc_runtime::Part::Image(
                    vlmc_runtime::image::read(&fixture("pictures").join(part["image"].as_str().unwrap())).unwrap(),
                ),
                _ => vlmc_runtime::Part::Text(part["text"].as_str().unwrap().into()),
            });
        }
        let mut streamed = String::new();
        let reply = model.conversation(None).unwrap().send(&parts, &options, &mut |t| streamed.push_str(t)).unwrap();
        // The reference goes on after an end of text; an answer does not.
        let ends = &model.manifest().generation.eos_token_ids;
        let until = expected.iter().position(|i| ends.contains(i)).unwrap_or(expected.len());
        assert_eq!(reply.ids, expected[..until]);
        assert_eq!(reply.text, streamed);
        assert!(case["text"].as_str().unwrap().starts_with(&reply.text), "{:?}", reply.text);
    }
}
