//! What comes before the model, against what the reference libraries give: Pillow's pictures (`fixtures/gen/images.py`), and
//! transformers' sizes, patches, tokens and prompts (`fixtures/gen/qwen2_vl.py`).
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use safetensors::SafeTensors;
use serde_json::Value;
use std::fs;
use vlmc::compile::Model;
use vlmc_runtime::{
    artifact::{Processor, Qwen2VlProcessor, Resample},
    chat::{ChatTemplate, Content, Message},
    image::{self, Rgb},
    processor::{self, smart_resize},
    resize,
    tokenizer::Tokenizer,
};
use vlmc_tests::{fixture, load};

fn golden(name: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(name).join("golden.json")).unwrap()).unwrap()
}

/// Largest and mean difference of a picture from the bytes of `[height, width, 3]`.
fn distance(what: &str, got: &Rgb, shape: &[usize], reference: &[u8]) -> (u8, f64) {
    assert_eq!([got.height(), got.width(), 3], shape, "{what}");
    let differences = || got.data().iter().zip(reference).map(|(a, b)| a.abs_diff(*b));
    (differences().max().unwrap_or(0), differences().map(f64::from).sum::<f64>() / reference.len() as f64)
}

/// Lossless files give Pillow's bytes. Decoders of lossy ones round in their own ways.
#[test]
fn pictures_of_all_kinds_are_those_of_pillow() {
    let dir = fixture("images");
    let bytes = fs::read(dir.join("golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut seen = 0;
    for (name, reference) in tensors.tensors() {
        let Some(file) = name.strip_prefix("rgb/") else { continue };
        let picture = image::read(&dir.join(file)).unwrap_or_else(|e| panic!("{e}"));
        let (largest, mean) = distance(file, &picture, reference.shape(), reference.data());
        let (most, most_mean) = if file.ends_with(".jpg") || file == "lossy.webp" { (6, 1.0) } else { (0, 0.0) };
        assert!(largest <= most && mean <= most_mean, "{file}: differs from Pillow by up to {largest}, {mean:.2} on average");
        seen += 1;
    }
    assert_eq!(seen, 30);
}

#[test]
fn frames_of_a_gif_are_those_of_pillow() {
    let dir = fixture("images");
    let bytes = fs::read(dir.join("golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let reference = tensors.tensor("frames/video.gif").unwrap();
    let frames = image::read_video(&dir.join("video.gif")).unwrap();
    assert_eq!(frames.len(), reference.shape()[0]);
    for (i, frame) in frames.iter().enumerate() {
        let bytes = &reference.data()[i * frame.data().len()..][..frame.data().len()];
        assert_eq!(distance("video.gif", frame, &reference.shape()[1..], bytes), (0, 0.0), "frame {i}");
    }
}

#[test]
fn resized_pictures_are_those_of_pillow() {
    let dir = fixture("images");
    let bytes = fs::read(dir.join("golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let base = image::read(&dir.join("base.png")).unwrap();
    let mut seen = 0;
    for (name, reference) in tensors.tensors() {
        let Some(rest) = name.strip_prefix("resize/") else { continue };
        let filter = match rest.split('/').next().unwrap() {
            "bilinear" => Resample::Bilinear,
            "bicubic" => Resample::Bicubic,
            "lanczos" => Resample::Lanczos,
            other => panic!("{other}"),
        };
        let picture = resize(&base, reference.shape()[1], reference.shape()[0], filter);
        assert_eq!(distance(&name, &picture, reference.shape(), reference.data()), (0, 0.0), "{name}");
        seen += 1;
    }
    assert_eq!(seen, 30);
}

#[test]
fn sizes_are_those_of_smart_resize() {
    let rows = golden("images")["smart_resize"].clone();
    for row in rows.as_array().unwrap() {
        let n = |list: usize, i: usize| row[list][i].as_u64().unwrap() as usize;
        let size = smart_resize(n(0, 0), n(0, 1), n(0, 2), n(0, 3), n(0, 4)).unwrap();
        assert_eq!(size, (n(1, 0), n(1, 1)), "{row}");
    }
    assert_eq!(rows.as_array().unwrap().len(), 48);
    assert!(smart_resize(10, 2001, 28, 56 * 56, 1 << 20).is_err());
}

fn qwen2_vl() -> Qwen2VlProcessor {
    match Model::open(&fixture("qwen2-vl")).unwrap().processor().unwrap() {
        Some(Processor::Qwen2Vl(p)) => p,
        other => panic!("{other:?}"),
    }
}

#[test]
fn patches_of_a_video_are_those_of_the_reference() {
    let dir = fixture("qwen2-vl");
    let tensors = load(&dir.join("golden.safetensors"));
    let frames = tensors["video/frames_u8"].i64().unwrap();
    let (height, width) = (frames.shape()[1], frames.shape()[2]);
    let frames: Vec<Rgb> = frames.outer_iter().map(|f| Rgb::new(width, height, f.iter().map(|v| *v as u8).collect()).unwrap()).collect();
    // The reference got frames of their final size.
    let p = Qwen2VlProcessor { video_min_pixels: height * width, video_max_pixels: height * width, ..qwen2_vl() };
    let pixels = processor::video(&Processor::Qwen2Vl(p), &frames).unwrap();
    assert_eq!(&pixels.clip.grid[..], tensors["video/video_grid_thw"].i64().unwrap().as_slice().unwrap());
    let reference = tensors["video/pixel_values_videos"].f32().unwrap();
    let values = pixels.inputs["pixel_values"].f32().unwrap();
    let largest = values.iter().zip(reference).fold(0f32, |d, (a, b)| d.max((a - b).abs()));
    assert!(values.iter().chain(reference).all(|v| v.is_finite()), "a value is not finite");
    assert!(values.len() == reference.len() && largest <= 1e-6, "pixels differ by {largest}");

    // An odd number of frames: the last one stands twice.
    let odd = processor::video(&Processor::Qwen2Vl(qwen2_vl()), &frames[..5]).unwrap();
    let filled = [&frames[..5], &frames[4..5]].concat();
    assert_eq!(odd, processor::video(&Processor::Qwen2Vl(qwen2_vl()), &filled).unwrap());
}

#[test]
fn tokens_are_those_of_the_reference() {
    let tokenizer = Tokenizer::open(&fixture("qwen2-vl/tokenizer.json")).unwrap();
    let samples = golden("qwen2-vl")["tokenizer_samples"].clone();
    for (text, ids) in samples.as_object().unwrap() {
        let ids: Vec<i64> = ids.as_array().unwrap().iter().map(|i| i.as_i64().unwrap()).collect();
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        let mut stream = tokenizer.stream();
        let mut streamed: String = ids.iter().map(|i| stream.push(*i).unwrap()).collect();
        streamed += &stream.finish().unwrap();
        assert_eq!(streamed, tokenizer.decode(&ids).unwrap(), "{text:?}");
    }
    assert!(samples.as_object().unwrap().len() >= 5);
}

#[test]
fn prompts_are_those_of_the_reference() {
    let dir = fixture("qwen2-vl");
    let template = ChatTemplate::open(|name| Some(dir.join(name)).filter(|p| p.is_file()), None).unwrap().unwrap();
    let part = |p: &Value| match p["type"].as_str() {
        Some("image") => Content::Image,
        Some("video") => Content::Video,
        _ => Content::Text { text: p["text"].as_str().unwrap().into() },
    };
    let mut seen = 0;
    for example in golden("qwen2-vl")["chat_template_examples"].as_array().unwrap() {
        // An option of this template that vlmc does not offer.
        if example.get("add_vision_id").is_some() {
            continue;
        }
        let message = |m: &Value| Message {
            role: m["role"].as_str().unwrap().into(),
            content: match &m["content"] {
                Value::String(text) => vec![Content::Text { text: text.clone() }],
                parts => parts.as_array().unwrap().iter().map(part).collect(),
            },
        };
        let messages: Vec<Message> = example["messages"].as_array().unwrap().iter().map(message).collect();
        let prompt = template.render(&messages, example["add_generation_prompt"].as_bool().unwrap()).unwrap();
        assert_eq!(prompt, example["prompt"].as_str().unwrap());
        seen += 1;
    }
    assert!(seen >= 2);
}
