//! The trained model's answers, from the picture files: the same as the reference implementation's.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use std::path::Path;
use vlmc_runtime::{Model, Part, image};
use vlmc_tests::{CPU, compile, fixture};

fn answers_agree(target: &str) {
    let dir = fixture("shapes-vl");
    let out = tempfile::tempdir().unwrap();
    let artifact = out.path().join("artifact");
    compile(&dir, target, &artifact);
    let mut model = Model::open(Path::new(&artifact), &CPU).unwrap();
    let options = model.defaults();
    let (mut asked, mut right) = (0, 0);
    for line in std::fs::read_to_string(dir.join("heldout.jsonl")).unwrap().lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let text = |key: &str| row[key].as_str().unwrap();
        let picture = image::read(&dir.join(text("image"))).unwrap();
        let parts = [Part::Image(picture), Part::Text(text("question").into())];
        let reply = model.conversation(None).unwrap().send(&parts, &options, &mut |_| {}).unwrap();
        assert_eq!(reply.text, text("reference"), "{}: {}", text("image"), text("question"));
        asked += 1;
        right += usize::from(reply.text == text("answer"));
    }
    assert_eq!(asked, 300);
    assert!(right * 100 >= asked * 95, "only {right} of {asked} answers are right");
}

#[test]
fn cpu() {
    answers_agree("cpu");
}

#[test]
fn onnx_cpu() {
    answers_agree("onnx-cpu");
}

/// A second question costs only its own tokens, and its answer is the one of a conversation that runs everything anew.
#[test]
fn later_turns_use_the_cache() {
    let dir = fixture("shapes-vl");
    let out = tempfile::tempdir().unwrap();
    let artifact = out.path().join("artifact");
    compile(&dir, "cpu", &artifact);
    let mut model = Model::open(Path::new(&artifact), &CPU).unwrap();
    let options = model.defaults();
    let picture = Part::Image(image::read(&dir.join("example.png")).unwrap());
    let ask = |text: &str| Part::Text(text.into());
    let mut conversation = model.conversation(None).unwrap();
    let first = conversation.send(&[picture.clone(), ask("How many shapes are there?")], &options, &mut |_| {}).unwrap();
    let second = conversation.send(&[ask("How many circles are there?")], &options, &mut |_| {}).unwrap();
    assert!(second.prompt_tokens < first.prompt_tokens, "{} tokens, then {}", first.prompt_tokens, second.prompt_tokens);
    assert_eq!((first.text.as_str(), second.text.as_str()), ("four", "two"));

    // A bad request leaves the conversation as it was.
    let mut bad = options.clone();
    bad.sampling.repetition_penalty = -1.0;
    assert!(conversation.send(&[ask("How many squares are there?")], &bad, &mut |_| {}).is_err());
    let third = conversation.send(&[ask("How many squares are there?")], &options, &mut |_| {}).unwrap();
    assert_eq!(third.text, "one");
}

/// Options that end or change an answer.
#[test]
fn stop_texts_seeds_and_lengths() {
    let dir = fixture("shapes-vl");
    let out = tempfile::tempdir().unwrap();
    let artifact = out.path().join("artifact");
    compile(&dir, "cpu", &artifact);
    let mut model = Model::open(Path::new(&artifact), &CPU).unwrap();
    let picture = Part::Image(image::read(&dir.join("example.png")).unwrap());
    let parts = [picture, Part::Text("What is at the top right?".into())];
    let defaults = model.defaults();
    let mut ask = |change: &dyn Fn(&mut vlmc_runtime::GenerateOptions)| {
        let mut options = defaults.clone();
        change(&mut options);
        model.conversation(None).unwrap().send(&parts, &options, &mut |_| {}).unwrap()
    };
    let full = ask(&|_| {});
    assert_eq!(full.finish, vlmc_runtime::Finish::Eos);
    let (first, rest) = full.text.split_once(' ').unwrap();
    let stopped = ask(&|o| o.stop = vec![rest.to_string()]);
    assert_eq!((stopped.text.trim_end(), stopped.finish), (first, vlmc_runtime::Finish::Stop));
    let short = ask(&|o| o.max_new_tokens = 1);
    assert_eq!((short.ids.len(), short.finish), (1, vlmc_runtime::Finish::Length));
    let draw = |seed: u64| {
        move |o: &mut vlmc_runtime::GenerateOptions| {
            o.sampling.do_sample = true;
            o.sampling.temperature = 5.0;
            o.sampling.seed = seed;
            o.max_new_tokens = 12;
        }
    };
    assert_eq!(ask(&draw(1)).ids, ask(&draw(1)).ids);
    assert_ne!(ask(&draw(1)).ids, ask(&draw(2)).ids);
}
