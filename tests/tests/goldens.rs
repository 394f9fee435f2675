//! Every engine against the numbers of the reference implementations (the scripts in `fixtures/gen`).
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use ndarray::{ArrayD, IxDyn};
use vlmc::compile::Model;
use vlmc_ir::{
    Bindings, Verified,
    interp::{self, Array, Env},
};
use vlmc_passes::quantize::Policy;
use vlmc_tests::{Tensors, cases, check_case, fixture, load};

/// For each fixture that answers prompts: goldens on both engines, and the whole way from a picture to an answer.
macro_rules! prompts {
    ($($family:ident: $name:literal),* $(,)?) => {
        $(mod $family {
            #[test]
            fn cpu() {
                vlmc_tests::prompts_agree($name, "cpu");
            }
            #[test]
            fn onnx_cpu() {
                vlmc_tests::prompts_agree($name, "onnx-cpu");
            }
            #[test]
            fn onnx_cuda() {
                ["onnx-cuda:f32", "onnx-cuda:f16"].iter().for_each(|target| vlmc_tests::prompts_agree($name, target));
            }
            #[test]
            fn onnx_tensorrt() {
                let targets = ["onnx-tensorrt:f32", "onnx-tensorrt:f16", "onnx-tensorrt:f32:17"];
                targets.iter().for_each(|target| vlmc_tests::prompts_agree($name, target));
            }
            #[test]
            fn answers() {
                vlmc_tests::answers_agree($name, "cpu");
            }
        })*
    };
}

prompts! {
    qwen2_vl: "qwen2-vl",
    llava: "llava-1.5",
    llava_gqa: "llava-llama3-gqa",
    llama_3_2_vision: "llama-3.2-vision",
    deepseek_vl: "deepseek-vl",
    deepseek_vl_hf: "deepseek-vl-hf",
    deepseek_vl_hybrid: "deepseek-vl-hybrid",
    deepseek_vl_hybrid_hf: "deepseek-vl-hybrid-hf",
    deepseek_vl2_mha: "deepseek-vl2-mha",
    deepseek_vl2_mla: "deepseek-vl2-mla",
    deepseek_vl2_mla_grouplimited: "deepseek-vl2-mla-grouplimited",
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
        let kind = if get("pixel_values").is_some() { "image_features" } else { "video_features" };
        out.insert(kind.into(), features.clone());
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
        for case in cases(&dir) {
            check_case(&case, &golden, &interpret(program, &golden, &case, &weights));
        }
    };
    check_program(&model.lower().unwrap().program);
    for target in ["cpu", "onnx-cpu", "onnx-cuda:f32", "onnx-tensorrt:f32", "onnx-tensorrt:f32:17"].map(vlmc_tests::target) {
        model.lower_for(target, &Policy::none(), |_, program| check_program(program)).unwrap();
    }
}

/// Frontends know every field of the configs.
#[test]
fn no_field_of_a_config_is_unknown() {
    for entry in std::fs::read_dir(fixture("")).unwrap() {
        let dir = entry.unwrap().path();
        if dir.join("golden.json").exists() && dir.join("config.json").exists() {
            let lowered = Model::open(&dir).unwrap_or_else(|e| panic!("{e}")).lower().unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(lowered.unknown, Vec::<String>::new(), "{}", dir.display());
        }
    }
}
