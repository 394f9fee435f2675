//! Whether the target's provider has kernels for the nodes of a graph, with the types that they have.

use super::{MICROSOFT, proto::*};
use crate::target::kernels::{Kernels, Signature};
use std::collections::{BTreeMap, HashMap};
use vlmc_passes::Target;

/// A node that the provider would leave to another one, or refuse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uncovered {
    /// Graph name.
    pub graph: String,
    /// Node name.
    pub node: String,
    /// Operator.
    pub op: String,
    /// Types of its operands; of one that is left out, nothing.
    pub types: Vec<String>,
    /// Why.
    pub reason: String,
}

impl std::fmt::Display for Uncovered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}: {}({}): {}", self.graph, self.node, self.op, self.types.join(", "), self.reason)
    }
}

/// The nodes of `model` that `target`'s provider does not run.
pub fn uncovered(target: &Target, model: &ModelProto) -> Vec<Uncovered> {
    let (Some(kernels), Some(graph)) = (Kernels::of(target), &model.graph) else { return vec![] };
    let opset = model.opset_import.iter().find(|o| o.domain().is_empty()).map_or(0, OperatorSetIdProto::version);
    let mut types: HashMap<&str, String> = HashMap::new();
    for input in &graph.input {
        if let Some(type_proto::Value::TensorType(t)) = input.r#type.as_ref().and_then(|t| t.value.as_ref()) {
            types.insert(input.name(), type_name(t.elem_type()));
        }
    }
    types.extend(graph.initializer.iter().map(|t| (t.name(), type_name(t.data_type()))));
    let mut found = vec![];
    for node in &graph.node {
        let own = node.domain() == MICROSOFT;
        let op = if own { format!("{MICROSOFT}.{}", node.op_type()) } else { node.op_type().to_string() };
        let operands: Vec<String> = node.input.iter().map(|i| types.get(i.as_str()).cloned().unwrap_or_default()).collect();
        let mut report = |reason: String| {
            let node = node.name().to_string();
            found.push(Uncovered { graph: graph.name().into(), node, op: op.clone(), types: operands.clone(), reason });
        };
        let Some(signature) = Signature::of(&op, if own { 1 } else { opset }) else {
            report(format!("opset {opset} has no such operator"));
            continue;
        };
        // Types by parameter, as far as operands tell.
        let mut bound: BTreeMap<&str, &str> = BTreeMap::new();
        for (i, ty) in operands.iter().enumerate().filter(|(_, t)| !t.is_empty()) {
            let Some(parameter) = signature.input(i) else {
                report(format!("it takes no operand {i}"));
                continue;
            };
            let expected = fixed(parameter).or(bound.get(parameter).copied()).unwrap_or(ty);
            if expected != ty {
                report(format!("operand {i} is {ty}, others of its kind are {expected}"));
            }
            bound.insert(parameter, ty);
        }
        let to = node.attribute.iter().find(|a| a.name() == "to").map(|a| type_name(a.i() as i32));
        let results: Vec<Option<String>> = (0..node.output.len())
            .map(|i| {
                let parameter = signature.output(i)?;
                let told = match node.op_type() {
                    "Cast" => to.clone(),
                    // That of the scales.
                    "DequantizeLinear" => operands.get(1).cloned(),
                    _ => fixed(parameter).or(bound.get(parameter).copied()).map(Into::into),
                };
                // Lengths, places and truth values.
                told.or_else(|| Some(if matches!(node.op_type(), "Shape" | "TopK") { "int64" } else { "bool" }.into()))
            })
            .collect();
        for (i, ty) in results.iter().enumerate() {
            if let (Some(parameter), Some(ty)) = (signature.output(i), ty) {
                bound.entry(parameter).or_insert(ty);
            }
        }
        if let Some(reason) = kernels.refusal(&op, signature.since, &bound) {
            report(format!("{reason} ({})", kernels.source));
        }
        let named = node.output.iter().map(String::as_str).zip(results).filter(|(name, _)| !name.is_empty());
        types.extend(named.filter_map(|(name, ty)| Some((name, ty?))));
    }
    found
}

/// The type that a signature names instead of a parameter.
fn fixed(parameter: &'static str) -> Option<&'static str> {
    parameter.strip_prefix("tensor(")?.strip_suffix(')')
}

/// As the tables name it.
fn type_name(t: i32) -> String {
    tensor_proto::DataType::try_from(t).map_or_else(|_| t.to_string(), |t| t.as_str_name().to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(op: &str, domain: &str, element: tensor_proto::DataType, inputs: usize) -> ModelProto {
        let name = |i: usize| format!("x{i}");
        let input = |i: usize| {
            let tensor = type_proto::Tensor { elem_type: Some(element as i32), shape: None };
            let ty = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() };
            ValueInfoProto { name: Some(name(i)), r#type: Some(ty), ..Default::default() }
        };
        let node = NodeProto {
            name: Some("layers.3/y".into()),
            op_type: Some(op.into()),
            domain: Some(domain.into()),
            input: (0..inputs).map(name).collect(),
            output: vec!["y".into()],
            ..Default::default()
        };
        let graph = GraphProto { name: Some("g".into()), input: (0..inputs).map(input).collect(), node: vec![node], ..Default::default() };
        ModelProto {
            opset_import: vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(23) }],
            graph: Some(graph),
            ..Default::default()
        }
    }

    fn told(target: &str, model: &ModelProto) -> Vec<String> {
        uncovered(crate::target::named(target).unwrap(), model).iter().map(ToString::to_string).collect()
    }

    /// What runs here and not there, and why.
    #[test]
    fn every_reason() {
        use tensor_proto::DataType::{Bfloat16, Float, Float16, Int64};
        let none: [String; 0] = [];
        let gqa = |t| model("GroupQueryAttention", MICROSOFT, t, 5);
        assert_eq!(told("onnx-cpu", &gqa(Float)), none);
        assert_eq!(told("onnx-cuda", &gqa(Bfloat16)), none);
        insta::assert_snapshot!(
            [
                told("onnx-cuda", &gqa(Float)),
                told("onnx-tensorrt", &gqa(Float16)),
                told("onnx-cpu", &model("MatMul", "", Bfloat16, 2)),
                told("onnx-tensorrt", &model("CumSum", "", Int64, 1)),
                told("onnx-cpu", &model("NonMaxSuppression", "", Float, 2)),
                told("onnx-cpu", &model("Abs", "", Float, 2)),
            ]
            .concat()
            .join("\n")
        );
    }
}
