//! Checkpoints that come quantized, against the model with the weights that AutoGPTQ's and AutoAWQ's own code unpacks.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use serde_json::{Value, json};
use std::{fs, path::Path};
use vlmc::compile::Model;
use vlmc_passes::quantize::Policy;
use vlmc_tests::{check_case, exec_case, fixture, load};

/// `on_cpu`: matrices of the decoder's 14 linear layers after queries, keys and values are packed into one, and gate and up.
fn agrees(name: &str, on_cpu: usize) {
    let dir = fixture(name);
    let golden = load(&dir.join("golden.safetensors"));
    for (target, matrices) in [("cpu", on_cpu), ("onnx-cpu", 14)] {
        let out = tempfile::tempdir().unwrap();
        let out = out.path().join("artifact");
        let model = Model::open(&dir).unwrap_or_else(|e| panic!("{e}"));
        let report = vlmc_tests::compile_with(&model, target, &Policy::none(), &out).unwrap();
        // All linear layers of the decoder keep their codes, and nothing of the checkpoint is left over.
        let kept: usize = report.weights.iter().filter(|(name, _)| name.starts_with("int4g32")).map(|(_, n)| n).sum();
        assert_eq!(kept, matrices, "{target}: {:?}", report.weights);
        assert!(!report.warnings.iter().any(|w| w.contains("not used")), "{:?}", report.warnings);
        check_case("text", &golden, &exec_case(&dir, &out, "text", &[], 0));
    }
}

#[test]
fn gptq() {
    agrees("packed-gptq", 8);
}

/// Zero points, and columns in an order of their own.
#[test]
fn gptq_with_act_order() {
    agrees("packed-gptq-act-order", 14);
}

#[test]
fn awq() {
    agrees("packed-awq", 8);
}

/// The fixture with another setting.
fn changed(name: &str, field: &str, value: Value, to: &Path) {
    fs::copy(fixture(name).join("model.safetensors"), to.join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
    config["quantization_config"][field] = value;
    fs::write(to.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn other_settings_are_refused() {
    let cases = [
        ("packed-gptq", "bits", json!(3), "`quantization_config.bits`: is 3: 4 is supported, and 8 with gptq"),
        ("packed-awq", "bits", json!(8), "`quantization_config.bits`: is 8: 4 is supported, and 8 with gptq"),
        ("packed-gptq", "quant_method", json!("fp8"), "`quantization_config.quant_method`: is \"fp8\": gptq and awq are supported"),
        ("packed-gptq", "checkpoint_format", json!("marlin"), "is \"marlin\": gptq and gptq_v2 are supported"),
        ("packed-awq", "version", json!("gemv"), "`quantization_config.version`: is \"gemv\": only gemm is supported"),
        ("packed-gptq", "group_size", json!(48), "`quantization_config.group_size`: is 48"),
        ("packed-gptq", "group_size", json!(64), "do not fit one another at int4g64"),
    ];
    for (name, field, value, want) in cases {
        let dir = tempfile::tempdir().unwrap();
        changed(name, field, value, dir.path());
        let error = Model::open(dir.path()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}
