//! scratch
use std::path::Path;
use vlmc::{
    calibrate,
    compile::{Model, Options},
    eval::{self, Evaluated},
    samples,
    verify::Request,
};
use vlmc_passes::quantize::Policy;
use vlmc_runtime::{Artifact, prepare::Preparer};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (target, n) = (args[0].as_str(), args[1].parse::<usize>().unwrap());
    let dir = Path::new("fixtures/shapes-vl");
    let held = samples::read(&dir.join("heldout.jsonl"), Some(n)).unwrap();
    let cal = samples::read(&dir.join("calibration.jsonl"), None).unwrap();
    let tmp = tempfile::tempdir().unwrap();
    let build = |name: &str, policy: &Policy, calibrated: bool| {
        let mut model = Model::open(dir).unwrap();
        let out = tmp.path().join(name);
        if calibrated {
            let path = |name: &str| Some(dir.join(name)).filter(|p| p.exists());
            let p = Preparer::new(model.lower().unwrap().task, model.processor().unwrap(), path).unwrap();
            let requests: Vec<Request> = cal.iter().map(|s| Request { name: s.name.clone(), tensors: s.tensors(&p).unwrap() }).collect();
            let t = std::time::Instant::now();
            let (m, report) = model.calibrate(target, std::slice::from_ref(policy), &requests, &|_| {}).unwrap();
            let e: f64 = report.values().map(|m| m[0].error).sum::<f64>() / report.len() as f64;
            println!("calibrated {} weights in {:?}, mean error {e:.5}", report.len(), t.elapsed());
            model = m;
        }
        let r = model.compile(&Options { target, policy, out: &out, progress: &|_, _| {} }).unwrap();
        (out, r.weight_bytes)
    };
    let (out, bytes) = build("none", &Policy::none(), false);
    let art = Artifact::open(&out).unwrap();
    let requests = eval::requests(&art, &held).unwrap();
    let mut reference = Evaluated::open(&art, None).unwrap();
    let answers = reference.answers(&requests, 16).unwrap();
    println!("none {bytes} {:?}", reference.score(&held, &requests, &answers, 16).unwrap());
    let rtn = |scheme: &str, method: &str| {
        Policy::parse(&format!("base = \"int8\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"{scheme}\"\nmethod = \"{method}\""))
            .unwrap()
    };
    for (name, policy, c) in [
        ("int8", Policy::named("int8").unwrap(), false),
        ("int4-round", rtn("int4g32", "round"), false),
        ("int4-search", rtn("int4g32", "search"), false),
        ("int4-gptq-round", rtn("int4g32", "round"), true),
        ("int4-gptq", rtn("int4g32", "search"), true),
        ("int4g64-search", rtn("int4g64", "search"), false),
        ("int4g64-gptq", rtn("int4g64", "search"), true),
        ("int4g128-search", rtn("int4g128", "search"), false),
        ("int4g128-gptq", rtn("int4g128", "search"), true),
        ("int4z-search", rtn("int4g32z", "search"), false),
        ("int4z-gptq", rtn("int4g32z", "search"), true),
    ] {
        let (out, bytes) = build(name, &policy, c);
        let mut e = Evaluated::open(&Artifact::open(&out).unwrap(), None).unwrap();
        println!("{name} {bytes} {:?}", e.score(&held, &requests, &answers, 16).unwrap());
    }
}
