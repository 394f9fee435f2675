//! DeepSeek-VL and DeepSeek-VL2 against their references (`fixtures/gen/deepseek_vl_*.py`), besides their goldens: pictures of every
//! case, and prompts without a chat template in the checkpoint.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use serde_json::Value;
use std::fs;
use vlmc::compile::Model;
use vlmc_runtime::{
    Artifact, Part, Pipeline, Tensor, Tensors,
    chat::{ChatTemplate, Content, Message},
    image::{self, Rgb},
    open_engine, processor,
};
use vlmc_tests::{CPU, compile, fixture, golden_json, load};

fn picture(name: &str) -> Rgb {
    image::read(&fixture("pictures").join(format!("{name}.png"))).unwrap_or_else(|e| panic!("{e}"))
}

/// The pictures of every case become the reference's tensors.
#[test]
fn pictures_of_all_cases_are_those_of_the_reference() {
    for (name, tensor) in [("deepseek-vl", "pixel_values"), ("deepseek-vl-hybrid", "pixel_values"), ("deepseek-vl2-mha", "images")] {
        let dir = fixture(name);
        let processor = Model::open(&dir).unwrap().processor().unwrap().unwrap();
        let golden = load(&dir.join("golden.safetensors"));
        let mut seen = 0;
        for (case, about) in golden_json(&dir)["cases"].as_object().unwrap() {
            let Some(reference) = golden.get(&format!("{case}/{tensor}")).map(|t| t.f32().unwrap()) else { continue };
            // Rows of a batch are lists; a list of names is one row, or one picture for each.
            let listed = about["pictures"].as_array().unwrap();
            let names = |v: &Value| v.as_array().map_or(vec![v.clone()], Clone::clone);
            let rows: Vec<Vec<Value>> = match reference.shape()[0] {
                1 => vec![listed.iter().flat_map(names).collect()],
                _ => listed.iter().map(names).collect(),
            };
            for (i, row) in rows.iter().enumerate() {
                let made = row.iter().map(|n| processor::image_among(&processor, &picture(n.as_str().unwrap()), row.len()).unwrap());
                let made: Vec<f32> = made.flat_map(|p| p.inputs[tensor].f32().unwrap().to_vec()).collect();
                let reference: Vec<f32> = reference.index_axis(ndarray::Axis(0), i).iter().copied().collect();
                // What a row has less of than the others is zeros.
                let (there, rest) = reference.split_at(made.len());
                let largest = made.iter().zip(there).fold(0f32, |d, (a, b)| d.max((a - b).abs()));
                assert!(largest <= 1e-6 && rest.iter().all(|v| *v == 0.0), "{name}: {case}: row {i} differs by {largest}");
                seen += 1;
            }
        }
        assert!(seen > 1, "{name}");
    }
}

/// Published checkpoints have no chat template: the reference's code makes the prompt.
#[test]
fn prompts_need_no_template_in_the_checkpoint() {
    for name in ["deepseek-vl", "deepseek-vl2-mla"] {
        let (dir, out) = (fixture(name), tempfile::tempdir().unwrap());
        let artifact = out.path().join("artifact");
        compile(&dir, "cpu", &artifact);
        let model = vlmc_runtime::Model::open(&artifact, &CPU).unwrap();
        let mut config: Value = serde_json::from_slice(&fs::read(dir.join("tokenizer_config.json")).unwrap()).unwrap();
        config.as_object_mut().unwrap().remove("chat_template").unwrap();
        fs::write(out.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let own = model.manifest().task.prompt().unwrap().template.as_deref();
        let template = ChatTemplate::open(|n| Some(out.path().join(n)).filter(|p| p.is_file()), own).unwrap().unwrap();
        let part = |p: &Value| match p["type"].as_str() {
            Some("image") => Content::Image,
            _ => Content::Text { text: p["text"].as_str().unwrap().into() },
        };
        let message = |m: &Value| Message {
            role: m["role"].as_str().unwrap().into(),
            content: match &m["content"] {
                Value::String(text) => vec![Content::Text { text: text.clone() }],
                parts => parts.as_array().unwrap().iter().map(part).collect(),
            },
        };
        let golden = golden_json(&dir);
        let examples = golden["chat_template_examples"].as_array().unwrap().iter().chain(golden["end_to_end"].as_array().unwrap());
        for example in examples {
            let messages: Vec<Message> = example["messages"].as_array().unwrap().iter().map(message).collect();
            assert_eq!(template.render(&messages, true).unwrap(), example["prompt"].as_str().unwrap(), "{name}");
        }
    }
}

/// From three pictures on, none is cut into tiles: also those that came before.
#[test]
fn a_third_picture_makes_other_tensors_of_the_first_two() {
    let (dir, out) = (fixture("deepseek-vl2-mha"), tempfile::tempdir().unwrap());
    let artifact = out.path().join("artifact");
    compile(&dir, "cpu", &artifact);
    let mut model = vlmc_runtime::Model::open(&artifact, &CPU).unwrap();
    let mut options = model.defaults();
    options.max_new_tokens = 4;
    let part = |name: &str| Part::Image(picture(name));
    let mut conversation = model.conversation(None).unwrap();
    conversation.send(&[part("wide"), part("tall")], &options, &mut |_| {}).unwrap();
    let placeholders = |tokens: &[i64]| tokens.iter().filter(|t| **t == 289).count();
    // Tiles of 3 x 3 features: 4 x 3 of the global view, a separator, and of t x t tiles 3 t rows of 3 t + 1.
    let (global, tiles) = (3 * 4 + 1, |across: usize, down: usize| 3 * down * (3 * across + 1));
    let before = placeholders(conversation.tokens());
    assert!(before > 2 * (global + tiles(1, 1)));
    let reply = conversation.send(&[part("small")], &options, &mut |_| {}).unwrap();
    assert_eq!(placeholders(conversation.tokens()), 3 * (global + tiles(1, 1)));
    let turns = conversation.tokens().to_vec();
    drop(conversation);

    // All of it at once gives the same answer.
    let mut conversation = model.conversation(None).unwrap();
    conversation.send(&[part("wide"), part("tall"), part("small")], &options, &mut |_| {}).unwrap();
    assert_eq!(placeholders(conversation.tokens()), placeholders(&turns));
    assert!(!reply.ids.is_empty());
}

/// As many placeholders as the pictures' tiles take tokens, or an error that says so.
#[test]
fn placeholders_must_fit_the_tiles() {
    let dir = fixture("deepseek-vl2-mha");
    let out = tempfile::tempdir().unwrap();
    let artifact = out.path().join("artifact");
    compile(&dir, "cpu", &artifact);
    let golden = load(&dir.join("golden.safetensors"));
    let ints = |name: &str| golden[&format!("chat/{name}")].i64().unwrap();
    for (wanted, given) in [(54, 55), (56, 55)] {
        let images = golden["chat/images"].f32().unwrap();
        let mut mask: Vec<i64> = ints("images_seq_mask").iter().copied().collect();
        let from = mask.iter().position(|m| i64::from(wanted < given) == *m).unwrap();
        mask[from] = i64::from(wanted > given);
        let tensor = |a: &ndarray::ArrayD<i64>| Tensor::new(a.shape(), a.iter().copied().collect::<Vec<_>>()).unwrap();
        let inputs = Tensors::from([
            ("input_ids".into(), tensor(ints("input_ids"))),
            ("images".into(), Tensor::new(images.shape(), images.iter().copied().collect::<Vec<_>>()).unwrap()),
            ("images_spatial_crop".into(), tensor(ints("images_spatial_crop"))),
            ("images_seq_mask".into(), Tensor::new(ints("images_seq_mask").shape(), mask).unwrap()),
        ]);
        let mut pipeline = Pipeline::new(open_engine(&Artifact::open(&artifact).unwrap(), &CPU).unwrap()).unwrap();
        let error = pipeline.features(&inputs).unwrap_err().to_string();
        let expected = format!("the prompt has {wanted} image placeholders, but 'images_spatial_crop' is of pictures of {given} tokens");
        assert_eq!(error, expected);
    }
}
