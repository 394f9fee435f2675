//! What is the Qwen models' own: positions that follow the time (Qwen2.5-VL), frames with their times and features of inner layers
//! (Qwen3-VL), pictures between their tokens, prompts and vocabulary of Qwen-VL.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use ndarray::Axis;
use serde_json::Value;
use std::path::Path;
use vlmc_runtime::{Model, Part, Tensor, artifact::Positions, image, processor, prompt, tokenizer::Tokenizer};
use vlmc_tests::{CPU, answers_agree, assert_close, check_case, compile, exec_case, fixture, floats, golden_json, load, prompts_agree};

const TARGETS: [&str; 4] = ["cpu", "onnx-cpu", "onnx-cuda:f32", "onnx-tensorrt:f32"];

/// transformers 5.23 starts what follows a long video before the video's last position; the paper, and transformers before it,
/// after. Positions that are given are taken as they are, and decoding goes on after the largest of them.
#[test]
fn qwen2_5_vl_agrees_with_both_rules_for_positions() {
    let fixture = fixture("qwen2.5-vl");
    let golden = load(&fixture.join("golden.safetensors"));
    for target in TARGETS {
        let dir = tempfile::tempdir().unwrap();
        let artifact = dir.path().join("artifact");
        compile(&fixture, target, &artifact);
        for case in ["chat", "two", "text"] {
            check_case(case, &golden, &exec_case(&fixture, &artifact, case, &[], 8));
        }
        check_case("video", &golden, &exec_case(&fixture, &artifact, "video", &["position_ids"], 8));
        let out = exec_case(&fixture, &artifact, "video", &[], 0);
        assert_close(floats(&out, "logits").unwrap(), floats(&golden, "video/legacy_logits").unwrap(), "positions of the paper");
    }
}

#[test]
fn qwen2_5_vl_answers() {
    TARGETS.iter().for_each(|target| answers_agree("qwen2.5-vl", target));
}

#[test]
fn qwen3_vl_agrees() {
    let fixture = fixture("qwen3-vl");
    let golden = load(&fixture.join("golden.safetensors"));
    for target in TARGETS {
        prompts_agree("qwen3-vl", target);
        answers_agree("qwen3-vl", target);
        let dir = tempfile::tempdir().unwrap();
        let artifact = dir.path().join("artifact");
        compile(&fixture, target, &artifact);
        let out = exec_case(&fixture, &artifact, "two", &[], 0);
        let name = "deepstack_features";
        assert_close(floats(&out, name).unwrap(), floats(&golden, &format!("two/{name}")).unwrap(), name);
    }
}

/// A video's frames, their times in the prompt, and their positions, as the reference has them.
#[test]
fn qwen3_vl_tells_the_time_of_each_frame() {
    let dir = fixture("qwen3-vl");
    let (golden, tensors) = (golden_json(&dir), load(&dir.join("golden.safetensors")));
    let model = vlmc::compile::Model::open(&dir).unwrap();
    let rules = model.lower().unwrap().task.prompt().unwrap().clone();
    let processor = model.processor().unwrap().unwrap();
    let frames = tensors["video/frames_u8"].i64().unwrap();
    let (height, width) = (frames.shape()[1], frames.shape()[2]);
    let frames: Vec<image::Rgb> =
        frames.outer_iter().map(|f| image::Rgb::new(width, height, f.iter().map(|v| *v as u8).collect()).unwrap()).collect();
    let pixels = processor::video(&processor, &frames).unwrap();
    let reference = floats(&tensors, "video/pixel_values_videos").unwrap();
    assert_eq!(pixels.inputs["pixel_values"].shape(), reference.shape());
    let largest = pixels.inputs["pixel_values"].f32().unwrap().iter().zip(reference).fold(0f32, |d, (a, b)| d.max((a - b).abs()));
    assert!(largest <= 1e-6, "{largest}");

    let Positions::Mrope { frame_text: Some(rule), .. } = &rules.positions else { panic!("{:?}", rules.positions) };
    let text = prompt::with_times(&format!("a{}b", rule.video), &rules, &[processor::times(&processor, frames.len())]);
    let placeholder = "<|video_pad|>";
    let expected: String = golden["frame_text"].as_str().unwrap().into();
    let per_frame = expected.matches(placeholder).count() / pixels.clip.runs(&rules).len();
    assert_eq!(text.replace(placeholder, &placeholder.repeat(per_frame)), format!("a{expected}b"));
    // An odd frame is its group's first and last.
    assert_eq!(processor::times(&processor, 3), [0.25, 1.0]);

    let ids = tensors["video/input_ids"].i64().unwrap();
    let ids: Vec<i64> = ids.iter().copied().collect();
    let p = prompt::positions(&ids, &vec![1; ids.len()], ids.len(), &rules, &[], &[pixels.clip]).unwrap();
    assert!(p.ids.iter().eq(tensors["video/position_ids"].i64().unwrap()));
}

/// Frames share one budget (transformers `video_processing_qwen3_vl.py`, `smart_resize`).
#[test]
fn qwen3_vl_resizes_clips() {
    let model = vlmc::compile::Model::open(&fixture("qwen3-vl")).unwrap();
    let processor = model.processor().unwrap().unwrap();
    for (frames, height, width, grid) in [
        (6, 64, 96, [3, 4, 8]),
        (2, 20, 30, [1, 4, 6]),
        (4, 10, 40, [2, 2, 8]),
        (12, 100, 50, [6, 6, 2]),
        (3, 33, 47, [2, 4, 6]),
        (5, 200, 90, [3, 10, 4]),
    ] {
        let frame = image::Rgb::new(width, height, vec![0; 3 * width * height]).unwrap();
        let pixels = processor::video(&processor, &vec![frame; frames]).unwrap();
        assert_eq!(pixels.clip.grid, grid, "{frames} frames of {width}x{height}");
    }
}

/// The pictures of Qwen-VL's cases, from the rows of the goldens' pixels.
fn qwen_vl_case(artifact: &Path, case: &str, new_tokens: usize) -> vlmc_tests::Tensors {
    let dir = fixture("qwen-vl");
    let rows: &[usize] = match case {
        "chat" => &[0],
        "two" => &[1, 0],
        _ => &[],
    };
    let tensors = load(&dir.join("golden.safetensors"));
    let pixels = floats(&tensors, "pixel_values").unwrap().select(Axis(0), rows);
    let ids = tensors[&format!("{case}/input_ids")].i64().unwrap();
    let mut inputs = vlmc_runtime::Tensors::new();
    inputs.insert("input_ids".into(), Tensor::new(ids.shape(), ids.iter().copied().collect::<Vec<_>>()).unwrap());
    if !rows.is_empty() {
        inputs.insert("pixel_values".into(), Tensor::new(pixels.shape(), pixels.iter().copied().collect::<Vec<_>>()).unwrap());
    }
    let engine = vlmc_runtime::open_engine(&vlmc_runtime::Artifact::open(artifact).unwrap(), &CPU).unwrap();
    let mut pipeline = vlmc_runtime::Pipeline::new(engine).unwrap();
    let features = pipeline.features(&inputs).unwrap();
    let logits = pipeline.prefill(&inputs, &features, vlmc_runtime::Scored::All).unwrap();
    let array = |t: &Tensor| match t.f32() {
        Ok(v) => vlmc_ir::interp::Array::F32(ndarray::ArrayD::from_shape_vec(t.shape(), v.to_vec()).unwrap()),
        Err(_) => vlmc_ir::interp::Array::I64(ndarray::ArrayD::from_shape_vec(t.shape(), t.i64().unwrap().to_vec()).unwrap()),
    };
    let mut out: vlmc_tests::Tensors = features.image.iter().flatten().map(|(n, t)| (n.clone(), array(t))).collect();
    out.insert("generated_ids".into(), array(&pipeline.continue_greedily(&logits, new_tokens).unwrap()));
    out.insert("logits".into(), array(&logits));
    out
}

#[test]
fn qwen_vl_agrees() {
    let dir = fixture("qwen-vl");
    let golden = load(&dir.join("golden.safetensors"));
    for target in TARGETS {
        let out = tempfile::tempdir().unwrap();
        let artifact = out.path().join("artifact");
        compile(&dir, target, &artifact);
        for case in ["chat", "two", "text"] {
            check_case(case, &golden, &qwen_vl_case(&artifact, case, 8));
        }
    }
}

/// Pixels, tokens and answer of the example. Between `<img>` and `</img>` the reference has the name of the file, which the
/// picture overwrites.
#[test]
fn qwen_vl_answers() {
    let dir = fixture("qwen-vl");
    let (golden, tensors) = (golden_json(&dir), load(&dir.join("golden.safetensors")));
    let out = tempfile::tempdir().unwrap();
    let artifact = out.path().join("artifact");
    compile(&dir, "cpu", &artifact);
    let mut model = Model::open(&artifact, &CPU).unwrap();
    let example = &golden["end_to_end"][0];
    let picture = image::read(&fixture("pictures").join("wide.png")).unwrap();
    let pixels = processor::image(model.manifest().processor.as_ref().unwrap(), &picture).unwrap();
    let reference = floats(&tensors, "pixel_values").unwrap().index_axis(Axis(0), 0).to_owned();
    let largest = pixels.inputs["pixel_values"].f32().unwrap().iter().zip(&reference).fold(0f32, |d, (a, b)| d.max((a - b).abs()));
    assert!(largest <= 1e-6 && pixels.inputs["pixel_values"].f32().unwrap().len() == reference.len(), "{largest}");

    let ids = |v: &Value| -> Vec<i64> { v.as_array().unwrap().iter().map(|i| i.as_i64().unwrap()).collect() };
    let rules = model.manifest().task.prompt().unwrap().clone();
    let expected = ids(&example["generated_ids"]);
    let mut options = model.defaults();
    (options.sampling.do_sample, options.max_new_tokens) = (false, expected.len());
    let parts = [Part::Image(picture), Part::Text("What is in the picture?".into())];
    let mut conversation = model.conversation(None).unwrap();
    let reply = conversation.send(&parts, &options, &mut |_| {}).unwrap();
    let wanted = ids(&example["input_ids"]);
    let blank = |ids: &[i64]| {
        let images = prompt::images(ids, ids.len(), &rules);
        ids.iter().zip(images).map(|(id, image)| if image { -1 } else { *id }).collect::<Vec<_>>()
    };
    assert_eq!(blank(&conversation.tokens()[..wanted.len()]), blank(&wanted));
    assert_eq!((reply.ids.clone(), reply.text.as_str()), (expected, example["text"].as_str().unwrap()));
    assert_eq!(conversation.regions(&reply).unwrap(), []);

    // A second turn goes on from the cache where the frequencies are the same, and gives what it gives without one.
    let again = conversation.send(&[Part::Text("Where?".into())], &options, &mut |_| {}).unwrap();
    let cached = conversation.tokens().to_vec();
    drop(conversation);
    let mut pipeline =
        vlmc_runtime::Pipeline::new(vlmc_runtime::open_engine(&vlmc_runtime::Artifact::open(&artifact).unwrap(), &CPU).unwrap()).unwrap();
    let prompt_len = cached.len() + 1 - again.ids.len();
    let inputs = vlmc_runtime::Tensors::from([
        ("input_ids".into(), Tensor::new([1, prompt_len], cached[..prompt_len].to_vec()).unwrap()),
        ("pixel_values".into(), pixels.inputs["pixel_values"].clone()),
    ]);
    let features = pipeline.features(&inputs).unwrap();
    let logits = pipeline.prefill(&inputs, &features, vlmc_runtime::Scored::All).unwrap();
    assert_eq!(pipeline.continue_greedily(&logits, again.ids.len()).unwrap().i64().unwrap(), again.ids);
}

#[test]
fn qwen_vl_tokenizes_as_the_reference() {
    let dir = fixture("qwen-vl");
    let out = tempfile::tempdir().unwrap();
    let artifact = out.path().join("artifact");
    compile(&dir, "cpu", &artifact);
    let tokenizer = Tokenizer::open(&artifact.join("tokenizer.json")).unwrap();
    let samples = golden_json(&dir)["tokenizer_samples"].as_object().unwrap().clone();
    assert!(samples.len() > 5);
    for (text, ids) in samples {
        let ids: Vec<i64> = ids.as_array().unwrap().iter().map(|i| i.as_i64().unwrap()).collect();
        assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{text}");
    }
    // Special tokens that mark places are seen by those who look for places only.
    let ids = tokenizer.encode("<ref>a</ref><box>(1,2),(3,4)</box>").unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), "a(1,2),(3,4)");
    assert_eq!(vlmc_runtime::boxes::regions(&tokenizer.decode_all(&ids).unwrap()).len(), 1);
}

/// Qwen without eyes has the same `model_type`.
#[test]
fn text_only_qwen_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(fixture("qwen-vl").join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("visual");
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let error = vlmc::compile::Model::from_config(&dir.path().join("config.json")).unwrap().lower().err().unwrap().to_string();
    assert!(error.contains("visual") && error.contains("text-only"), "{error}");
}
