//! What conversations have in common is not run again: tokens in the KV cache, and features of pictures.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use std::path::Path;
use vlmc_runtime::{Artifact, Model, Part, Pipeline, Reply, Scored, Tensor, Tensors, image, open_engine, processor, prompt};
use vlmc_tests::{CPU, compile, fixture};

fn picture(name: &str) -> Part {
    Part::Image(image::read(&fixture("pictures").join(name)).unwrap())
}

fn text(s: &str) -> Part {
    Part::Text(s.into())
}

/// The answer of a new conversation, and the tokens that were run or in the cache for it.
fn ask(model: &mut Model, parts: &[Part]) -> (Reply, Vec<i64>) {
    let mut options = model.defaults();
    (options.sampling.do_sample, options.max_new_tokens) = (false, 8);
    let mut conversation = model.conversation(None).unwrap();
    let reply = conversation.send(parts, &options, &mut |_| {}).unwrap_or_else(|e| panic!("{e}"));
    (reply, conversation.tokens().to_vec())
}

fn conversations_share(name: &str, target: &str) {
    let dir = tempfile::tempdir().unwrap();
    let artifact = dir.path().join("artifact");
    compile(&fixture(name), target, &artifact);
    let open = || Model::open(&artifact, &CPU).unwrap();
    // The last is the first upside down: of the same size, and so of the same tokens.
    let (a, b) = (picture("wide.png"), picture("tall.png"));
    let Part::Image(upright) = &a else { panic!() };
    let mut pixels = upright.data().to_vec();
    pixels.reverse();
    let c = Part::Image(image::Rgb::new(upright.width(), upright.height(), pixels).unwrap());

    let mut model = open();
    let attends = name.starts_with("llama");
    for (i, (parts, encoded)) in [
        (vec![a.clone(), text("What is it?")], 1),
        (vec![a.clone(), text("What is it?")], 0),
        (vec![a.clone(), text("What colour has it?")], 0),
        (vec![c.clone(), text("What colour has it?")], 1),
        (vec![c.clone(), a.clone(), text("What differs?")], 0),
        (vec![c.clone(), b.clone(), text("What differs?")], 1),
        (vec![text("What is it?")], 0),
        (vec![a.clone(), text("What is it?")], 0),
    ]
    .into_iter()
    .enumerate()
    {
        let what = format!("{name} {target}: request {i}");
        let before = model.conversation(None).unwrap().tokens().to_vec();
        let (reply, tokens) = ask(&mut model, &parts);
        let (fresh, fresh_tokens) = ask(&mut open(), &parts);
        assert_eq!((&reply.ids, &reply.text), (&fresh.ids, &fresh.text), "{what}");
        assert_eq!((tokens, fresh.cached_tokens), (fresh_tokens.clone(), 0), "{what}");
        assert_eq!(reply.cached_tokens + reply.prompt_tokens, fresh.prompt_tokens, "{what}");
        assert_eq!(reply.images_encoded, encoded, "{what}");
        let common = before.iter().zip(&fresh_tokens[..fresh.prompt_tokens]).take_while(|(a, b)| a == b).count();
        match i {
            0 => assert_eq!(reply.cached_tokens, 0, "{what}"),
            1 => assert_eq!(reply.prompt_tokens, 1, "{what}"),
            2 => assert_eq!(reply.cached_tokens, common, "{what}"),
            // The placeholders are the same, the pictures are not.
            3 => assert!(reply.cached_tokens < common && (attends || reply.cached_tokens > 0), "{what}: {}", reply.cached_tokens),
            _ => {}
        }
    }
}

#[test]
fn conversations_share_on_cpu() {
    for name in ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen-vl", "llava-1.5", "llama-3.2-vision", "deepseek-vl", "deepseek-vl2-mla"] {
        conversations_share(name, "cpu");
    }
}

#[test]
fn conversations_share_on_onnx_runtime() {
    for name in ["qwen2-vl", "llama-3.2-vision"] {
        for target in ["onnx-cpu", "onnx-cuda:f32", "onnx-tensorrt:f32"] {
            conversations_share(name, target);
        }
    }
}

/// A second question about a picture: its logits are those of a run of everything, and decoding goes on at the right positions.
#[test]
fn logits_after_reuse_are_those_of_a_fresh_run() {
    for name in ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-1.5"] {
        let dir = tempfile::tempdir().unwrap();
        let artifact = dir.path().join("artifact");
        compile(&fixture(name), "cpu", &artifact);
        let mut pipeline = Pipeline::new(open_engine(&Artifact::open(&artifact).unwrap(), &CPU).unwrap()).unwrap();
        let rules = pipeline.rules().clone();
        let Part::Image(picture) = picture("wide.png") else { panic!() };
        let pixels = processor::image(pipeline.engine().manifest().processor.as_ref().unwrap(), &picture).unwrap();
        let features = pipeline.features(&pixels.inputs).unwrap();
        let image = rules.image_token_id.unwrap();
        let prompt = |question: &[i64]| {
            let ids = prompt::expand(&[&[5, 6, image, 7][..], question].concat(), &rules, &[pixels.tokens], &[]).unwrap();
            let places = prompt::positions(&ids, &vec![1; ids.len()], ids.len(), &rules, &[pixels.clip], &[]).unwrap();
            (ids, places.ids)
        };
        let run = |pipeline: &mut Pipeline, question: &[i64], from: usize| {
            let (ids, places) = prompt(question);
            let columns: Vec<i64> = places.chunks_exact(ids.len()).flat_map(|row| &row[from..]).copied().collect();
            let axes = if columns.len() > ids.len() - from { vec![3, 1, ids.len() - from] } else { vec![1, ids.len() - from] };
            let inputs = Tensors::from([
                ("input_ids".into(), Tensor::new([1, ids.len() - from], ids[from..].to_vec()).unwrap()),
                ("position_ids".into(), Tensor::new(axes, columns).unwrap()),
            ]);
            let features = if from == 0 { features.clone() } else { vlmc_runtime::Features::default() };
            let first = pipeline.prefill(&inputs, &features, Scored::Last).unwrap();
            let second = pipeline.extend(&[9]).unwrap();
            [first.f32().unwrap(), second.f32().unwrap()].concat()
        };
        run(&mut pipeline, &[8, 3, 4, 11], 0);
        let keep = prompt(&[]).0.len() + 1;
        pipeline.truncate(keep).unwrap();
        let reused = run(&mut pipeline, &[8, 10, 12], keep);
        pipeline.clear().unwrap();
        let fresh = run(&mut pipeline, &[8, 10, 12], 0);
        let largest = fresh.iter().fold(1f32, |m, v| m.max(v.abs()));
        let difference = reused.iter().zip(&fresh).fold(0f32, |d, (a, b)| d.max((a - b).abs()));
        assert!(reused.len() == fresh.len() && difference <= 1e-5 * largest, "{name}: {difference}");
    }
}

/// A long prompt gives the same logits in blocks, whatever stands where they part: pictures, padding, tiles that are attended to.
#[test]
fn blocks_of_a_prompt_give_its_logits() {
    for (name, target) in [
        ("qwen2-vl", "cpu"),
        ("qwen2.5-vl", "cpu"),
        ("qwen3-vl", "cpu"),
        ("qwen-vl", "cpu"),
        ("llava-1.5", "cpu"),
        ("llama-3.2-vision", "cpu"),
        ("deepseek-vl", "cpu"),
        ("deepseek-vl2-mha", "cpu"),
        ("deepseek-vl2-mla", "cpu"),
        ("qwen3-vl", "onnx-cpu"),
        ("llama-3.2-vision", "onnx-cpu"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let artifact = dir.path().join("artifact");
        compile(&fixture(name), target, &artifact);
        let open = || Pipeline::new(open_engine(&Artifact::open(&artifact).unwrap(), &CPU).unwrap()).unwrap();
        let artifact = Artifact::open(&artifact).unwrap();
        let manifest = artifact.manifest().clone();
        let preparer =
            vlmc_runtime::prepare::Preparer::new(manifest.task.clone(), manifest.processor.clone(), |f| artifact.path(f)).unwrap();
        let Part::Image(picture) = picture("wide.png") else { panic!() };
        let mut inputs = preparer.request(Some(&picture), Some("What is it?"), Some("a b c d e f")).unwrap();
        let seq = inputs["input_ids"].shape()[1];
        let run = |inputs: &Tensors, block: usize, scored: Scored| {
            let mut pipeline = open();
            pipeline.set_prefill_block(std::num::NonZero::new(block).unwrap());
            let features = pipeline.features(inputs).unwrap();
            let logits = pipeline.prefill(inputs, &features, scored).unwrap_or_else(|e| panic!("{name}: blocks of {block}: {e}"));
            let next = pipeline.extend(&[7]).unwrap().clone();
            assert_eq!(pipeline.past(), seq + 1);
            (logits.shape().to_vec(), [logits.f32().unwrap(), next.f32().unwrap()].concat())
        };
        for padding in [0, 2] {
            let mask: Vec<i64> = (0..seq).map(|i| i64::from(i >= padding)).collect();
            inputs.insert("attention_mask".into(), Tensor::new([1, seq], mask).unwrap());
            for scored in [Scored::All, Scored::Last] {
                let (shape, whole) = run(&inputs, seq, scored);
                for block in [1, 5, seq / 2, seq - 1] {
                    let (in_blocks, logits) = run(&inputs, block, scored);
                    assert_eq!(in_blocks, shape, "{name}: blocks of {block}");
                    // Padded tokens have logits that mean nothing.
                    let vocab = shape[2];
                    let from = if scored == Scored::All { padding * vocab } else { 0 };
                    let largest = whole[from..].iter().fold(1f32, |m, v| m.max(v.abs()));
                    let difference = logits[from..].iter().zip(&whole[from..]).fold(0f32, |d, (a, b)| d.max((a - b).abs()));
                    assert!(difference <= 1e-5 * largest, "{name} {target}: blocks of {block}: {difference}");
                }
            }
        }
    }
}

fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect()
}

/// Features in a directory serve another process; what is damaged is made anew.
#[test]
fn pictures_are_kept_in_files() {
    let dir = tempfile::tempdir().unwrap();
    let (artifact, kept) = (dir.path().join("artifact"), dir.path().join("some/features"));
    compile(&fixture("qwen3-vl"), "cpu", &artifact);
    let request = [picture("wide.png"), text("What is it?")];
    let run = |kept: &Path| {
        let mut model = Model::open(&artifact, &CPU).unwrap();
        model.cache_images_in(kept).unwrap();
        ask(&mut model, &request).0
    };
    let first = run(&kept);
    assert_eq!((first.images_encoded, files(&kept).len()), (1, 1));
    let second = run(&kept);
    assert_eq!((second.images_encoded, &second.ids), (0, &first.ids));

    let file = &files(&kept)[0];
    let good = std::fs::read(file).unwrap();
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for bad in [&flipped[..], &good[..good.len() - 1], &good[..20], &[]] {
        std::fs::write(file, bad).unwrap();
        let again = run(&kept);
        assert_eq!((again.images_encoded, &again.ids), (1, &first.ids));
        assert!(std::fs::read(file).unwrap() == good, "it is written anew");
    }
    // A file cannot be a directory, and is not needed to answer.
    std::fs::remove_file(file).unwrap();
    std::fs::create_dir(file).unwrap();
    assert_eq!(run(&kept).ids, first.ids);
    let mut model = Model::open(&artifact, &CPU).unwrap();
    assert!(model.cache_images_in(&artifact.join("manifest.json")).is_err());
}

#[test]
fn the_memory_for_pictures_has_a_limit() {
    let dir = tempfile::tempdir().unwrap();
    let artifact = dir.path().join("artifact");
    compile(&fixture("qwen2-vl"), "cpu", &artifact);
    let mut model = Model::open(&artifact, &CPU).unwrap();
    model.limit_image_cache(0);
    let (a, b) = ([picture("wide.png"), text("?")], [picture("tall.png"), text("?")]);
    for parts in [&a, &b, &a] {
        assert_eq!(ask(&mut model, parts).0.images_encoded, 1);
    }
    model.limit_image_cache(1 << 20);
    let encoded: Vec<usize> = [&b, &a, &b].map(|parts| ask(&mut model, parts).0.images_encoded).into();
    assert_eq!(encoded, [1, 1, 0]);
}
