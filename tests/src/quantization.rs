//! What quantization costs on shapes-vl: artifacts of several policies against one of plain weights.

use crate::{CPU, fixture};
use half::f16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{
    fs,
    path::{Path, PathBuf},
};
use vlmc::{
    calibrate::{Budgeted, chosen, requests},
    compile::Model,
    eval::{self, Answer, Evaluated, Score},
    samples::{self, Sample},
    verify::Request,
};
use vlmc_ir::DType;
use vlmc_passes::quantize::Policy;
use vlmc_runtime::Artifact;

/// Most tokens of an answer; the longest of shapes-vl has 7.
const LIMIT: usize = 16;

/// A way to quantize.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    /// By a built-in policy or a file's text.
    Policy(&'static str),
    /// The same with codes for the samples in `calibration.jsonl`.
    Calibrated(&'static str),
    /// Mixed schemes within a number of bits per weight, by the error of outputs.
    Budget(f64),
    /// The decoder's layers as llama.cpp's Q4_0 has them, the rest as `int8`.
    Q4_0,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// On the held-out pictures.
    pub score: Score,
    /// Of linear layers, tables and heads that are quantized, scales counted.
    pub bits_per_weight: Option<f64>,
    /// Of the artifact's weights.
    pub weight_bytes: u64,
}

/// Held-out pictures of shapes-vl, and what the model says of them without quantization.
pub struct Bench {
    target: String,
    samples: Vec<Sample>,
    requests: Vec<Request>,
    answers: Vec<Answer>,
}

impl Bench {
    /// On the first `limit` pictures.
    pub fn new(target: &str, limit: Option<usize>) -> Self {
        let dir = fixture("shapes-vl");
        let out = tempfile::tempdir().expect("a temporary directory");
        let plain = out.path().join("plain");
        crate::compile(&dir, target, &plain);
        let artifact = Artifact::open(&plain).unwrap_or_else(|e| panic!("{e}"));
        let samples = samples::read(&dir.join("heldout.jsonl"), limit).unwrap_or_else(|e| panic!("{e}"));
        let requests = eval::requests(&artifact, &samples).unwrap_or_else(|e| panic!("{e}"));
        let answers = Evaluated::open(&artifact, &CPU).and_then(|mut e| e.answers(&requests, LIMIT)).unwrap_or_else(|e| panic!("{e}"));
        Self { target: target.into(), samples, requests, answers }
    }

    /// Compiles shapes-vl that way, and asks it.
    pub fn run(&self, way: Way) -> Outcome {
        let out = tempfile::tempdir().expect("a temporary directory");
        let (checkpoint, artifact) = (out.path().join("checkpoint"), out.path().join("artifact"));
        let dir = if way == Way::Q4_0 { q4_0(&checkpoint) } else { fixture("shapes-vl") };
        let model = Model::open(&dir).unwrap_or_else(|e| panic!("{e}"));
        let calibration = || {
            let samples = samples::read(&fixture("shapes-vl").join("calibration.jsonl"), None)?;
            requests(&model, &samples)
        };
        let (model, policy) = match way {
            Way::Policy(text) => (model, policy(text)),
            Way::Q4_0 => (model, policy("base = \"int8\"\n[[rule]]\nweights = \"model.layers.*\"\nscheme = \"int4g32\"\n")),
            Way::Calibrated(text) => {
                let (policy, requests) = (policy(text), calibration().unwrap_or_else(|e| panic!("{e}")));
                let (model, report) =
                    model.calibrate(crate::target(&self.target), &chosen(&policy), &requests, &|_| {}).unwrap_or_else(|e| panic!("{e}"));
                assert!(!report.is_empty());
                (model, policy)
            }
            Way::Budget(bits) => {
                let requests = calibration().unwrap_or_else(|e| panic!("{e}"));
                let Budgeted { model, policy, bits_per_weight, .. } =
                    model.within_budget(crate::target(&self.target), bits, &requests, &|_| {}).unwrap_or_else(|e| panic!("{e}"));
                assert!(bits_per_weight <= bits, "{bits_per_weight} of {bits}");
                (model, policy)
            }
        };
        let report = crate::compile_with(&model, &self.target, &policy, &artifact).unwrap_or_else(|e| panic!("{e}"));
        let artifact = Artifact::open(&artifact).unwrap_or_else(|e| panic!("{e}"));
        let score = Evaluated::open(&artifact, &CPU).and_then(|mut e| e.score(&self.samples, &self.requests, &self.answers, LIMIT));
        Outcome {
            score: score.unwrap_or_else(|e| panic!("{way:?}: {e}")),
            bits_per_weight: bits_per_weight(&model, &self.target, &policy),
            weight_bytes: report.weight_bytes,
        }
    }
}

/// A built-in policy, or one of a file's text.
pub fn policy(text: &str) -> Policy {
    let policy = if text.contains('=') { Policy::parse(text) } else { Policy::named(text) };
    policy.unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// Bits per weight of what is quantized, scales counted; `None` if nothing is.
pub fn bits_per_weight(model: &Model, target: &str, policy: &Policy) -> Option<f64> {
    let program = model.lower_for(crate::target(target), policy, |_, _| {}).unwrap_or_else(|e| panic!("{e}")).program;
    let (mut bits, mut weights) = (0.0, 0.0);
    for w in program.weights.values() {
        if let DType::Quant(scheme) = w.dtype {
            weights += w.elements() as f64;
            bits += w.elements() as f64 * scheme.bits_per_weight(w.shape.last().copied().unwrap_or(1));
        }
    }
    (weights > 0.0).then(|| bits / weights)
}

/// shapes-vl with the numbers that Q4_0 makes of its decoder's layers. 4-bit groups of 32 stand for them exactly.
fn q4_0(dir: &Path) -> PathBuf {
    fs::create_dir(dir).expect("a temporary directory");
    let from = fixture("shapes-vl");
    for entry in fs::read_dir(&from).expect("the fixture").flatten().filter(|e| e.path().is_file()) {
        fs::copy(entry.path(), dir.join(entry.file_name())).expect("a copy");
    }
    let bytes = fs::read(from.join("model.safetensors")).expect("the weights");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, t)| {
            let is_layer = name.starts_with("model.layers.") && t.shape().len() == 2;
            if !is_layer {
                return (name, t.dtype(), t.shape().to_vec(), t.data().to_vec());
            }
            assert_eq!(t.dtype(), Dtype::BF16);
            let w: Vec<f32> = t.data().as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect();
            (name, Dtype::F32, t.shape().to_vec(), w.chunks(32).flat_map(q4_0_block).flat_map(f32::to_le_bytes).collect())
        })
        .collect();
    let views = tensors.iter().map(|(n, d, s, b)| (n, TensorView::new(*d, s.clone(), b).expect("a tensor")));
    fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).expect("tensors")).expect("a temporary file");
    dir.into()
}

/// What llama.cpp's Q4_0 makes of 32 numbers (`quantize_row_q4_0_ref` in ggml-quants.c).
fn q4_0_block(x: &[f32]) -> Vec<f32> {
    let peak = x.iter().fold(0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    let d = peak / -8.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let kept = f16::from_f32(d).to_f32();
    x.iter().map(|v| ((v * inverse + 8.5) as i32).clamp(0, 15) - 8).map(|code| code as f32 * kept).collect()
}
