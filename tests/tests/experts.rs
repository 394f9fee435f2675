//! Mixtures of experts in ONNX graphs: ONNX Runtime's own operators, of plain and of quantized weights.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests; clippy knows only the tests themselves")]

use std::{collections::BTreeMap, path::Path};
use vlmc::{back::onnx, compile::Model};
use vlmc_passes::quantize::Policy;
use vlmc_tests::{cases, compile_with, exec_case, fixture, floats, quantization::policy, relative_error};

/// Operators of the decoder's nodes, and how many there are of each.
fn operators(artifact: &Path) -> BTreeMap<String, usize> {
    let graph = onnx::read(&artifact.join("decoder.onnx")).unwrap().graph.unwrap();
    graph.node.iter().fold(BTreeMap::new(), |mut found, n| {
        *found.entry(n.op_type().to_string()).or_default() += 1;
        found
    })
}

/// Layers with experts.
fn layers(name: &str) -> usize {
    let program = Model::open(&fixture(name)).unwrap().lower().unwrap().program;
    program.weights.keys().filter(|n| n.ends_with(".experts.gate_proj.weight")).count()
}

#[test]
fn one_node_runs_the_experts_of_a_layer() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["deepseek-vl2-mha", "deepseek-vl2-mla"] {
        let model = Model::open(&fixture(name)).unwrap();
        assert!(layers(name) > 0);
        for (to, wanted) in [("onnx-cpu", layers(name)), ("onnx-cuda:f16", layers(name)), ("onnx-cuda:bf16", 0), ("onnx-tensorrt:f32", 0)] {
            let artifact = dir.path().join(format!("{name}-{}", to.replace(':', "-")));
            compile_with(&model, to, &Policy::none(), &artifact).unwrap();
            assert_eq!(operators(&artifact).get("MoE").copied().unwrap_or(0), wanted, "{name}: {to}");
        }
    }
}

/// Experts of all schemes on `onnx-cpu` give what the same codes give on `cpu`.
#[test]
fn quantized_experts_are_those_of_cpu() {
    let (dir, name) = (tempfile::tempdir().unwrap(), "deepseek-vl2-mha");
    let fixture = fixture(name);
    let model = Model::open(&fixture).unwrap();
    // The experts alone, so that nothing else differs.
    let only = |scheme: &str, activations: &str| {
        let rule = format!("scheme = \"{scheme}\"\nmethod = \"search\"\nactivations = \"{activations}\"");
        policy(&format!("base = \"none\"\n[[rule]]\nweights = \"*.experts.*\"\n{rule}\n"))
    };
    let logits = |to: &str, scheme: &str, activations: &str| -> Vec<f32> {
        let artifact = dir.path().join(format!("{to}-{scheme}-{activations}"));
        compile_with(&model, to, &only(scheme, activations), &artifact).unwrap();
        if to == "onnx-cpu" {
            assert_eq!(operators(&artifact).get("QMoE"), Some(&layers(name)), "{scheme}");
        }
        let of =
            |case: &String| floats(&exec_case(&fixture, &artifact, case, &[], 0), "logits").unwrap().iter().copied().collect::<Vec<_>>();
        cases(&fixture).iter().flat_map(of).collect()
    };
    for scheme in ["int4g32", "int4g32z", "int4g16", "int8"] {
        let reference = logits("cpu", scheme, "f32");
        if scheme != "int8" {
            let error = relative_error(&logits("onnx-cpu", scheme, "f32"), &reference);
            assert!(error <= 1e-4, "{scheme}: {error}");
        }
        // What they read is rounded by other groups than on `cpu`, and in 8 bits whether that is asked for or not.
        let [ours, theirs] = ["cpu", "onnx-cpu"].map(|to| relative_error(&logits(to, scheme, "int8"), &reference));
        println!("{scheme}: rounding what experts read costs {ours:.4} on cpu, {theirs:.4} on onnx-cpu");
        assert!(ours > 0.0 && theirs > 0.0 && theirs <= 2.0 * ours, "{scheme}: {theirs}, and {ours} on cpu");
    }
}

/// What does not fit stays as it is, and the report says why.
#[test]
fn experts_that_cannot_be_quantized() {
    let dir = tempfile::tempdir().unwrap();
    let warnings = |name: &str, to: &str, policy: &Policy| {
        let artifact = dir.path().join(format!("{name}-{to}"));
        let report = compile_with(&Model::open(&fixture(name)).unwrap(), to, policy, &artifact).unwrap();
        assert_eq!(operators(&artifact).get("QMoE"), None);
        report.warnings.join("\n")
    };
    let int4 = Policy::named("int4").unwrap();
    // Rows of 24 columns.
    let blocks = warnings("deepseek-vl2-mla", "onnx-cpu", &int4);
    assert!(blocks.contains("rows of quantized experts must be whole blocks"), "{blocks}");
    let cuda = warnings("deepseek-vl2-mha", "onnx-cuda", &int4);
    assert!(cuda.contains("reads them in an order of its own"), "{cuda}");
    let mixed = policy("base = \"int4\"\n[[rule]]\nweights = \"*.experts.down_proj.weight\"\nscheme = \"int8\"\n");
    let mixed = warnings("deepseek-vl2-mha", "onnx-cpu", &mixed);
    assert!(mixed.contains("experts are quantized alike or not at all"), "{mixed}");
}
