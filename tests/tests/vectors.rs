//! Models without prompts, from pictures and texts to labels, scores and vectors, against the numbers of the reference.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use ndarray::{ArrayD, IxDyn};
use std::{fs, path::Path};
use vlmc_runtime::{Classifier, Loaded, Model, PairScorer, Tensor, image::Rgb};
use vlmc_tests::{CPU, Tensors, assert_close, compile, fixture, floats, golden_json, load};

/// A copy of a fixture with a tokenizer for which `t7` is token 7, and which pads with token `pad`.
fn with_tokenizer(name: &str, pad: i64, dir: &Path) -> std::path::PathBuf {
    let to = dir.join("checkpoint");
    fs::create_dir(&to).unwrap();
    for file in fs::read_dir(fixture(name)).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    let vocab: serde_json::Map<String, serde_json::Value> = (0..2000).map(|i| (format!("t{i}"), i.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": pad, "content": format!("t{pad}"), "single_word": true, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
    });
    fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(to.join("tokenizer_config.json"), serde_json::json!({"pad_token": format!("t{pad}")}).to_string()).unwrap();
    to
}

fn pictures(name: &str) -> Vec<Rgb> {
    let golden = golden_json(&fixture(name));
    let file = |p: &serde_json::Value| fixture("pictures").join(format!("{}.png", p.as_str().unwrap()));
    golden["pictures"].as_array().unwrap().iter().map(|p| vlmc_runtime::image::read(&file(p)).unwrap()).collect()
}

fn array(t: &Tensor) -> ArrayD<f32> {
    ArrayD::from_shape_vec(IxDyn(t.shape()), t.f32().unwrap().to_vec()).unwrap()
}

/// The golden's texts, as the tokenizer of [`with_tokenizer`] reads them: without what pads them.
fn texts(golden: &Tensors, pad: i64) -> Vec<String> {
    let ids = golden["input_ids"].i64().unwrap();
    let text = |(i, row): (usize, ndarray::ArrayViewD<'_, i64>)| {
        let row: Vec<i64> = row.iter().copied().collect();
        let len = match golden.get("attention_mask") {
            Some(mask) => mask.i64().unwrap().index_axis(ndarray::Axis(0), i).sum() as usize,
            None => row.iter().rposition(|i| *i != pad).map_or(0, |i| i + 1),
        };
        row[..len].iter().map(|i| format!("t{i}")).collect::<Vec<_>>().join(" ")
    };
    ids.outer_iter().enumerate().map(text).collect()
}

fn pairs_agree(name: &str, pad: i64, target: &str) {
    let dir = tempfile::tempdir().unwrap();
    let artifact = dir.path().join("artifact");
    compile(&with_tokenizer(name, pad, dir.path()), target, &artifact);
    let golden = load(&fixture(name).join("golden.safetensors"));
    let Loaded::Pairs(mut model) = Loaded::open(&artifact, &CPU).unwrap_or_else(|e| panic!("{e}")) else { panic!("not of pairs") };
    let vlmc_runtime::artifact::Task::Contrast(rules) = model.manifest().task.clone() else { panic!("not of pairs") };
    assert_eq!(rules.pad_token_id, pad);
    let texts = texts(&golden, pad);
    let ids = model.tokens(&texts).unwrap_or_else(|e| panic!("{e}"));
    assert!(ids["input_ids"].i64().unwrap().iter().eq(golden["input_ids"].i64().unwrap()), "{name}: {texts:?}: {:?}", ids["input_ids"]);
    let images = model.embed_images(&pictures(name)).unwrap_or_else(|e| panic!("{e}"));
    let words = model.embed_texts(&texts).unwrap_or_else(|e| panic!("{e}"));
    assert_close(&array(&images), floats(&golden, "image_embeds").unwrap(), "image_embeds");
    assert_close(&array(&words), floats(&golden, "text_embeds").unwrap(), "text_embeds");
    let scores = model.score(&images, &words).unwrap();
    let reference = floats(&golden, "logits_per_image").unwrap();
    assert_close(&array(&scores), reference, "logits_per_image");

    let row: Vec<f32> = reference.outer_iter().next().unwrap().iter().copied().collect();
    let probabilities = model.probabilities(&row);
    let sum: f32 = row.iter().map(|s| s.exp()).sum();
    for (p, s) in probabilities.iter().zip(&row) {
        let expected = if rules.sigmoid { 1.0 / (1.0 + (-s).exp()) } else { s.exp() / sum };
        assert!((p - expected).abs() < 1e-6);
    }

    // A longer text is cut off, a shorter one padded.
    let long = vec!["t5"; 3 * rules.max_length].join(" ");
    let tokens = model.tokens(&[long, "t7".into()]).unwrap();
    assert_eq!(tokens["input_ids"].shape(), [2, rules.max_length]);
    assert_eq!(tokens["input_ids"].i64().unwrap()[rules.max_length..rules.max_length + 2], [7, rules.pad_token_id]);
    let live = rules.max_length + if rules.pad_to_max { rules.max_length } else { 1 };
    assert_eq!(tokens["attention_mask"].i64().unwrap().iter().sum::<i64>(), live as i64);
    let short = if rules.pad_to_max { rules.max_length } else { 1 };
    assert_eq!(model.tokens(&["t7".into()]).unwrap()["input_ids"].shape(), [1, short]);
    assert!(model.embed_texts(&[]).is_err() && model.embed_images(&[]).is_err());
}

#[test]
fn pairs_of_clip_and_siglip() {
    for (name, pad) in [("clip", 299), ("siglip", 1), ("siglip2-naflex", 0), ("clip-openai-vit", 0), ("clip-openai-rn", 0)] {
        pairs_agree(name, pad, "cpu");
    }
}

#[test]
fn pairs_on_onnx_cpu() {
    for (name, pad) in [("clip", 299), ("siglip2-naflex", 0)] {
        pairs_agree(name, pad, "onnx-cpu");
    }
}

#[test]
fn labels_of_vit() {
    let golden = load(&fixture("vit").join("golden.safetensors"));
    let logits = floats(&golden, "logits").unwrap();
    let states = floats(&golden, "last_hidden_state").unwrap();
    for target in ["cpu", "onnx-cpu"] {
        let dir = tempfile::tempdir().unwrap();
        let artifact = dir.path().join("artifact");
        compile(&fixture("vit"), target, &artifact);
        let mut model = Classifier::open(&artifact, &CPU).unwrap_or_else(|e| panic!("{e}"));
        let pictures = pictures("vit");
        let labels = model.classify(&pictures, 5).unwrap_or_else(|e| panic!("{e}"));
        for (row, labels) in logits.outer_iter().zip(&labels) {
            let sum: f32 = row.iter().map(|l| l.exp()).sum();
            let mut expected: Vec<(String, f32)> = row.iter().enumerate().map(|(i, l)| (format!("LABEL_{i}"), l.exp() / sum)).collect();
            expected.sort_by(|a, b| b.1.total_cmp(&a.1));
            assert_eq!(labels.len(), 5);
            for (label, (name, probability)) in labels.iter().zip(&expected) {
                assert_eq!(label.label, *name);
                assert!((label.probability - probability).abs() < 1e-4, "{label:?} instead of {probability}");
            }
        }
        let class_tokens = states.index_axis(ndarray::Axis(1), 0).to_owned();
        assert_close(&array(&model.embed_images(&pictures).unwrap()), &class_tokens, "class token");

        // The error says what the model does.
        let wrong = [Model::open(&artifact, &CPU).err(), PairScorer::open(&artifact, &CPU).err()];
        assert!(wrong.into_iter().flatten().all(|e| e.to_string().contains("labels pictures")));
    }
}
