//! The `onnx-*` targets: one ONNX model per graph, weights as external data inside the artifact's safetensors file.

mod coverage;
mod emit;
mod profiles;
#[rustfmt::skip]
pub mod proto;
mod text;

pub use coverage::{Uncovered, uncovered};
pub use emit::{emit, in_place};
pub use profiles::{provider_options, trtexec};
pub use text::to_text;

use super::{Layout, Stored};
use crate::{Error, Result, target::onnx::NARROW_SCALES_OPSET};
use prost::Message;
use std::{collections::BTreeSet, path::Path};
use vlmc_artifact::Scheme;
use vlmc_ir::{DType, Def, Dim, Op, Type, Verified};
use vlmc_passes::Target;

/// Version of the file format: that which came with the operator set.
fn ir_version(opset: i64) -> i64 {
    match opset {
        ..=18 => 8,
        19 | 20 => 9,
        21 | 22 => 10,
        _ => 11,
    }
}

/// Domain of ONNX Runtime's own operators, which run quantized weights.
pub const MICROSOFT: &str = "com.microsoft";

/// The weights that the models read. In `f32`, matrices of linear layers are stored transposed, as `MatMul` wants them; a table
/// that is also a matrix (tied embedding) is stored both ways, unless it is quantized.
pub fn stored(target: &Target, program: &Verified) -> Vec<Stored> {
    let mut found = BTreeSet::new();
    for (g, n) in program.graphs.iter().flat_map(|g| g.nodes().map(move |(_, n)| (g, n))) {
        for (i, a) in n.args.iter().enumerate() {
            if let Def::Weight(name) = g.def(*a) {
                found.insert((name.clone(), layout(target, &n.op, i, g.ty(*a))));
            }
        }
    }
    found.into_iter().map(|(weight, layout)| Stored { name: stored_name(&weight, layout), weight, layout }).collect()
}

fn layout(target: &Target, op: &Op, operand: usize, ty: &Type) -> Layout {
    match (op, operand, ty.dtype) {
        (_, _, DType::Quant(_)) if !target.own_operators => Layout::Signed(scales(target)),
        (_, _, DType::Quant(scheme)) => Layout::Blocks(target.float, block(op, operand, scheme, ty)),
        // Narrow matrices stay as checkpoints have them, so that their files can be used as they are.
        (Op::Linear(_), 1, _) if target.float == DType::F32 => Layout::Transposed,
        _ => Layout::Rows,
    }
}

/// Type of the scales of QuantizeLinear and DequantizeLinear.
fn scales(target: &Target) -> DType {
    if target.opset < Some(NARROW_SCALES_OPSET) { DType::F32 } else { target.float }
}

/// Columns of a block of a quantized matrix `[n, k]`, or of each of a stack. A row with one scale is cut into blocks that repeat it:
/// ONNX Runtime wants a power of 2, of a table's rows a divisor, and of experts one that divides what both of their products read.
pub(crate) fn block(op: &Op, operand: usize, scheme: Scheme, ty: &Type) -> usize {
    let dim = |i: usize| ty.shape.get(i).and_then(Dim::as_const).and_then(|d| usize::try_from(d).ok()).unwrap_or(0);
    let divided = match (op, operand) {
        (Op::RoutedMoe(_), 2) => vec![dim(1) / 2, dim(2)],
        (Op::RoutedMoe(_) | Op::Moe(_), _) => vec![dim(1), dim(2)],
        _ => vec![dim(1)],
    };
    let divisor = || [128, 64, 32, 16].into_iter().find(|b| divided.iter().all(|d| d.is_multiple_of(*b))).unwrap_or(128);
    scheme.group.map_or_else(divisor, usize::from)
}

fn stored_name(weight: &str, layout: Layout) -> String {
    if layout == Layout::Transposed { format!("{weight}.T") } else { weight.into() }
}

/// Gives axes of inputs and outputs other names.
pub fn rename_axes(model: &mut proto::ModelProto, names: &[(&str, &str)]) {
    use proto::{tensor_shape_proto::dimension::Value, type_proto};
    let Some(graph) = &mut model.graph else { return };
    for info in graph.input.iter_mut().chain(&mut graph.output) {
        let Some(type_proto::Value::TensorType(tensor)) = info.r#type.as_mut().and_then(|t| t.value.as_mut()) else { continue };
        for dim in tensor.shape.iter_mut().flat_map(|s| &mut s.dim) {
            if let Some(Value::DimParam(name)) = &mut dim.value
                && let Some((_, new)) = names.iter().find(|(old, _)| old == name)
            {
                *name = (*new).into();
            }
        }
    }
}

/// Reads a model.
///
/// # Errors
/// The file cannot be read or is not ONNX.
pub fn read(path: &Path) -> Result<proto::ModelProto> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    proto::ModelProto::decode(bytes.as_slice()).map_err(|e| Error::file(path, format!("is not an ONNX model: {e}")))
}
