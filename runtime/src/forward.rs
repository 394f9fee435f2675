//! Entries run on tensors by name.

use crate::{Engine, Error, Result, Tensor};
use smallvec::SmallVec;
use std::collections::BTreeMap;
use vlmc_artifact::{DType, Entry, Port};

/// Tensors, named as in the Hugging Face forward signature.
pub type Tensors = BTreeMap<String, Tensor>;

/// An entry of the engine's artifact.
///
/// # Errors
/// There is none of that name.
pub(crate) fn entry<'e>(engine: &'e dyn Engine, name: &str) -> Result<&'e Entry> {
    let manifest = engine.manifest();
    manifest.entries.iter().find(|e| e.name == name).ok_or_else(|| Error::Input(format!("the artifact has no entry '{name}'")))
}

/// A tensor as a port takes it: booleans of integers, and leading axes joined (pictures of all rows of a batch one after the
/// other) if the port has fewer.
///
/// # Errors
/// It has too few axes.
pub(crate) fn fit(t: &Tensor, port: &Port) -> Result<Tensor> {
    let (have, want) = (t.shape().len(), port.shape.len());
    if have < want || want == 0 {
        let declared = crate::binding::shape_text(&port.shape);
        return Err(Error::Input(format!("'{}' must be {}{declared}, is {}{:?}", port.name, port.dtype, t.dtype(), t.shape())));
    }
    let joined = t.shape()[..=have - want].iter().product();
    let shape: Vec<usize> = std::iter::once(joined).chain(t.shape()[have - want + 1..].iter().copied()).collect();
    match (port.dtype, t.dtype()) {
        (DType::Bool, DType::I64) => Tensor::new(shape, t.i64()?.iter().map(|v| *v != 0).collect::<Vec<_>>()),
        _ => t.reshaped(shape),
    }
}

/// Makes `to` a tensor without elements, as a port takes it: symbols are 0.
///
/// # Errors
/// The port has no symbol.
pub(crate) fn empty(port: &Port, to: &mut Tensor) -> Result<()> {
    let shape: SmallVec<[usize; 8]> = port.shape.iter().map(|d| d.as_const().unwrap_or(0) as usize).collect();
    let missing = |_| Error::Input(format!("input '{}' is missing", port.name));
    match port.dtype {
        DType::I64 => to.fill(&shape, std::iter::empty::<i64>()),
        DType::Bool => to.fill(&shape, std::iter::empty::<bool>()),
        _ => to.fill(&shape, std::iter::empty::<f32>()),
    }
    .map_err(missing)
}

/// Runs every entry whose inputs are among `given` and the outputs of entries before it, and returns all outputs: the whole of
/// a model that keeps no state.
///
/// # Errors
/// No entry has all its inputs; a tensor does not fit.
pub fn forward(engine: &mut dyn Engine, given: &Tensors) -> Result<Tensors> {
    let entries = engine.manifest().entries.clone();
    let mut out = Tensors::new();
    let mut missing = vec![];
    // A text without a mask has no padding.
    let full = given.get("input_ids").map(|ids| Tensor::new(ids.shape(), vec![1i64; ids.data().len()])).transpose()?;
    for e in &entries {
        let find = |port: &Port| {
            let named = given.get(&port.name).or_else(|| out.get(&port.name));
            named.or(full.as_ref().filter(|_| port.name == "attention_mask"))
        };
        if let Some(port) = e.inputs.iter().find(|p| find(p).is_none()) {
            missing.push(format!("'{}' for {}", port.name, e.name));
            continue;
        }
        let fitted = e.inputs.iter().filter_map(|p| Some(fit(find(p)?, p))).collect::<Result<Vec<_>>>()?;
        let feed: Vec<(&str, &Tensor)> = e.inputs.iter().map(|p| p.name.as_str()).zip(&fitted).collect();
        let results = engine.run(&e.name, &feed)?;
        out.extend(e.outputs.iter().map(|p| p.name.clone()).zip(results));
    }
    if out.is_empty() {
        return Err(Error::Input(format!("nothing can be run: there is no {}", missing.join(", no "))));
    }
    Ok(out)
}
