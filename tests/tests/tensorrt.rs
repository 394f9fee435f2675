//! Quantized graphs for TensorRT, run on the CPU: standard operators mean the same there.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests; clippy knows only the tests themselves")]

use std::{collections::BTreeSet, path::Path};
use vlmc::{
    back::onnx::{self, proto::GraphProto},
    calibrate::chosen,
    compile::Model,
    verify::{Options, Request, verify},
};
use vlmc_passes::quantize::{Outcome, Policy};
use vlmc_runtime::Artifact;
use vlmc_tests::{CPU, cases, compile_with, exec_case, fixture, floats, quantization::policy, relative_error, target, write_inputs};

/// The inputs of the fixture's goldens.
fn requests(name: &str) -> Vec<Request> {
    let (fixture, dir) = (fixture(name), tempfile::tempdir().unwrap());
    let request = |case: &String| {
        let inputs = dir.path().join("inputs.safetensors");
        write_inputs(&fixture, case, &[], &inputs);
        Request { name: case.clone(), tensors: vlmc::exec::read(&inputs).unwrap() }
    };
    cases(&fixture).iter().map(request).collect()
}

/// The fixture's model, calibrated on its goldens' inputs.
fn calibrated(name: &str, to: &str, policy: &Policy) -> Model {
    Model::open(&fixture(name)).unwrap().calibrate(target(to), &chosen(policy), &requests(name), &|_| {}).unwrap().0
}

/// Logits of all cases of the fixture's goldens.
fn logits(name: &str, artifact: &Path) -> Vec<f32> {
    let fixture = fixture(name);
    let of = |case: &String| floats(&exec_case(&fixture, artifact, case, &[], 0), "logits").unwrap().iter().copied().collect::<Vec<_>>();
    cases(&fixture).iter().flat_map(of).collect()
}

/// Products of weights of 8 bits, and those of them whose other operand is rounded too.
fn products(graph: &GraphProto) -> [usize; 2] {
    let made_by = |name: &str| graph.node.iter().find(|n| n.output.iter().any(|o| o == name));
    let rounded = |name: &str| {
        let node = made_by(name).map(|n| if n.op_type() == "Cast" { made_by(&n.input[0]).unwrap_or(n) } else { n });
        node.is_some_and(|n| n.op_type() == "DequantizeLinear" && made_by(&n.input[0]).is_some_and(|q| q.op_type() == "QuantizeLinear"))
    };
    let matrices: BTreeSet<&str> = {
        let from_codes = |n: &str| {
            let node = made_by(n).map(|n| if n.op_type() == "Cast" { made_by(&n.input[0]).unwrap_or(n) } else { n });
            node.is_some_and(|n| n.op_type() == "DequantizeLinear")
        };
        graph.node.iter().filter(|n| n.op_type() == "Transpose" && from_codes(&n.input[0])).map(|n| n.output[0].as_str()).collect()
    };
    let products = || graph.node.iter().filter(|n| n.op_type() == "MatMul" && matrices.contains(n.input[1].as_str()));
    [products().count(), products().filter(|n| rounded(&n.input[0])).count()]
}

/// Both operands of products in 8 bits are rounded, in all versions of the operators; results are near those of `cpu`, which rounds token by
/// token.
#[test]
fn activations_in_8_bits() {
    let int8 = Policy::named("int8").unwrap();
    for name in ["qwen2-vl", "llava-1.5", "deepseek-vl2-mha"] {
        let dir = tempfile::tempdir().unwrap();
        let [plain, ours] = [("plain", Policy::none()), ("ours", int8.clone())].map(|(file, policy)| {
            let artifact = dir.path().join(file);
            compile_with(&Model::open(&fixture(name)).unwrap(), "cpu", &policy, &artifact).unwrap();
            logits(name, &artifact)
        });
        let dynamic = relative_error(&ours, &plain);
        let first = calibrated(name, "onnx-tensorrt:f32", &int8);
        for to in [
            "onnx-tensorrt:f32:17",
            "onnx-tensorrt:f32:19",
            "onnx-tensorrt:f32",
            "onnx-tensorrt:f16:17",
            "onnx-tensorrt:f16:20",
            "onnx-tensorrt:f16",
        ] {
            let artifact = dir.path().join(to.replace(':', "-"));
            let report = compile_with(&first, to, &int8, &artifact).unwrap();
            assert!(!report.warnings.iter().any(|w| w.contains("not rounded")), "{:?}", report.warnings);
            let [all, rounded] = products(&onnx::read(&artifact.join("decoder.onnx")).unwrap().graph.unwrap());
            assert!(all > 0 && rounded == all, "{name}: {to}: {rounded} of {all}");
            if to == "onnx-tensorrt:f32" {
                let options = Options { engine: CPU, new_tokens: 0, progress: &|_| {} };
                let model = Model::open(&fixture(name)).unwrap();
                let report = verify(&Artifact::open(&artifact).unwrap(), model, &requests(name), &options).unwrap();
                assert!(report.is_right(), "{name}: {:?}", report.first_wrong());
            }
            let got = logits(name, &artifact);
            let (from_plain, from_ours) = (relative_error(&got, &plain), relative_error(&got, &ours));
            println!("{name} {to}: {from_plain:.4} from plain, {from_ours:.4} from cpu, which is {dynamic:.4} from plain");
            assert!(from_plain <= 2.0 * dynamic, "{name}: {to}: {from_plain} from plain; cpu's {dynamic}");
            assert!(from_ours <= 2.0 * dynamic, "{name}: {to}: {from_ours} from cpu");
        }
    }
}

/// Without samples nothing is known of what layers read; they are told of.
#[test]
fn layers_without_samples() {
    let (dir, int8) = (tempfile::tempdir().unwrap(), Policy::named("int8").unwrap());
    let artifact = dir.path().join("artifact");
    let report = compile_with(&Model::open(&fixture("llava-1.5")).unwrap(), "onnx-tensorrt:f32", &int8, &artifact).unwrap();
    let told = report.warnings.iter().find(|w| w.contains("read numbers that are not rounded, for which --calibrate is needed"));
    assert!(told.is_some(), "{:?}", report.warnings);
    let [all, rounded] = products(&onnx::read(&artifact.join("decoder.onnx")).unwrap().graph.unwrap());
    assert!(all > 0 && rounded == 0, "{rounded} of {all}");
}

/// Where rows are no whole groups, groups are halved until they are, or the weight is left as it is.
#[test]
fn groups_that_fit() {
    let model = Model::open(&fixture("qwen2-vl")).unwrap();
    let int4 = policy("int4");
    let of = |to: &str, layer: &str| {
        let outcomes = model.lower_for(target(to), &int4, |_, _| {}).unwrap().outcomes;
        match &outcomes[&format!("model.layers.0.{layer}.weight")] {
            Outcome::Done(choice) => choice.scheme.to_string(),
            other => format!("{other:?}"),
        }
    };
    // Rows of 64 and of 136 columns.
    for (to, query, down) in
        [("cpu", "int4g128", "int4g128"), ("onnx-tensorrt:f32", "int4g64", "rows of a quantized matrix must be whole blocks")]
    {
        assert_eq!(of(to, "self_attn.q_proj"), query, "{to}");
        assert!(of(to, "mlp.down_proj").contains(down), "{to}: {}", of(to, "mlp.down_proj"));
    }
}

/// Codes in blocks are numbers again before the product, from opset 21 on; below, the report says that they are left.
#[test]
fn blocks_of_4_bits() {
    // Of the fixtures' layers some have rows that are no whole blocks.
    let scheme = "scheme = \"int4g32\"\nmethod = \"search\"\nactivations = \"f32\"\n";
    let all = policy(&format!("base = \"none\"\n[[rule]]\nweights = \"*proj.weight\"\n{scheme}"));
    for name in ["qwen2-vl", "llava-1.5"] {
        let dir = tempfile::tempdir().unwrap();
        let model = Model::open(&fixture(name)).unwrap();
        let outcomes = model.lower_for(target("onnx-tensorrt:f32"), &all, |_, _| {}).unwrap().outcomes;
        let whole = outcomes.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Done(_)));
        let rules: String = whole.map(|(name, _)| format!("[[rule]]\nweights = \"{name}\"\n{scheme}")).collect();
        let int4 = policy(&format!("base = \"none\"\n{rules}"));
        let ours = dir.path().join("ours");
        compile_with(&model, "cpu", &int4, &ours).unwrap();
        let ours = logits(name, &ours);
        for (to, bound) in
            [("onnx-tensorrt:f32:21", 1e-4), ("onnx-tensorrt:f32", 1e-4), ("onnx-tensorrt:f16:21", 2e-2), ("onnx-tensorrt:f16", 2e-2)]
        {
            let artifact = dir.path().join(to.replace(':', "-"));
            let report = compile_with(&model, to, &int4, &artifact).unwrap();
            assert!(!report.warnings.iter().any(|w| w.contains("codes in blocks")), "{:?}", report.warnings);
            let graph = onnx::read(&artifact.join("decoder.onnx")).unwrap().graph.unwrap();
            assert!(graph.node.iter().any(|n| n.op_type() == "DequantizeLinear"), "{name}: {to}");
            let error = relative_error(&logits(name, &artifact), &ours);
            assert!(error <= bound, "{name}: {to}: {error}");
        }
        let report = compile_with(&model, "onnx-tensorrt:f32:20", &int4, &dir.path().join("20")).unwrap();
        assert!(report.warnings.iter().any(|w| w.contains("codes in blocks need opset 21")), "{:?}", report.warnings);
    }
}
