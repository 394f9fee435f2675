//! A model run on several samples in step: entry by entry, all samples before the next entry.
//!
//! What an entry is run on follows from what the ones before it gave, by the rules of [`Pipeline`] and [`forward`]. So each sample
//! is run through these again and again on an engine that knows the results so far and stops at the first that it does not know.

use crate::{
    Error, Result,
    verify::{Request, array},
};
use ndarray::{ArrayD, IxDyn};
use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};
use vlmc_ir::{Bindings, interp::Array};
use vlmc_runtime::{Engine, Pipeline, Scored, Tensor, Tensors, artifact::Manifest, binding, forward};

/// Inputs of an entry, with states that are empty.
pub(super) struct Given {
    pub(super) symbols: Bindings,
    pub(super) inputs: BTreeMap<String, Array>,
}

/// Runs an entry on some samples, for each of which it gives the outputs by name.
pub(super) type RunEntry<'a> = &'a mut dyn FnMut(&str, &[Given]) -> Result<Vec<BTreeMap<String, Array>>>;

/// Runs a model of that manifest, whose entries `run_entry` runs.
///
/// # Errors
/// A request does not fit the model, and what `run_entry` says.
pub(super) fn run(manifest: &Manifest, requests: &[Request], run_entry: RunEntry<'_>) -> Result<()> {
    let mut known: Vec<Vec<Vec<Tensor>>> = vec![vec![]; requests.len()];
    loop {
        let mut calls = vec![];
        for (i, request) in requests.iter().enumerate() {
            let call = next_call(manifest, &request.tensors, &known[i]);
            let failed = |e: vlmc_runtime::Error| Error::Model { model: request.name.clone(), message: e.to_string() };
            calls.extend(call.map_err(failed)?.map(|call| (i, call)));
        }
        let Some(entry) = manifest.entries.iter().find(|e| calls.iter().any(|(_, c)| c.entry == e.name)) else { return Ok(()) };
        calls.retain(|(_, c)| c.entry == entry.name);
        let mut given = vec![];
        for (_, call) in &calls {
            let inputs: Vec<(&str, &Tensor)> = call.inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
            let mut symbols = Bindings::default();
            let bound = binding::bind(&manifest.symbols, entry, &inputs, |_| None::<[usize; 0]>, &mut symbols)?;
            let mut inputs = BTreeMap::new();
            for (port, t) in entry.inputs.iter().zip(bound) {
                inputs.insert(port.name.clone(), array(t)?);
            }
            for s in &entry.states {
                let extent = |d: &vlmc_ir::Dim| d.eval(&symbols).map(|v| v.max(0) as usize);
                let shape = s.shape.iter().map(extent).collect::<Result<Vec<_>, _>>().map_err(|e| Error::Backend(e.to_string()))?;
                inputs.insert(s.past.clone(), Array::F32(ArrayD::zeros(IxDyn(&shape))));
            }
            given.push(Given { symbols, inputs });
        }
        for ((i, _), mut outputs) in calls.iter().zip(run_entry(&entry.name, &given)?) {
            let mut take = |name: &str| outputs.remove(name).ok_or_else(|| Error::Backend(format!("{} gave no '{name}'", entry.name)));
            known[*i].push(entry.outputs.iter().map(|p| tensor(take(&p.name)?)).collect::<Result<Vec<_>>>()?);
        }
    }
}

/// An entry and what it is to be run on.
struct Call {
    entry: String,
    inputs: Vec<(String, Tensor)>,
}

/// Knows the results of some calls, in order, and keeps the first whose results it does not know.
struct Replay {
    manifest: Manifest,
    known: VecDeque<Vec<Tensor>>,
    unknown: Rc<RefCell<Option<Call>>>,
}

impl Engine for Replay {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn run(&mut self, entry: &str, inputs: &[(&str, &Tensor)]) -> vlmc_runtime::Result<Vec<Tensor>> {
        if let Some(outputs) = self.known.pop_front() {
            return Ok(outputs);
        }
        let inputs = inputs.iter().map(|(n, t)| (n.to_string(), (*t).clone())).collect();
        *self.unknown.borrow_mut() = Some(Call { entry: entry.into(), inputs });
        Err(vlmc_runtime::Error::Input(format!("the results of '{entry}' are not known yet")))
    }

    fn past(&self) -> usize {
        0
    }

    fn truncate(&mut self, _: usize) -> vlmc_runtime::Result<()> {
        Ok(())
    }
}

/// The first entry that has to be run after those of `known` results; `None` if the request is done.
fn next_call(manifest: &Manifest, request: &Tensors, known: &[Vec<Tensor>]) -> vlmc_runtime::Result<Option<Call>> {
    let unknown = Rc::new(RefCell::new(None));
    let mut engine = Replay { manifest: manifest.clone(), known: known.iter().cloned().collect(), unknown: unknown.clone() };
    let done = if manifest.task.prompt().is_some() {
        Pipeline::new(Box::new(engine)).and_then(|mut pipeline| {
            let features = pipeline.features(request)?;
            pipeline.prefill(request, &features, Scored::Last).map(drop)
        })
    } else {
        forward(&mut engine, request).map(drop)
    };
    match unknown.take() {
        None => done.map(|()| None),
        call => Ok(call),
    }
}

fn tensor(a: Array) -> Result<Tensor> {
    Ok(match a {
        Array::F32(x) => Tensor::new(x.shape(), x.iter().copied().collect::<Vec<_>>())?,
        Array::I64(x) => Tensor::new(x.shape(), x.iter().copied().collect::<Vec<_>>())?,
        Array::Bool(x) => Tensor::new(x.shape(), x.iter().copied().collect::<Vec<_>>())?,
    })
}
