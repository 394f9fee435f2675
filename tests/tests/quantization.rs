//! What quantization costs: answers of the trained model, and logits of random ones, which are the worst case.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests; clippy knows only the tests themselves")]

use std::path::Path;
use vlmc::{
    calibrate::{chosen, requests},
    compile::Model,
    samples,
    verify::Request,
};
use vlmc_ir::Scheme;
use vlmc_passes::quantize::{Choice, Part, Policy, parts};
use vlmc_runtime::{Artifact, CpuEngine, EngineOptions, Features, Pipeline, Scored, Tensor, Tensors};
use vlmc_tests::{
    cases, compile, exec_case, fixture, floats,
    quantization::{Bench, Way, bits_per_weight, policy},
    write_inputs,
};

/// Checkpoints of random weights that answer prompts, and whose goldens' cases have all of their inputs.
const RANDOM: [&str; 10] = [
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "llava-1.5",
    "llava-llama3-gqa",
    "llama-3.2-vision",
    "deepseek-vl",
    "deepseek-vl-hybrid",
    "deepseek-vl2-mha",
    "deepseek-vl2-mla",
];

const AWQ: &str = "base = \"int8\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4g32\"\nmethod = \"awq\"\n";
const SMOOTH: &str = "base = \"int8\"\n[[rule]]\nweights = \"visual.blocks.*\"\nscheme = \"int8\"\nmethod = \"smooth\"\n";
const ROUND: &str = "base = \"int8\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4g32\"\nmethod = \"round\"\n";

/// The decoder's layers alone: calibration does not change a table of tokens, and a head of 4 bits costs more than it gains.
const LAYERS: &str = "base = \"int8\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4g32\"\n";

fn shapes_vl(target: &str) {
    let bench = Bench::new(target, None);
    let ways = [
        Way::Policy("none"),
        Way::Policy("int8"),
        Way::Policy(ROUND),
        Way::Q4_0,
        Way::Policy(LAYERS),
        Way::Calibrated(LAYERS),
        Way::Calibrated(AWQ),
        Way::Calibrated(SMOOTH),
        Way::Policy("int4"),
    ];
    let [plain, int8, round, q4_0, search, calibrated, awq, smooth, int4] = ways.map(|way| bench.run(way));
    assert_eq!((plain.score.samples, plain.score.known, plain.score.same), (300, 300, 300));
    assert_eq!(plain.score.max_kl, 0.0);
    // Points of 300 pictures.
    let lost = |right: usize| plain.score.right as i64 - right as i64;
    assert!(lost(int8.score.right) <= 3, "{int8:?}");
    assert!(lost(calibrated.score.right) <= 6, "{calibrated:?}");
    assert!(lost(search.score.right) <= 6 && lost(awq.score.right) <= 6, "{search:?} {awq:?}");
    let kl = [&int8, &calibrated, &search, &round, &q4_0].map(|o| o.score.mean_kl);
    assert!(kl[0] > 0.0 && kl[0] < kl[1] && kl[1] < kl[2] && kl[2] < kl[3] && kl[2] < kl[4], "{kl:?}");
    // With the head in 4 bits, too, better than the layers alone by rounding.
    let head = int4.score.mean_kl;
    assert!(head > kl[2] && head < kl[3] && head < kl[4] && lost(int4.score.right) <= 6, "{int4:?}");
    assert!(int4.weight_bytes < search.weight_bytes);
    // Columns are scaled, and little else changes.
    assert!(awq.score.mean_kl < kl[3] && awq.score.mean_kl != kl[2], "{awq:?}");
    assert!(smooth.score.mean_kl < kl[1] && smooth.score.mean_kl != kl[0] && lost(smooth.score.right) <= 3, "{smooth:?}");
    assert!(search.weight_bytes < int8.weight_bytes && int8.weight_bytes < plain.weight_bytes);
    assert_eq!((search.weight_bytes, search.bits_per_weight), (calibrated.weight_bytes, calibrated.bits_per_weight));
}

#[test]
fn shapes_vl_onnx_cpu() {
    shapes_vl("onnx-cpu");
}

/// A budget is kept, and more bits give a smaller error.
#[test]
fn budgets() {
    let dir = fixture("shapes-vl");
    let data = samples::read(&dir.join("calibration.jsonl"), Some(8)).unwrap();
    let choose = |target: &str, budget: f64, calibrated: bool| {
        let model = Model::open(&dir).unwrap();
        let requests = if calibrated { requests(&model, &data).unwrap() } else { vec![] };
        model.within_budget(vlmc_tests::target(target), budget, &requests, &|_| {})
    };
    for calibrated in [true, false] {
        let mut errors = vec![];
        for budget in [4.3, 5.0, 6.5] {
            let found = choose("onnx-cpu", budget, calibrated).unwrap();
            assert!(found.bits_per_weight <= budget && found.bits_per_weight > budget - 0.25, "{} of {budget}", found.bits_per_weight);
            let overall = bits_per_weight(&found.model, "onnx-cpu", &found.policy).unwrap();
            assert!((overall - found.bits_per_weight).abs() < 1e-9, "{overall} instead of {}", found.bits_per_weight);
            let scheme = |name: &str| found.policy.choice(name, Part::Tower).unwrap().scheme;
            let of = |(name, measured): (&String, &Vec<vlmc::calibrate::Measured>)| {
                measured.iter().find(|m| m.scheme == scheme(name)).map(|m| m.error * m.error)
            };
            errors.push(found.report.iter().map(|m| of(m).unwrap()).sum::<f64>());
        }
        assert!(errors.is_sorted_by(|a, b| a > b), "{errors:?}");
    }
    // 3 bits are for the target that reads them.
    for (target, least) in [("onnx-cpu", "4.1"), ("cpu", "3.")] {
        let error = choose(target, 3.0, false).err().unwrap().to_string();
        assert!(error.contains(&format!("a budget of 3 bits per weight is too small: the least is {least}")), "{error}");
    }
}

#[test]
fn bad_calibration_data() {
    let dir = fixture("shapes-vl");
    let model = || Model::open(&dir).unwrap();
    let int4 = Policy::named("int4").unwrap();
    let of = |data: &Path| samples::read(data, None).and_then(|s| requests(&model(), &s)).unwrap_err().to_string();
    let out = tempfile::tempdir().unwrap();
    assert!(of(out.path()).contains("has no samples"), "{}", of(out.path()));
    let list = out.path().join("list.jsonl");
    std::fs::write(&list, "{\"image\": \"no.png\", \"prompt\": \"What?\"}").unwrap();
    assert!(of(&list).contains("no.png"), "{}", of(&list));
    std::fs::write(out.path().join("no.png"), "not a picture").unwrap();
    assert!(of(&list).contains("no.png"), "{}", of(&list));

    let gptq = policy("base = \"int4\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4\"\nmethod = \"gptq\"\n");
    let artifact = out.path().join("artifact");
    let error = vlmc_tests::compile_with(&model(), "onnx-cpu", &gptq, &artifact).unwrap_err().to_string();
    assert!(error.contains("needs calibration data: give --calibrate"), "{error}");
    assert!(!artifact.exists());

    let run = |requests: &[Request]| {
        model().calibrate(vlmc_tests::target("onnx-cpu"), &chosen(&int4), requests, &|_| {}).err().unwrap().to_string()
    };
    assert!(run(&[]).contains("there are no samples"));
    let empty = Request { name: "line 7".into(), tensors: Tensors::new() };
    assert!(run(&[empty]).contains("line 7"));
}

/// Over all cases of the fixture's goldens, the length of the difference of logits from those without quantization, by policy.
fn errors(name: &str, target: &str, policies: &[(&Policy, bool)]) -> Vec<f64> {
    let dir = tempfile::tempdir().unwrap();
    let fixture = fixture(name);
    let plain = dir.path().join("plain");
    compile(&fixture, target, &plain);
    let logits = |artifact: &Path| -> Vec<f32> {
        let of =
            |case: &String| floats(&exec_case(&fixture, artifact, case, &[], 0), "logits").unwrap().iter().copied().collect::<Vec<_>>();
        cases(&fixture).iter().flat_map(of).collect()
    };
    let reference = logits(&plain);
    let mut out = vec![];
    for (i, (policy, calibrated)) in policies.iter().enumerate() {
        let artifact = dir.path().join(i.to_string());
        let mut model = Model::open(&fixture).unwrap();
        if *calibrated {
            let request = |case: &String| {
                let inputs = dir.path().join("inputs.safetensors");
                write_inputs(&fixture, case, &[], &inputs);
                Request { name: case.clone(), tensors: vlmc::exec::read(&inputs).unwrap() }
            };
            let requests: Vec<Request> = cases(&fixture).iter().map(request).collect();
            model = model
                .calibrate(vlmc_tests::target(target), &chosen(policy), &requests, &|_| {})
                .unwrap_or_else(|e| panic!("{name}: {e}"))
                .0;
        }
        vlmc_tests::compile_with(&model, target, policy, &artifact).unwrap();
        let got = logits(&artifact);
        assert_eq!(got.len(), reference.len());
        out.push(got.iter().zip(&reference).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt());
    }
    out
}

/// `int4`, but by rounding to nearest.
fn rounding(model: &Model) -> Policy {
    let program = model.lower().unwrap().program;
    let int4 = Policy::named("int4").unwrap();
    let mut text = String::from("base = \"int4\"\n");
    for (name, part) in parts(&program) {
        if let Some(Choice { scheme: scheme @ Scheme { bits: 4, .. }, .. }) = int4.choice(&name, part) {
            text += &format!("[[rule]]\nweights = \"{name}\"\nscheme = \"{scheme}\"\nmethod = \"round\"\n");
        }
    }
    policy(&text)
}

/// Checkpoints of random weights: 4 bits lose no more than round to nearest.
fn random_models(target: &str) {
    let int4 = Policy::named("int4").unwrap();
    for name in RANDOM {
        let round = rounding(&Model::open(&fixture(name)).unwrap());
        let [rounded, searched, calibrated] = errors(name, target, &[(&round, false), (&int4, false), (&int4, true)])[..] else { panic!() };
        println!("{target} {name}: round {rounded:.3}, search {searched:.3}, calibrated {calibrated:.3}");
        assert!(rounded > 0.0 && searched <= rounded && calibrated <= rounded, "{name}: {rounded} {searched} {calibrated}");
    }
}

#[test]
fn random_models_onnx_cpu() {
    random_models("onnx-cpu");
}

#[test]
fn random_models_cpu() {
    random_models("cpu");
}

/// Half of a decoder in 3 bits and the rest in 4, calibrated, costs less than all of it in llama.cpp's 4.5.
#[test]
fn three_bits() {
    const THREE: &str = "base = \"int4\"\n[[rule]]\nweights = \"model.layers.*.{gate,up}_proj.weight\"\nscheme = \"int3g128\"\n";
    let bench = Bench::new("cpu", None);
    let [three, q4_0, plain] = [Way::Calibrated(THREE), Way::Q4_0, Way::Policy("none")].map(|way| bench.run(way));
    assert!(three.score.mean_kl > 0.0 && three.score.mean_kl < q4_0.score.mean_kl, "{three:?} {q4_0:?}");
    assert!(plain.score.right <= three.score.right + 6 && three.weight_bytes < q4_0.weight_bytes, "{three:?} {plain:?}");
    // Other targets leave these layers as they are.
    let out = tempfile::tempdir().unwrap();
    let model = Model::open(&fixture("shapes-vl")).unwrap();
    let report = vlmc_tests::compile_with(&model, "onnx-cpu", &policy(THREE), &out.path().join("a")).unwrap();
    let warned =
        report.warnings.iter().any(|w| w.contains("8 weights are not quantized: no operator of ONNX or ONNX Runtime reads 3 bits"));
    assert!(warned, "{:?}", report.warnings);
}

#[test]
fn shapes_vl_cpu() {
    shapes_vl("cpu");
}

/// Where nobody watches, norms of many rows are rounded as they are made.
#[test]
fn long_prompts_that_are_watched_give_the_same() {
    for (name, quant) in [("qwen2-vl", "int8"), ("qwen2-vl", "int4"), ("llava-1.5", "int8")] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("artifact");
        let model = Model::open(&fixture(name)).unwrap();
        vlmc_tests::compile_with(&model, "cpu", &Policy::named(quant).unwrap(), &out).unwrap();
        let artifact = Artifact::open(&out).unwrap();
        let ids: Vec<i64> = (0..130).map(|i| 5 + i % 40).collect();
        let prompt = Tensors::from([("input_ids".into(), Tensor::new([1, ids.len()], ids).unwrap())]);
        let [watched, alone] = [true, false].map(|watched| {
            let mut engine = CpuEngine::open(&artifact, &EngineOptions::default()).unwrap();
            if watched {
                engine.observe(Box::new(|_| Ok(())));
            }
            let mut pipeline = Pipeline::new(Box::new(engine)).unwrap();
            pipeline.prefill(&prompt, &Features::default(), Scored::Last).unwrap();
            pipeline.logits().unwrap().clone()
        });
        assert_eq!(watched, alone, "{name} {quant}");
    }
}
