//! Llama 3.2 Vision beyond the goldens: pictures that come turn by turn, and the meaning of its graphs in every pass.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use ndarray::{ArrayD, IxDyn};
use std::path::Path;
use vlmc::compile::Model;
use vlmc_ir::{
    Bindings, Verified,
    interp::{self, Array, Env},
};
use vlmc_passes::quantize::Policy;
use vlmc_runtime::{Artifact, Part, Pipeline, Scored, Tensor, image::Rgb, open_engine, processor};
use vlmc_tests::{CPU, Tensors, check_case, compile, fixture, load};

const NAME: &str = "llama-3.2-vision";
/// `<|image|>` of the fixture.
const IMAGE: i64 = 295;

fn picture(name: &str) -> Rgb {
    vlmc_runtime::image::read(&fixture("pictures").join(name)).unwrap()
}

/// Greedy choices after each of `ids`, from one run over all of them with these pictures in these places.
fn choices(artifact: &Path, ids: &[i64], pictures: &[Rgb], seen_from_to: &[[usize; 2]]) -> Vec<i64> {
    let artifact = Artifact::open(artifact).unwrap();
    let processor = artifact.manifest().processor.clone().unwrap();
    let pixels: Vec<_> = pictures.iter().map(|p| processor::image(&processor, p).unwrap().inputs).collect();
    let mut inputs = vlmc_runtime::Tensors::new();
    for (name, first) in &pixels[0] {
        let shape: Vec<usize> = std::iter::once(pictures.len()).chain(first.shape()[1..].iter().copied()).collect();
        let of = || pixels.iter().map(|p| &p[name]);
        let all = match first.f32() {
            Ok(_) => Tensor::new(shape, of().flat_map(|t| t.f32().unwrap()).copied().collect::<Vec<_>>()),
            Err(_) => Tensor::new(shape, of().flat_map(|t| t.i64().unwrap()).copied().collect::<Vec<_>>()),
        };
        inputs.insert(name.clone(), all.unwrap());
    }
    let used = inputs["aspect_ratio_mask"].i64().unwrap().to_vec();
    let tiles = used.len() / pictures.len();
    let sees = |token: usize, picture: usize| (seen_from_to[picture][0]..seen_from_to[picture][1]).contains(&token);
    let mask: Vec<i64> = (0..ids.len())
        .flat_map(|token| (0..used.len()).map(move |i| (token, i)))
        .map(|(token, i)| if sees(token, i / tiles) { used[i] } else { 0 })
        .collect();
    inputs.insert("cross_attention_mask".into(), Tensor::new([1, ids.len(), pictures.len(), tiles], mask).unwrap());
    inputs.insert("input_ids".into(), Tensor::new([1, ids.len()], ids.to_vec()).unwrap());
    let mut pipeline = Pipeline::new(open_engine(&artifact, &CPU).unwrap()).unwrap();
    let features = pipeline.features(&inputs).unwrap();
    let logits = pipeline.prefill(&inputs, &features, Scored::All).unwrap();
    let largest = |row: &[f32]| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as i64;
    logits.f32().unwrap().chunks(logits.shape()[2]).map(largest).collect()
}

/// Turns that start from a cache give what one run over everything gives.
fn turns_agree(target: &str) {
    let dir = tempfile::tempdir().unwrap();
    let artifact = dir.path().join("artifact");
    compile(&fixture(NAME), target, &artifact);
    let mut model = vlmc_runtime::Model::open(&artifact, &CPU).unwrap_or_else(|e| panic!("{e}"));
    let mut options = model.defaults();
    (options.sampling.do_sample, options.max_new_tokens) = (false, 6);
    let pictures = ["wide.png", "tall.png", "square.png"].map(picture);
    let text = |s: &str| Part::Text(s.into());
    let turns = [
        vec![Part::Image(pictures[0].clone()), text("What is it?")],
        vec![Part::Image(pictures[1].clone()), Part::Image(pictures[2].clone()), text("And these?")],
        vec![text("Really?")],
    ];
    let mut conversation = model.conversation(None).unwrap();
    for (turn, parts) in turns.iter().enumerate() {
        let reply = conversation.send(parts, &options, &mut |_| {}).unwrap_or_else(|e| panic!("{e}"));
        // The answer's last token was not run.
        let ids = conversation.tokens().to_vec();
        let start = ids.len() + 1 - reply.ids.len();
        // Tokens that may see no picture attend to all of them, so that new pictures change what came before them.
        assert_eq!(reply.prompt_tokens == start, turn < 2, "turn {turn}: {} of {start} tokens were run", reply.prompt_tokens);
        let places: Vec<usize> = (0..ids.len()).filter(|i| ids[*i] == IMAGE).collect();
        let mut seen = vec![[places[0], *places.get(1).unwrap_or(&ids.len())]];
        seen.extend(places[1..].iter().map(|p| [*p, ids.len()]));
        let choices = choices(&artifact, &ids, &pictures[..places.len()], &seen);
        assert_eq!(choices[start - 1..], reply.ids, "turn {turn}");
    }
}

#[test]
fn turns_agree_on_cpu() {
    turns_agree("cpu");
}

#[test]
fn turns_agree_on_onnx_cpu() {
    turns_agree("onnx-cpu");
}

/// Prefill by the reference interpreter.
fn interpret(program: &Verified, golden: &Tensors, case: &str, weights: &Tensors) -> Tensors {
    let get = |n: &str| golden.get(&format!("{case}/{n}")).cloned();
    let ids = get("input_ids").unwrap();
    let [batch, seq] = [ids.shape()[0], ids.shape()[1]];
    let reshaped = |a: Array, shape: Vec<usize>| match a {
        Array::F32(a) => Array::F32(a.into_shape_with_order(IxDyn(&shape)).unwrap()),
        Array::I64(a) => Array::I64(a.into_shape_with_order(IxDyn(&shape)).unwrap()),
        a => a,
    };
    let graph = |name: &str| program.graphs.iter().find(|g| g.name == name).unwrap();
    let run = |name: &str, inputs: Vec<(&str, Array)>, symbols: &Bindings| {
        let inputs = inputs.into_iter().map(|(n, a)| (n.to_string(), a)).collect();
        interp::run(graph(name), &Env { symbols, inputs: &inputs, weights }).unwrap_or_else(|e| panic!("{case}: {e}"))
    };
    let values = [("batch", batch), ("seq", seq), ("past", 0), ("scored", seq), ("tiles_past", 0)];
    let mut symbols: Bindings = values.into_iter().map(|(n, v)| (n, v as i64)).collect();
    let mut out = Tensors::new();
    let decoder = graph("decoder");
    let width = |axis: usize| decoder.ty(decoder.inputs[0].value).shape[axis].as_const().unwrap() as usize;
    let (mut states, mut tiles) = (Array::F32(ArrayD::zeros(IxDyn(&[batch, 0, width(2), width(3)]))), 0);
    if let Some(pixels) = get("pixel_values") {
        let shape = pixels.shape().to_vec();
        let images = shape[0] * shape[1];
        tiles = shape[1] * shape[2];
        symbols.set("images", images as i64);
        let inputs = vec![
            ("pixel_values", reshaped(pixels, [&[images], &shape[2..]].concat())),
            ("aspect_ratio_ids", reshaped(get("aspect_ratio_ids").unwrap(), vec![images])),
            ("aspect_ratio_mask", reshaped(get("aspect_ratio_mask").unwrap(), vec![images, shape[2]])),
        ];
        out = run("vision", inputs, &symbols);
        states = reshaped(out["cross_attention_states"].clone(), vec![batch, tiles, width(2), width(3)]);
    }
    symbols.set("tiles", tiles as i64);
    let mask = get("cross_attention_mask").unwrap_or_else(|| Array::I64(ArrayD::zeros(IxDyn(&[batch, seq, 0]))));
    let embeds = run("embed", vec![("input_ids", ids)], &symbols).remove("inputs_embeds").unwrap();
    let mut inputs = vec![
        ("cross_attention_states", states),
        ("cross_attention_mask", reshaped(mask, vec![batch, seq, tiles])),
        ("inputs_embeds", embeds),
        ("position_ids", Array::I64(ArrayD::from_shape_fn(IxDyn(&[batch, seq]), |i| i[1] as i64))),
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

/// Every pass of every target keeps the meaning, that of attention to no pictures included.
#[test]
fn the_interpreter_agrees_after_every_pass() {
    let dir = fixture(NAME);
    let golden = load(&dir.join("golden.safetensors"));
    let tensors = load(&dir.join("model.safetensors"));
    let source = |name: &str| Ok(tensors[name].f32()?.iter().copied().collect());
    let model = Model::open(&dir).unwrap();
    let check_program = |program: &Verified| {
        let weights = interp::weights(program, &source).unwrap();
        for case in ["text", "batch"] {
            check_case(case, &golden, &interpret(program, &golden, case, &weights));
        }
    };
    check_program(&model.lower().unwrap().program);
    for target in ["cpu", "onnx-cpu", "onnx-cuda:f32", "onnx-tensorrt:f32"].map(vlmc_tests::target) {
        model.lower_for(target, &Policy::none(), |_, program| check_program(program)).unwrap();
    }
}
