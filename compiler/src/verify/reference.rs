//! The reference: an engine that interprets the frontend's program in `f32`, with weights straight from the checkpoint, one node's
//! at a time.

use crate::{Error, Result, compile::Model};
use ndarray::{ArrayD, Axis, IxDyn};
use std::{borrow::Cow, collections::BTreeMap, rc::Rc};
use vlmc_ir::{
    Bindings, Graph, Node, Verified,
    interp::{self, Array, Observer, Resident, Sample},
    weights::WeightDef,
};
use vlmc_runtime::{Data, Engine, Tensor, artifact::Manifest, binding};

/// Passes that only spell the program out: widen weights, decompose what the target decomposes, compute constants. What comes
/// after them in a pipeline, fusion and quantization, is what the reference is there to check. Experts that are one node of the
/// artifact are one here, too: decomposed, they would have no node to be compared with.
const SPELLED_OUT: [&str; 6] = ["storage", "routed-moe", "legalize", "fold", "cse", "dce"];

/// A node that the reference has computed.
pub(super) struct Step<'a> {
    pub(super) graph: &'a Graph,
    pub(super) symbols: &'a Bindings,
    pub(super) node: &'a Node,
    pub(super) weights: &'a Resident<'a>,
    /// `None` for a weight.
    pub(super) operands: &'a [Option<&'a Array>],
    pub(super) results: &'a [Array],
}

/// Sees every node.
pub(super) type Watcher = Box<dyn FnMut(&Step<'_>) -> Result<(), String>>;

/// What a program is to be compared by.
pub(super) struct Reference {
    /// The artifact's, whose entries have the same names and ports.
    manifest: Manifest,
    model: Rc<Model>,
    program: Rc<Verified>,
    /// As the frontend declared them.
    weights: Rc<BTreeMap<String, WeightDef>>,
    /// Per entry, its states, in order; empty before the first run.
    states: BTreeMap<String, Vec<Array>>,
    watcher: Watcher,
}

/// The program that the reference interprets, and the weights as the frontend declared them, or [`SPELLED_OUT`] made of these.
///
/// # Errors
/// The checkpoint cannot be lowered for the artifact's target, or has other entries than the artifact.
pub(super) fn program(model: &Model, manifest: &Manifest) -> Result<(Verified, BTreeMap<String, WeightDef>)> {
    let target = crate::target::named(&manifest.target)?;
    let lowered = model.lower_with_codes(target)?.program;
    let mut weights = lowered.weights.clone();
    let passes: Vec<_> = target.passes.iter().copied().filter(|p| SPELLED_OUT.contains(&p.name)).collect();
    let program = vlmc_passes::run(target, lowered, &passes, |_, _| {})?;
    for (name, def) in &program.weights {
        weights.entry(name.clone()).or_insert_with(|| def.clone());
    }
    for e in &manifest.entries {
        let graph = program.graphs.iter().find(|g| g.name == e.name);
        let same = graph.is_some_and(|g| {
            let named = |ports: &[vlmc_ir::Port]| ports.iter().map(|p| p.name.clone()).collect::<Vec<_>>();
            let listed = |ports: &[vlmc_runtime::artifact::Port]| ports.iter().map(|p| p.name.clone()).collect::<Vec<_>>();
            named(&g.inputs) == listed(&e.inputs)
                && named(&g.outputs) == listed(&e.outputs)
                && g.states.iter().map(|s| &s.past_name).eq(e.states.iter().map(|s| &s.past))
        });
        if !same {
            let message = format!("has no entry '{}' with the artifact's inputs and outputs; compile the checkpoint again", e.name);
            return Err(Error::Model { model: model.checkpoint().dir().display().to_string(), message });
        }
    }
    Ok((program, weights))
}

impl Reference {
    pub(super) fn new(
        manifest: Manifest,
        model: Rc<Model>,
        program: Rc<Verified>,
        weights: Rc<BTreeMap<String, WeightDef>>,
        watcher: Watcher,
    ) -> Self {
        Self { manifest, model, program, weights, states: BTreeMap::new(), watcher }
    }

    fn weight(&self, name: &str) -> Result<Cow<'static, Array>, String> {
        let def = self.weights.get(name).ok_or_else(|| format!("the frontend declares no weight '{name}'"))?;
        let source = |tensor: &str| self.model.checkpoint().floats(tensor).map_err(|e| e.to_string());
        interp::weight(def, &source).map(Cow::Owned)
    }
}

/// Passes nodes on to a [`Watcher`], with what it needs to know of the run.
struct Forward<'a> {
    graph: &'a Graph,
    symbols: &'a Bindings,
    watcher: &'a mut Watcher,
}

impl Observer for Forward<'_> {
    fn after(
        &mut self,
        node: &Node,
        weights: &Resident<'_>,
        operands: &[Vec<Option<&Array>>],
        results: &mut [Vec<Array>],
    ) -> Result<(), String> {
        let [operands] = operands else { return Err("one sample at a time".into()) };
        (self.watcher)(&Step { graph: self.graph, symbols: self.symbols, node, weights, operands, results: &results[0] })
    }
}

fn failed(entry: &str, why: impl std::fmt::Display) -> vlmc_runtime::Error {
    vlmc_runtime::Error::Input(format!("{entry}: {why}"))
}

impl Engine for Reference {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn run(&mut self, entry: &str, inputs: &[(&str, &Tensor)]) -> vlmc_runtime::Result<Vec<Tensor>> {
        let program = self.program.clone();
        let unknown = || failed(entry, "the model has no such entry");
        let e = self.manifest.entries.iter().find(|e| e.name == entry).ok_or_else(unknown)?.clone();
        let graph = program.graphs.iter().find(|g| g.name == entry).ok_or_else(unknown)?;
        let before = self.states.get(entry);
        let mut symbols = Bindings::default();
        let bound = binding::bind(&self.manifest.symbols, &e, inputs, |i| before.map(|s| s[i].shape()), &mut symbols)?;

        let mut given: BTreeMap<String, Array> =
            e.inputs.iter().zip(bound).map(|(p, t)| Ok((p.name.clone(), array(t)?))).collect::<vlmc_runtime::Result<_>>()?;
        for (i, s) in e.states.iter().enumerate() {
            let state = match before {
                Some(states) => states[i].clone(),
                None => {
                    let dims = s.shape.iter().map(|d| d.eval(&symbols).map(|v| v.max(0) as usize)).collect::<Result<Vec<_>, _>>();
                    Array::F32(ArrayD::zeros(IxDyn(&dims.map_err(|e| failed(entry, e))?)))
                }
            };
            given.insert(s.past.clone(), state);
        }
        let sample = Sample { symbols: &symbols, inputs: &given };
        // Out of `self` while weights are read through it.
        let mut watcher: Watcher = std::mem::replace(&mut self.watcher, Box::new(|_| Ok(())));
        let mut outs = {
            let mut forward = Forward { graph, symbols: &symbols, watcher: &mut watcher };
            interp::run_samples(graph, &[sample], &|name: &str| self.weight(name), &mut forward)
        };
        self.watcher = watcher;
        let mut out = outs.as_mut().map_err(|e| failed("reference", e)).map(|outs| outs.remove(0))?;
        let mut take = |name: &str| out.remove(name).ok_or_else(|| failed(entry, format!("the reference gave no '{name}'")));
        let outputs = e.outputs.iter().map(|p| tensor(&take(&p.name)?)).collect::<vlmc_runtime::Result<Vec<_>>>()?;
        let states = e.states.iter().map(|s| take(&s.present)).collect::<vlmc_runtime::Result<Vec<_>>>()?;
        if !states.is_empty() {
            self.states.insert(entry.into(), states);
        }
        Ok(outputs)
    }

    fn past(&self) -> usize {
        let states = self.manifest.entries.iter().filter_map(|e| Some((e, self.states.get(&e.name)?)));
        let mut text = states.flat_map(|(e, s)| e.states.iter().zip(s)).filter(|(s, _)| s.follows_text());
        text.next().map_or(0, |(s, a)| a.shape()[s.axis])
    }

    fn truncate(&mut self, len: usize) -> vlmc_runtime::Result<()> {
        let past = self.past();
        if len > past {
            return Err(failed("reference", format!("cannot keep {len} positions of {past}")));
        }
        if len == 0 {
            self.states.clear();
        }
        for e in &self.manifest.entries {
            for (s, a) in e.states.iter().zip(self.states.get_mut(&e.name).into_iter().flatten()).filter(|(s, _)| s.follows_text()) {
                if let Array::F32(data) = a {
                    *data = data.slice_axis(Axis(s.axis), (..len).into()).to_owned();
                }
            }
        }
        Ok(())
    }
}

pub(crate) fn array(t: &Tensor) -> vlmc_runtime::Result<Array> {
    fn with<T: Clone>(t: &Tensor, data: &[T]) -> vlmc_runtime::Result<ArrayD<T>> {
        ArrayD::from_shape_vec(IxDyn(t.shape()), data.to_vec()).map_err(|e| failed("a tensor", e))
    }
    Ok(match t.data() {
        Data::F32(v) => Array::F32(with(t, v)?),
        Data::I64(v) => Array::I64(with(t, v)?),
        Data::Bool(v) => Array::Bool(with(t, v)?),
    })
}

fn tensor(a: &Array) -> vlmc_runtime::Result<Tensor> {
    match a {
        Array::F32(x) => Tensor::new(x.shape(), x.iter().copied().collect::<Vec<_>>()),
        Array::I64(x) => Tensor::new(x.shape(), x.iter().copied().collect::<Vec<_>>()),
        Array::Bool(x) => Tensor::new(x.shape(), x.iter().copied().collect::<Vec<_>>()),
    }
}
