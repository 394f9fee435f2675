//! Where a model would leave the range of `f16`, and how it fares when it computes in `f16` elsewhere.
//!
//! A GPU computes in `f16`: numbers beyond 65,504 become infinite. Some towers have such numbers in practice (the residual stream
//! of Qwen2.5-VL's). The model is interpreted on samples; the largest number of every result tells which have to stay in `f32`:
//! *islands*. Then it is interpreted again with results rounded to `f16`, with and without the islands.

use crate::{
    Error, Result,
    calibrate::{Outputs, Run, interpret},
    compile::{Lowered, Model},
    target,
    verify::Request,
};
use half::f16;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use vlmc_ir::{
    Def, Graph, Node, ValueId,
    interp::{Array, Observer, Resident},
};

/// Results with numbers larger than this stay in `f32`: a quarter of the largest `f16`, as other pictures may have larger ones.
pub const LIMIT: f32 = 65_504.0 / 4.0;

/// A result that has numbers too large for `f16`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Island {
    /// Graph.
    pub graph: String,
    /// Where in the model.
    pub scope: String,
    /// What computes it.
    pub op: String,
    /// Largest absolute value on the samples.
    pub largest: f32,
}

/// How the outputs of the model fare in `f16`, against `f32`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fidelity {
    /// `|y' - y| / |y|` over all outputs; absent if a number is infinite or none.
    pub error: Option<f64>,
}

/// What a model needs to run in `f16`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ranges {
    /// What stays in `f32`, in execution order.
    pub islands: Vec<Island>,
    /// Results in all.
    pub results: usize,
    /// Largest absolute value of what stays in `f16`.
    pub largest_in_f16: f32,
    /// Weights with numbers beyond [`LIMIT`], which stay as they are.
    pub weights: Vec<String>,
    /// All in `f16`.
    pub plain: Fidelity,
    /// Islands in `f32`, the rest in `f16`.
    pub with_islands: Fidelity,
}

/// Largest numbers of results by graph and value, and of weights.
#[derive(Default)]
struct Largest {
    results: BTreeMap<(String, ValueId), f32>,
    weights: BTreeMap<String, f32>,
}

/// Outputs of one run of all requests, by graph and name.
type Named = Vec<(String, Array)>;

impl Model {
    /// Finds out where the model needs `f32`, on these requests.
    ///
    /// # Errors
    /// There are no requests, or one does not fit the model.
    pub fn ranges(&self, requests: &[Request], progress: &dyn Fn(&str)) -> Result<Ranges> {
        let target = target::named("onnx-cpu")?;
        let Lowered { program, task, .. } = self.lower()?;
        let mut largest = Largest::default();
        let all = |what: &str, each: &mut dyn FnMut(&Graph, Run<'_>) -> Result<Outputs>| -> Result<Named> {
            progress(what);
            let mut outputs = vec![];
            interpret(self, target, &program, task.clone(), requests, &mut |graph, run| {
                let outs = each(graph, run)?;
                outputs.extend(outs.iter().flatten().map(|(name, a)| (format!("{}.{name}", graph.name), a.clone())));
                Ok(outs)
            })?;
            Ok(outputs)
        };
        let exact = all("in f32", &mut |graph, run| run(&mut Measure { graph: &graph.name, largest: &mut largest }))?;

        let large: BTreeSet<(String, ValueId)> = largest.results.iter().filter(|(_, v)| **v > LIMIT).map(|(k, _)| k.clone()).collect();
        let weights: BTreeSet<String> = largest.weights.iter().filter(|(_, v)| **v > LIMIT).map(|(k, _)| k.clone()).collect();
        let none = (BTreeSet::new(), BTreeSet::new());
        let plain = all("in f16", &mut |graph, run| run(&mut Rounded { graph, large: &none.0, weights: &none.1 }))?;
        let kept = all("in f16, islands in f32", &mut |graph, run| run(&mut Rounded { graph, large: &large, weights: &weights }))?;

        let mut islands = vec![];
        for g in &program.graphs {
            for (_, node) in g.nodes() {
                for v in &node.outs {
                    let key = (g.name.clone(), *v);
                    if let (true, Some(largest)) = (large.contains(&key), largest.results.get(&key)) {
                        islands.push(Island { graph: g.name.clone(), scope: node.scope.clone(), op: node.op.name(), largest: *largest });
                    }
                }
            }
        }
        Ok(Ranges {
            islands,
            results: largest.results.len(),
            largest_in_f16: largest.results.iter().filter(|(k, _)| !large.contains(k)).map(|(_, v)| *v).fold(0.0, f32::max),
            weights: weights.into_iter().collect(),
            plain: fidelity(&plain, &exact)?,
            with_islands: fidelity(&kept, &exact)?,
        })
    }
}

fn fidelity(got: &Named, exact: &Named) -> Result<Fidelity> {
    let (mut difference, mut size) = (0.0f64, 0.0f64);
    for ((name, got), (_, exact)) in got.iter().zip(exact) {
        let (Array::F32(got), Array::F32(exact)) = (got, exact) else { continue };
        if got.shape() != exact.shape() {
            return Err(Error::Backend(format!("'{name}' has two shapes")));
        }
        for (a, b) in got.iter().zip(exact) {
            difference += f64::from(a - b).powi(2);
            size += f64::from(*b).powi(2);
        }
    }
    let error = (difference / size.max(f64::MIN_POSITIVE)).sqrt();
    Ok(Fidelity { error: error.is_finite().then_some(error) })
}

fn largest_of(a: &Array) -> Option<f32> {
    a.f32().ok().map(|a| a.iter().fold(0.0f32, |m, v| if v.is_nan() { f32::INFINITY } else { m.max(v.abs()) }))
}

/// Notes the largest numbers.
struct Measure<'a> {
    graph: &'a str,
    largest: &'a mut Largest,
}

impl Observer for Measure<'_> {
    fn after(&mut self, node: &Node, weights: &Resident<'_>, _: &[Vec<Option<&Array>>], results: &mut [Vec<Array>]) -> Result<(), String> {
        for results in results {
            for (v, a) in node.outs.iter().zip(results) {
                let Some(largest) = largest_of(a) else { continue };
                let known = self.largest.results.entry((self.graph.into(), *v)).or_default();
                *known = known.max(largest);
            }
        }
        for (name, a) in weights {
            if let (false, Some(largest)) = (self.largest.weights.contains_key(name), largest_of(a)) {
                self.largest.weights.insert(name.clone(), largest);
            }
        }
        Ok(())
    }
}

/// Rounds weights and results to `f16`, but for the large ones.
struct Rounded<'a> {
    graph: &'a Graph,
    large: &'a BTreeSet<(String, ValueId)>,
    weights: &'a BTreeSet<String>,
}

fn round(a: &mut Array) {
    if let Array::F32(a) = a {
        a.mapv_inplace(|v| f16::from_f32(v).to_f32());
    }
}

impl Observer for Rounded<'_> {
    fn before(&mut self, node: &Node, weights: &mut Resident<'_>, _: &[Vec<Option<&Array>>]) -> Result<(), String> {
        for v in &node.args {
            if let Def::Weight(name) = self.graph.def(*v)
                && !self.weights.contains(name)
                && let Some(weight) = weights.get_mut(name)
            {
                round(weight.to_mut());
            }
        }
        Ok(())
    }

    fn after(&mut self, node: &Node, _: &Resident<'_>, _: &[Vec<Option<&Array>>], results: &mut [Vec<Array>]) -> Result<(), String> {
        for results in results {
            for (v, a) in node.outs.iter().zip(results) {
                if !self.large.contains(&(self.graph.name.clone(), *v)) {
                    round(a);
                }
            }
        }
        Ok(())
    }
}
