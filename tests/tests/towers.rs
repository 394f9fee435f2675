//! Classifiers and pairs of towers against the numbers of the reference implementations (`fixtures/gen/vit.py`, `clip.py`,
//! `siglip.py`).
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use std::{fs, path::Path};
use vlmc::{
    arch::{Architecture, SideFiles},
    compile::Model,
};
use vlmc_passes::quantize::Policy;
use vlmc_runtime::{artifact::Task, image::Rgb};
use vlmc_tests::{compile, difference, exec_case, fixture, floats, forward_agrees, golden_json, load, pictures_agree, pixels_agree};

/// For each fixture: goldens on both engines within a tolerance, and pixels.
macro_rules! towers {
    ($($family:ident: $name:literal, $cases:expr, $tolerance:literal;)*) => {
        $(mod $family {
            #[test]
            fn cpu() {
                super::forward_agrees($name, "cpu", &$cases, $tolerance);
            }
            #[test]
            fn onnx_cpu() {
                super::forward_agrees($name, "onnx-cpu", &$cases, $tolerance);
            }
            #[test]
            fn onnx_cuda() {
                ["onnx-cuda:f32", "onnx-cuda:f16"].iter().for_each(|target| super::forward_agrees($name, target, &$cases, $tolerance));
            }
            #[test]
            fn onnx_tensorrt() {
                let targets = ["onnx-tensorrt:f32", "onnx-tensorrt:f16", "onnx-tensorrt:f32:17"];
                targets.iter().for_each(|target| super::forward_agrees($name, target, &$cases, $tolerance));
            }
            #[test]
            fn pictures() {
                super::pictures_agree($name);
            }
        })*
    };
}

// The wrong GELU moves SigLIP's logits by no more than 4e-4, CLIP's by 2.5e-2.
towers! {
    vit: "vit", ["interp"], 1e-4;
    clip: "clip", [], 1e-4;
    clip_openai_vit: "clip-openai-vit", [], 1e-4;
    clip_openai_rn: "clip-openai-rn", [], 1e-4;
    siglip: "siglip", ["interp"], 3e-5;
    siglip2_naflex: "siglip2-naflex", [], 3e-5;
}

/// A copy of a fixture in which a piece of `config.json` is another.
fn changed(name: &str, from: &str, to: &str, out: &Path) {
    fs::create_dir(out).unwrap();
    for file in fs::read_dir(fixture(name)).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), out.join(file.file_name())).unwrap();
    }
    let config = fs::read_to_string(out.join("config.json")).unwrap();
    assert!(config.contains(from));
    fs::write(out.join("config.json"), config.replace(from, to)).unwrap();
}

/// Files of before the end's id was right: the largest id stands for a text.
#[test]
fn old_files_of_clip_pool_at_the_largest_id() {
    let dir = tempfile::tempdir().unwrap();
    let (old, artifact) = (dir.path().join("old"), dir.path().join("artifact"));
    changed("clip", "\"eos_token_id\": 299", "\"eos_token_id\": 2", &old);
    compile(&old, "cpu", &artifact);
    let golden = load(&old.join("golden.safetensors"));
    let mut reference = floats(&golden, "eos2_text_features").unwrap().clone();
    for mut row in reference.outer_iter_mut() {
        let length = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        row.mapv_inplace(|v| v / length);
    }
    let out = exec_case(&old, &artifact, "", &[], 0);
    let (difference, _) = difference(floats(&out, "text_embeds").unwrap(), &reference);
    assert!(difference <= 1e-4, "{difference}");
}

#[test]
fn labels_are_those_of_the_config() {
    let dir = tempfile::tempdir().unwrap();
    let artifact = dir.path().join("artifact");
    compile(&fixture("vit"), "cpu", &artifact);
    let artifact = vlmc_runtime::Artifact::open(&artifact).unwrap();
    let Task::Classify { labels } = &artifact.manifest().task else { panic!("{:?}", artifact.manifest().task) };
    assert_eq!(labels.len(), 7);
    assert_eq!(labels[3], "LABEL_3");
}

/// Losses of given logits (`fixtures/gen/losses.py`): CLIP's, with and without a teacher, and SigLIP's.
fn losses_agree(target: &str) {
    let golden = load(&fixture("losses").join("golden.safetensors"));
    let dir = tempfile::tempdir().unwrap();
    for (name, cases) in [("clip", &["clip"][..]), ("siglip", &["siglip", "siglip_far"])] {
        let artifact = dir.path().join(name);
        let model = Model::open(&fixture(name)).unwrap().with_loss();
        vlmc_tests::compile_with(&model, target, &Policy::none(), &artifact).unwrap();
        for case in cases {
            let out = exec_case(&fixture("losses"), &artifact, case, &["logits_per_image"], 0);
            assert_eq!(out.len(), if name == "clip" { 2 } else { 1 }, "{case}");
            for (loss, got) in out {
                let reference = floats(&golden, &format!("{case}/{loss}")).unwrap();
                let (difference, largest) = difference(got.f32().unwrap(), reference);
                assert!(difference <= 1e-6 * largest.max(1.0), "{case}/{loss} differs by {difference}");
            }
        }
    }
}

#[test]
fn losses_on_cpu() {
    losses_agree("cpu");
}

#[test]
fn losses_on_onnx_cpu() {
    losses_agree("onnx-cpu");
}

#[test]
fn only_pairs_have_a_loss() {
    let error = Model::open(&fixture("vit")).unwrap().with_loss().lower().err().unwrap().to_string();
    assert_eq!(error, "model 'vit': has no loss: only pairs of towers, such as CLIP and SigLIP, have one");
}

/// Pictures of many shapes through processors of many settings (`fixtures/gen/processors.py`).
#[test]
fn processors_make_the_reference_pixels() {
    let dir = fixture("processors");
    let (golden, tensors) = (golden_json(&dir), load(&dir.join("golden.safetensors")));
    let cases = golden["cases"].as_object().unwrap();
    for (case, settings) in cases {
        let config = &settings["config"];
        let files = SideFiles { preprocessor: settings.get("preprocessor").cloned(), ..SideFiles::default() };
        let processor = Architecture::of(config).unwrap().processor(config, &files).unwrap().unwrap();
        let picture = tensors[&format!("{case}/picture")].i64().unwrap();
        let bytes = picture.iter().map(|v| *v as u8).collect();
        let picture = Rgb::new(picture.shape()[1], picture.shape()[0], bytes).unwrap();
        pixels_agree(&processor, &[picture], &tensors, &format!("{case}/"));
    }
    assert_eq!(cases.len(), 72);
}

/// A repository with one tower for timm and the pair for open_clip.
#[test]
fn a_repository_of_open_clip_is_the_pair() {
    let dir = tempfile::tempdir().unwrap();
    let from = fixture("clip-openai-rn");
    fs::copy(from.join("model.safetensors"), dir.path().join("open_clip_model.safetensors")).unwrap();
    fs::copy(from.join("open_clip_config.json"), dir.path().join("open_clip_config.json")).unwrap();
    fs::copy(fixture("vit").join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    fs::write(dir.path().join("config.json"), "{\"architecture\": \"resnet50_clip\"}").unwrap();
    let model = Model::open(dir.path()).unwrap();
    assert_eq!(model.architecture().alias, "clip-openai");
    assert_eq!(model.lower().unwrap().unused, Vec::<String>::new());
}
