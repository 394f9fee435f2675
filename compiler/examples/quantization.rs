//! scratch
use std::path::Path;
use vlmc::{
    compile::{Model, Options},
    eval::{self, Evaluated},
    samples,
    verify::Request,
};
use vlmc_passes::quantize::Policy;
use vlmc_runtime::Artifact;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (target, n) = (args[0].as_str(), args[1].parse::<usize>().unwrap());
    let dir = Path::new("fixtures/shapes-vl");
    let held = samples::read(&dir.join("heldout.jsonl"), Some(n)).unwrap();
    let cal = samples::read(&dir.join("calibration.jsonl"), None).unwrap();
    let tmp = tempfile::tempdir().unwrap();
    let build = |name: &str, policy: &Policy, calibrated: Option<&Vec<Request>>| {
        let mut model = Model::open(dir).unwrap();
        let out = tmp.path().join(name);
        if let Some(requests) = calibrated {
            let t = std::time::Instant::now();
            let (m, report) = model.calibrate(target, &vlmc::calibrate::four_bits(policy), requests, &|_| {}).unwrap();
            let e: f64 = report.values().map(|m| m[0].error).sum::<f64>() / report.len() as f64;
            println!("calibrated {} weights in {:?}, mean error {e:.5}", report.len(), t.elapsed());
            model = m;
        }
        let r = model.compile(&Options { target, policy, out: &out, progress: &|_, _| {} }).unwrap();
        (out, r.weight_bytes)
    };
    let (out, bytes) = build("none", &Policy::none(), None);
    let art = Artifact::open(&out).unwrap();
    let requests = eval::requests(&art, &held).unwrap();
    let cal_requests = eval::requests(&art, &cal).unwrap();
    let mut reference = Evaluated::open(&art, None).unwrap();
    let answers = reference.answers(&requests, 16).unwrap();
    println!("none {bytes} {:?}", reference.score(&held, &requests, &answers, 16).unwrap());
    let rtn = |scheme: &str, method: &str| {
        Policy::parse(&format!("base = \"int8\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"{scheme}\"\nmethod = \"{method}\""))
            .unwrap()
    };
    let answered = reference.answers(&cal_requests, 16).unwrap();
    for variant in &args[2..] {
        let parts: Vec<&str> = variant.split(':').collect();
        let policy = if parts[1] == "named" { Policy::named(parts[0]).unwrap() } else { rtn(parts[0], parts[1]) };
        let mut requests_c = cal_requests.clone();
        if parts[2] == "a" {
            for (r, a) in requests_c.iter_mut().zip(&answered) {
                let ids = [r.tensors["input_ids"].i64().unwrap(), &a.ids].concat();
                r.tensors.insert("input_ids".into(), vlmc_runtime::Tensor::new([1, ids.len()], ids).unwrap());
            }
        }
        let (out, bytes) = build(&variant.replace(':', "-"), &policy, (parts[2] != "n").then_some(&requests_c));
        let mut e = Evaluated::open(&Artifact::open(&out).unwrap(), None).unwrap();
        println!("{variant} {bytes} {:?}", e.score(&held, &requests, &answers, 16).unwrap());
    }
}
