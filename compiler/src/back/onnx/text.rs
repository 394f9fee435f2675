//! ONNX models as text, for reading and for snapshots.

use super::proto::{
    AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, attribute_proto::AttributeType, tensor_proto, type_proto,
};
use std::fmt::Write;

/// A model as text: inputs and outputs with their types, weights by name and shape, one line per node. Runs of layers that are
/// equal but for their number and the numbers of their values are shown once.
pub fn to_text(model: &ModelProto) -> String {
    let mut out = String::new();
    let opsets: Vec<String> = model.opset_import.iter().map(|o| format!("{}{}", o.domain(), o.version())).collect();
    let Some(graph) = &model.graph else { return "no graph\n".into() };
    let _ = writeln!(out, "graph {} (ir_version {}, opset {})", graph.name(), model.ir_version(), opsets.join(", "));
    for (kind, ports) in [("input", &graph.input), ("output", &graph.output)] {
        let lines: Vec<String> = ports.iter().map(|p| format!("{kind} {}", port(p))).collect();
        fold(&mut out, &lines, "");
    }
    let weights: Vec<String> = graph.initializer.iter().map(tensor).collect();
    fold(&mut out, &weights, "");
    out.push('\n');
    let nodes: Vec<String> = graph.node.iter().map(node).collect();
    fold(&mut out, &nodes, "");
    out
}

fn dtype(t: i32) -> String {
    tensor_proto::DataType::try_from(t).map_or_else(|_| t.to_string(), |t| t.as_str_name().to_lowercase())
}

fn port(p: &ValueInfoProto) -> String {
    let Some(type_proto::Value::TensorType(t)) = p.r#type.as_ref().and_then(|t| t.value.as_ref()) else { return p.name().into() };
    let dim = |d: &super::proto::tensor_shape_proto::Dimension| match &d.value {
        Some(super::proto::tensor_shape_proto::dimension::Value::DimValue(v)) => v.to_string(),
        Some(super::proto::tensor_shape_proto::dimension::Value::DimParam(p)) => p.clone(),
        None => "?".into(),
    };
    let dims: Vec<String> = t.shape.iter().flat_map(|s| &s.dim).map(dim).collect();
    format!("{}: {}[{}]", p.name(), dtype(t.elem_type()), dims.join(", "))
}

fn tensor(t: &TensorProto) -> String {
    let place = if t.external_data.is_empty() { values(t) } else { " external".into() };
    format!("weight {}: {}{:?}{place}", t.name(), dtype(t.data_type()), t.dims)
}

/// Elements of a small constant.
fn values(t: &TensorProto) -> String {
    let raw = t.raw_data.as_deref().unwrap_or_default();
    let shown: Vec<String> = match tensor_proto::DataType::try_from(t.data_type()) {
        Ok(tensor_proto::DataType::Int64) => raw.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b).to_string()).collect(),
        Ok(tensor_proto::DataType::Float) => raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b).to_string()).collect(),
        _ => raw.iter().map(u8::to_string).collect(),
    };
    format!(" = {}{}", shown.iter().take(8).cloned().collect::<Vec<_>>().join(", "), if shown.len() > 8 { ", ..." } else { "" })
}

fn node(n: &NodeProto) -> String {
    let attributes: Vec<String> = n.attribute.iter().map(attribute).collect();
    let attributes = if attributes.is_empty() { String::new() } else { format!(" {{{}}}", attributes.join(", ")) };
    format!("{} = {}({}){attributes}", n.output.join(", "), n.op_type(), n.input.join(", "))
}

fn attribute(a: &AttributeProto) -> String {
    let value = match a.r#type() {
        AttributeType::Int => a.i().to_string(),
        AttributeType::Float => a.f().to_string(),
        AttributeType::Ints => format!("{:?}", a.ints),
        AttributeType::String => String::from_utf8_lossy(a.s()).into_owned(),
        _ => "...".into(),
    };
    format!("{}={value}", a.name())
}

/// The layer number of a line: the first number that is a path component.
fn layer(line: &str) -> Option<(usize, usize, u64)> {
    let bytes = line.as_bytes();
    let mut at = 0;
    while let Some(dot) = line[at..].find('.').map(|i| i + at) {
        let digits = line[dot + 1..].bytes().take_while(u8::is_ascii_digit).count();
        let end = dot + 1 + digits;
        if digits > 0 && bytes.get(end).is_some_and(|b| matches!(b, b'.' | b'/')) {
            return Some((dot + 1, end, line[dot + 1..end].parse().ok()?));
        }
        at = dot + 1;
    }
    None
}

/// The line without the numbers that differ from layer to layer.
fn shape_of(line: &str) -> String {
    let mut out = String::new();
    let mut digits = false;
    for c in line.chars() {
        if c.is_ascii_digit() {
            if !digits {
                out.push('#');
            }
            digits = true;
        } else {
            digits = false;
            out.push(c);
        }
    }
    out
}

/// Writes lines, of equal layers only the first.
fn fold(out: &mut String, lines: &[String], indent: &str) {
    let number = |l: &String| layer(l).map(|(start, _, n)| (l[..start].split(' ').next_back().unwrap_or_default().to_string(), n));
    let mut at = 0;
    while at < lines.len() {
        let Some((prefix, first)) = number(&lines[at]) else {
            let _ = writeln!(out, "{indent}{}", lines[at]);
            at += 1;
            continue;
        };
        let same = |n: u64, from: usize| lines[from..].iter().take_while(|l| number(l).is_some_and(|(p, m)| p == prefix && m == n)).count();
        let len = same(first, at);
        for l in &lines[at..at + len] {
            let _ = writeln!(out, "{indent}{l}");
        }
        at += len;
        let body: Vec<String> = lines[at - len..at].iter().map(|l| shape_of(l)).collect();
        let mut last = first;
        while at + len <= lines.len()
            && same(last + 1, at) == len
            && lines[at..at + len].iter().map(|l| shape_of(l)).eq(body.iter().cloned())
        {
            last += 1;
            at += len;
        }
        if last > first {
            let _ = writeln!(out, "{indent}... {prefix}{} to {last}: as {first}", first + 1);
        }
    }
}
