//! Calibration: codes of weights that keep what layers give for the inputs that they get, by running the model on samples.
//!
//! The frontend's program is interpreted on all samples in step, so that one layer's weights are in memory at a time. When a layer
//! comes, its inputs are there: its codes are found for these, and the layer goes on with what the codes stand for, so that later
//! layers see the errors of earlier ones.

mod budget;
mod found;
mod lockstep;
mod recipes;

pub use budget::Budgeted;
pub(crate) use recipes::Recipes;

use crate::{
    Error, Result,
    compile::{Lowered, Model, entry},
    samples,
    verify::Request,
};
use found::Found;
use lockstep::Given;
use ndarray::{Array2, ArrayD, Axis, CowArray, Ix2, IxDyn, linalg::general_mat_mul, s};
use rayon::prelude::*;
use recipes::Folded;
use std::{borrow::Cow, cell::RefCell, collections::BTreeMap};
use vlmc_artifact::{FORMAT, Manifest, Task, program::Unary};
use vlmc_ir::{
    Bindings, DType, Def, Graph, Node, Op, Program, Scheme, Type, ValueId, Verified,
    interp::{self, Array, Observer, Resident, Sample},
    ops::Elementwise1,
    quant::Codes,
    weights::Recipe,
};
use vlmc_passes::{
    Target,
    quantize::{
        Calibration, Choice, Part, Policy, fitting,
        gptq::{Factor, output_error},
        parts,
        scaling::{self, Layer},
    },
};
use vlmc_runtime::prepare::Preparer;

/// What calibration found for a weight in one scheme.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Measured {
    /// The scheme.
    pub scheme: Scheme,
    /// `|W x - Q x| / |W x|`, over all inputs `x` of the samples.
    pub error: f64,
}

/// What calibration found, by weight; of each, in the order of the policies.
pub type Report = BTreeMap<String, Vec<Measured>>;

/// Ways to keep a weight of a name and a part that codes are to be found for.
pub type Candidates<'a> = &'a dyn Fn(&str, Part) -> Vec<Choice>;

/// Outputs of samples by name.
pub(crate) type Outputs = Vec<BTreeMap<String, Array>>;

/// Runs an entry on all samples that come to it, before the eyes of an observer.
pub(crate) type Run<'a> = &'a dyn Fn(&mut dyn Observer) -> Result<Outputs>;

/// Interprets a model's program on all requests in step; `each` runs every entry.
///
/// # Errors
/// There are no requests, one does not fit the model, or what `each` says.
pub(crate) fn interpret(
    model: &Model,
    target: &Target,
    program: &Verified,
    task: Task,
    requests: &[Request],
    each: &mut dyn FnMut(&Graph, Run<'_>) -> Result<Outputs>,
) -> Result<()> {
    if requests.is_empty() {
        return Err(Error::Model { model: "calibration".into(), message: "there are no samples".into() });
    }
    let manifest = Manifest {
        layout: None,
        format: FORMAT,
        compiler: crate::compile::COMPILER.into(),
        target: target.name.into(),
        architecture: program.name.clone(),
        parameters: 0,
        source: model.checkpoint().source(),
        symbols: program.symbols.clone(),
        entries: program.graphs.iter().map(|g| entry(g, String::new(), None)).collect(),
        task,
        processor: model.processor()?,
        generation: Default::default(),
        files: Default::default(),
        certificate: None,
    };
    let source = |name: &str| model.checkpoint().floats(name).map_err(|e| e.to_string());
    let weights = |name: &str| {
        let def = program.weights.get(name).ok_or_else(|| format!("no weight '{name}'"))?;
        interp::weight(def, &source).map(Cow::Owned)
    };
    lockstep::run(&manifest, requests, &mut |name: &str, given: &[Given]| {
        let graph = program.graphs.iter().find(|g| g.name == name);
        let graph = graph.ok_or_else(|| Error::Backend(format!("no entry '{name}'")))?;
        let samples: Vec<Sample<'_>> = given.iter().map(|g| Sample { symbols: &g.symbols, inputs: &g.inputs }).collect();
        let failed = |e: interp::EvalError| Error::Model { model: "calibration".into(), message: e.to_string() };
        each(graph, &|observer: &mut dyn Observer| interp::run_samples(graph, &samples, &weights, observer).map_err(failed))
    })
}

impl Model {
    /// The model with codes for its weights that suit `requests`, in all schemes of `candidates`; later layers see the codes of the
    /// first. Compiled by a policy that chooses one of these, the model has these codes; weights that no request reaches (a tower, if
    /// there are no pictures) have none.
    ///
    /// # Errors
    /// There are no requests, or one does not fit the model.
    pub fn calibrate(
        self,
        target: &Target,
        candidates: Candidates<'_>,
        requests: &[Request],
        progress: &dyn Fn(&str),
    ) -> Result<(Self, Report)> {
        let Lowered { program, task, .. } = self.lower()?;
        let choices = self.choices(target, &program, candidates);
        let findings = Findings {
            found: Found::new()?,
            report: Report::new(),
            factors: BTreeMap::new(),
            folds: vec![],
            largest: target.static_activations.then(BTreeMap::new),
        };
        let findings = RefCell::new(findings);
        let source = |name: &str| self.checkpoint().floats(name).map_err(|e| e.to_string());
        let load = |name: &str| {
            let def = program.weights.get(name).ok_or_else(|| format!("no weight '{name}'"))?;
            interp::weight(def, &source)
        };
        interpret(&self, target, &program, task, requests, &mut |graph, run| {
            let mut layers =
                Layers { program: &program, graph, choices: &choices, findings: &findings, load: &load, inputs: None, progress };
            run(&mut layers)
        })?;
        let Findings { found, report, folds, largest, .. } = findings.into_inner();
        let recipe = |(name, measured): (&String, &Vec<Measured>)| {
            measured.iter().map(|m| ((name.clone(), m.scheme), Recipe::Codes(stored_name(name, m.scheme), m.scheme))).collect::<Vec<_>>()
        };
        let folded = |name: &String| folds.iter().any(|f| f.readers.contains_key(name));
        let codes = report.iter().filter(|(name, _)| !folded(name)).flat_map(recipe).collect();
        Ok((
            self.with_found(|checkpoint| found.added_to(checkpoint), Recipes { codes, folds, largest: largest.unwrap_or_default() }),
            report,
        ))
    }

    /// The candidates of each weight that `target` runs. What comes quantized stays as it is.
    fn choices(&self, target: &Target, program: &Program, candidates: Candidates<'_>) -> BTreeMap<String, Vec<Choice>> {
        let packed = |name: &str| self.checkpoint().packed().tensor(&format!("{name}.codes")).is_some();
        let mut out = BTreeMap::new();
        for (name, part) in parts(program) {
            let candidates = if packed(&name) { vec![] } else { candidates(&name, part) };
            let mut choices: Vec<Choice> = vec![];
            for c in candidates {
                if let Ok(scheme) = fitting(target, program, &name, c.scheme)
                    && choices.iter().all(|known| known.scheme != scheme)
                {
                    choices.push(Choice { scheme, ..c });
                }
            }
            if !choices.is_empty() {
                out.insert(name, choices);
            }
        }
        out
    }
}

/// The tensors of samples and their answers, as the model takes them.
///
/// # Errors
/// The checkpoint lacks a tokenizer, chat template or preprocessor config that they need, or a picture cannot be read.
pub fn requests(model: &Model, samples: &[samples::Sample]) -> Result<Vec<Request>> {
    let dir = model.checkpoint().dir();
    let preparer = Preparer::new(model.lower()?.task, model.processor()?, |name| Some(dir.join(name)).filter(|p| p.exists()))?;
    samples.iter().map(|s| Ok(Request { name: s.name.clone(), tensors: s.answered(&preparer)? })).collect()
}

/// What a policy chooses for weights that calibration can help, and how it does.
pub fn chosen(policy: &Policy) -> impl Fn(&str, Part) -> Vec<Choice> + '_ {
    |name, part| {
        let choice = policy.choice(name, part).and_then(|c| {
            let calibration = match c.calibration {
                Calibration::Optional if c.scheme.bits < 8 => Calibration::Gptq,
                Calibration::Optional | Calibration::Unused => return None,
                explicit => explicit,
            };
            Some(Choice { calibration, ..c })
        });
        choice.into_iter().collect()
    }
}

/// Name of the tensors that hold a weight's codes in a scheme.
fn stored_name(weight: &str, scheme: Scheme) -> String {
    format!("{weight}@{scheme}")
}

struct Findings {
    found: Found,
    report: Report,
    /// Of columns, by weight.
    factors: BTreeMap<String, Vec<f32>>,
    folds: Vec<Folded>,
    /// Largest absolute numbers that layers read, by weight, if these are wanted.
    largest: Option<BTreeMap<String, f32>>,
}

impl Findings {
    /// Takes note of what the layer of a weight reads; its columns are divided by its factors, if it has any.
    fn see(&mut self, name: &str, x: &[CowArray<'_, f32, Ix2>]) {
        let Some(largest) = &mut self.largest else { return };
        let factors = self.factors.get(name).map(Vec::as_slice);
        let column = |c: usize| factors.and_then(|f| f.get(c)).map_or(1.0, |f| 1.0 / f);
        let rows = x.iter().flat_map(|x| x.outer_iter());
        let seen = rows.flat_map(|row| row.into_iter().enumerate().map(|(c, v)| (v * column(c)).abs())).fold(0.0, f32::max);
        largest.entry(name.into()).and_modify(|v| *v = v.max(seen)).or_insert(seen);
    }

    /// Finds codes of some rows of `k` columns for inputs of those moments, for each of the choices. Adds them to `codes`, squares of
    /// errors to `errors`, and gives what the first stand for.
    fn rows(rows: &[f32], moments: &Array2<f32>, choices: &[Choice], codes: &mut [Codes], errors: &mut [f64]) -> Result<Vec<f32>, String> {
        let (h, k) = (moments.as_slice().ok_or("not contiguous")?, moments.nrows());
        let mut first = None;
        for ((choice, codes), error) in choices.iter().zip(codes).zip(errors) {
            let found = Factor::new(h, k, choice.scheme).quantize(rows, choice.method);
            let stands_for = found.dequantize(k, choice.scheme);
            let difference: Vec<f32> = rows.iter().zip(&stands_for).map(|(w, q)| w - q).collect();
            *error += output_error(&difference, h, k);
            codes.append(found);
            first.get_or_insert(stands_for);
        }
        first.ok_or_else(|| "no choice".into())
    }

    /// Keeps what was found for a weight whose outputs' squares sum to `squares`.
    fn keep(&mut self, name: &str, shape: &[usize], choices: &[Choice], codes: &[Codes], errors: &[f64], squares: f64) -> Result<()> {
        let mut measured = vec![];
        for ((choice, codes), error) in choices.iter().zip(codes).zip(errors) {
            self.found.put(&stored_name(name, choice.scheme), shape, choice.scheme, codes)?;
            let error = if squares > 0.0 { (error.max(0.0) / squares).sqrt() } else { 0.0 };
            measured.push(Measured { scheme: choice.scheme, error });
        }
        self.report.insert(name.into(), measured);
        Ok(())
    }
}

/// Rows of inputs that [`scaling::smooth`] is tried on.
const TRIED_ROWS: usize = 256;

/// What linear layers read; several may read the same.
struct Inputs {
    value: ValueId,
    moments: Array2<f32>,
    /// Of columns, if they are scaled.
    factors: Option<Vec<f32>>,
}

/// Finds codes for the layers of a graph when they come.
struct Layers<'a> {
    program: &'a Program,
    graph: &'a Graph,
    choices: &'a BTreeMap<String, Vec<Choice>>,
    findings: &'a RefCell<Findings>,
    /// Reads a weight.
    load: &'a dyn Fn(&str) -> Result<Array, String>,
    /// What was read last.
    inputs: Option<Inputs>,
    progress: &'a dyn Fn(&str),
}

impl Observer for Layers<'_> {
    fn before(&mut self, node: &Node, weights: &mut Resident<'_>, operands: &[Vec<Option<&Array>>]) -> Result<(), String> {
        self.codes(node, weights, operands)?;
        let Op::Linear(_) = &node.op else { return Ok(()) };
        let Def::Weight(name) = self.graph.def(node.args[1]) else { return Ok(()) };
        let x: Vec<_> = operands.iter().map(|o| rows_of(o, 0)).collect::<Result<_, _>>()?;
        self.findings.borrow_mut().see(name, &x);
        Ok(())
    }
}

impl Layers<'_> {
    /// Finds codes for the node's weights, if it has any that want them.
    fn codes(&mut self, node: &Node, weights: &mut Resident<'_>, operands: &[Vec<Option<&Array>>]) -> Result<(), String> {
        let names: Vec<Option<&String>> =
            node.args.iter().map(|v| if let Def::Weight(name) = self.graph.def(*v) { Some(name) } else { None }).collect();
        let wanted = |i: usize| names.get(i).copied().flatten().filter(|n| self.choices.contains_key(*n));
        // A layer that comes again, in another graph or with other samples, keeps its codes.
        let mut known = false;
        for name in names.iter().flatten() {
            let findings = self.findings.borrow();
            if let Some(measured) = findings.report.get(*name) {
                let scheme = measured.first().ok_or("nothing was measured")?.scheme;
                let codes = findings.found.get(&stored_name(name, scheme)).map_err(|e| e.to_string())?;
                match findings.factors.get(*name) {
                    Some(factors) => put(weights, name, |_| scaling::unscaled(&codes, scheme, factors))?,
                    None => put(weights, name, |k| codes.dequantize(k, scheme))?,
                }
                known = true;
            }
        }
        if known {
            return Ok(());
        }
        match &node.op {
            Op::Linear(_) => {
                let Some(name) = wanted(1) else { return Ok(()) };
                (self.progress)(name);
                let x = node.args[0];
                if self.inputs.as_ref().is_none_or(|i| i.value != x) {
                    self.inputs = Some(self.inputs(x, &operands.iter().map(|o| rows_of(o, 0)).collect::<Result<Vec<_>, _>>()?)?);
                }
                self.linear(name, self.inputs.as_ref().ok_or("no inputs")?, weights)
            }
            Op::Moe(moe) => {
                let experts = [3, 4, 5].map(wanted);
                let Some(name) = experts.iter().flatten().next() else { return Ok(()) };
                (self.progress)(name);
                self.experts(experts, [3, 4, 5].map(|i| names.get(i).copied().flatten()), moe.act, weights, operands)
            }
            _ => Ok(()),
        }
    }

    /// What is to be known of inputs, and the factors of their columns if their readers are to be scaled and can be.
    fn inputs(&self, value: ValueId, x: &[CowArray<'_, f32, Ix2>]) -> Result<Inputs, String> {
        let mut inputs = Inputs { value, moments: moments(x), factors: None };
        // What cannot be folded is quantized as it is.
        let Ok(fold) = scaling::fold(self.program, self.graph, value) else { return Ok(inputs) };
        let choices: Vec<&Choice> = fold.readers.iter().filter_map(|n| self.choices.get(n)?.first()).collect();
        let ways: Vec<Calibration> = choices.iter().map(|c| c.calibration).collect();
        let alike = choices.len() == fold.readers.len() && ways.iter().all(|w| *w == ways[0]);
        if !alike || !matches!(ways[0], Calibration::Awq | Calibration::Smooth) {
            return Ok(inputs);
        }
        let stacks = fold.readers.iter().map(|n| (self.load)(n)).collect::<Result<Vec<_>, _>>()?;
        let mut layers = vec![];
        for (stack, choice) in stacks.iter().zip(&choices) {
            layers.push(Layer { rows: stack.f32()?.as_slice().ok_or("not contiguous")?, scheme: choice.scheme });
        }
        let (rows, k) = (x.iter().map(|x| x.nrows()).sum::<usize>(), inputs.moments.nrows());
        let all = x.iter().flat_map(|x| x.outer_iter());
        inputs.factors = if ways[0] == Calibration::Awq {
            let mut means = vec![0f32; k];
            all.for_each(|row| means.iter_mut().zip(row).for_each(|(m, v)| *m += v.abs() / rows as f32));
            scaling::awq(&layers, inputs.moments.as_slice().ok_or("not contiguous")?, &means)
        } else {
            let some: Vec<f32> = all.step_by(rows.div_ceil(TRIED_ROWS).max(1)).flatten().copied().collect();
            scaling::smooth(&layers, &some, k)
        };
        let Some(factors) = &inputs.factors else { return Ok(inputs) };
        let mut findings = self.findings.borrow_mut();
        let at = format!("{}@columns", fold.readers[0]);
        let inverse: Vec<f32> = factors.iter().map(|f| 1.0 / f).collect();
        findings.found.put_vector(&format!("{at}.multiplied"), factors).map_err(|e| e.to_string())?;
        findings.found.put_vector(&format!("{at}.divided"), &inverse).map_err(|e| e.to_string())?;
        let declared = |name: &String| self.program.weights.get(name).map(|w| Box::new(w.recipe.clone())).ok_or("not declared");
        let mut folded = Folded { vectors: BTreeMap::new(), readers: BTreeMap::new() };
        for name in &fold.vectors {
            folded.vectors.insert(name.clone(), Recipe::Scale(declared(name)?, format!("{at}.divided")));
        }
        for (name, choice) in fold.readers.iter().zip(&choices) {
            let scaled = Recipe::Scale(declared(name)?, format!("{at}.multiplied"));
            let recipe = Recipe::Quantize(Box::new(scaled), choice.scheme, choice.method);
            folded.readers.insert(name.clone(), (choice.scheme, recipe));
            findings.factors.insert(name.clone(), factors.clone());
        }
        findings.folds.push(folded);
        Ok(inputs)
    }

    fn linear(&self, name: &str, inputs: &Inputs, weights: &mut Resident<'_>) -> Result<(), String> {
        let (w, moments) = (weights.get(name).ok_or("the weight is not there")?.f32()?, &inputs.moments);
        let (rows, shape) = (w.as_slice().ok_or("not contiguous")?, w.shape().to_vec());
        let (h, k) = (moments.as_slice().ok_or("not contiguous")?, moments.nrows());
        let choices = self.choices[name].as_slice();
        let (mut codes, mut errors) = (vec![Codes::default(); choices.len()], vec![0.0; choices.len()]);
        let stands_for = match (choices, &inputs.factors) {
            ([Choice { calibration: Calibration::Smooth, .. }], None) => return Ok(()),
            ([Choice { calibration: Calibration::Awq | Calibration::Smooth, scheme, method, .. }], factors) => {
                let ones = vec![1.0; k];
                let factors = factors.as_ref().unwrap_or(&ones);
                codes[0] = Codes::of(&scaling::scaled(rows, factors), k, *scheme, *method);
                let stands_for = scaling::unscaled(&codes[0], *scheme, factors);
                errors[0] = output_error(&rows.iter().zip(&stands_for).map(|(w, q)| w - q).collect::<Vec<_>>(), h, k);
                stands_for
            }
            _ => Findings::rows(rows, moments, choices, &mut codes, &mut errors)?,
        };
        let squares = output_error(rows, h, k);
        self.findings.borrow_mut().keep(name, &shape, choices, &codes, &errors, squares).map_err(|e| e.to_string())?;
        put(weights, name, |_| stands_for)
    }

    /// Stacks of experts, each of which has the inputs of the rows that go to it.
    fn experts(
        &self,
        wanted: [Option<&String>; 3],
        names: [Option<&String>; 3],
        act: Unary,
        weights: &mut Resident<'_>,
        operands: &[Vec<Option<&Array>>],
    ) -> Result<(), String> {
        let stacks = names.map(|n| weights.get(n?.as_str())?.f32().ok().cloned());
        let [Some(gate), Some(up), Some(down)] = stacks else { return Err("experts are no weights".into()) };
        let mut stacks = [gate, up, down];
        let x: Vec<_> = operands.iter().map(|o| rows_of(o, 0)).collect::<Result<_, _>>()?;
        let views: Vec<_> = x.iter().map(|x| x.view()).collect();
        let x = ndarray::concatenate(Axis(0), &views).map_err(|e| e.to_string())?;
        let chosen: Vec<Vec<i64>> = {
            let mut rows = vec![];
            for sample in operands {
                let ids = sample[1].ok_or("no choice of experts")?.i64()?;
                rows.extend(ids.as_standard_layout().outer_iter().map(|row| row.iter().copied().collect::<Vec<_>>()));
            }
            rows
        };
        let choices = wanted.map(|n| n.map_or(&[][..], |n| self.choices[n].as_slice()));
        let mut codes = choices.map(|c| vec![Codes::default(); c.len()]);
        let mut errors = choices.map(|c| vec![0.0; c.len()]);
        let mut squares = [0.0; 3];
        for e in 0..stacks[0].shape()[0] {
            let here: Vec<usize> = (0..chosen.len()).filter(|r| chosen[*r].contains(&(e as i64))).collect();
            let x = x.select(Axis(0), &here);
            let before = moments(&[x.view().into()]);
            let mut after = None;
            for i in 0..3 {
                if choices[i].is_empty() {
                    continue;
                }
                if i == 2 {
                    after = Some(moments(&[inner(&x, &stacks, e, act)?.into()]));
                }
                let moments = after.as_ref().unwrap_or(&before);
                let mut matrix = stacks[i].index_axis_mut(Axis(0), e);
                let rows: Vec<f32> = matrix.iter().copied().collect();
                squares[i] += output_error(&rows, moments.as_slice().ok_or("not contiguous")?, moments.nrows());
                let stands_for = Findings::rows(&rows, moments, choices[i], &mut codes[i], &mut errors[i])?;
                matrix.iter_mut().zip(stands_for).for_each(|(w, q)| *w = q);
            }
        }
        for (i, stack) in stacks.into_iter().enumerate() {
            let Some(name) = wanted[i] else { continue };
            let shape = stack.shape().to_vec();
            let mut findings = self.findings.borrow_mut();
            findings.keep(name, &shape, choices[i], &codes[i], &errors[i], squares[i]).map_err(|e| e.to_string())?;
            weights.insert(name.clone(), Cow::Owned(Array::F32(stack)));
        }
        Ok(())
    }
}

/// What `down` of expert `e` reads: `act(gate x) * up x`.
fn inner(x: &Array2<f32>, [gate, up, _]: &[ArrayD<f32>; 3], e: usize, act: Unary) -> Result<Array2<f32>, String> {
    let product = |w: &ArrayD<f32>| {
        let w = w.index_axis(Axis(0), e).into_dimensionality::<Ix2>().map_err(|e| e.to_string())?;
        Ok::<_, String>(x.dot(&w.t()))
    };
    let gate = product(gate)?.into_dyn();
    let ty = Type::new(DType::F32, gate.shape().iter().copied());
    let acted = interp::eval(&Elementwise1 { f: act }.into(), &[ty], &[&Array::F32(gate)], &Bindings::default())?;
    let gate = acted.first().ok_or("no result")?.f32()?.clone().into_dimensionality::<Ix2>().map_err(|e| e.to_string())?;
    Ok(gate * product(up)?)
}

/// Puts other numbers in the place of a weight.
fn put(weights: &mut Resident<'_>, name: &str, numbers: impl FnOnce(usize) -> Vec<f32>) -> Result<(), String> {
    let shape = weights.get(name).ok_or("the weight is not there")?.shape().to_vec();
    let numbers = numbers(shape.last().copied().unwrap_or(1));
    let array = ArrayD::from_shape_vec(IxDyn(&shape), numbers).map_err(|e| e.to_string())?;
    weights.insert(name.into(), Cow::Owned(Array::F32(array)));
    Ok(())
}

/// Rows of an operand of a sample, `[rows, k]`.
fn rows_of<'a>(operands: &[Option<&'a Array>], operand: usize) -> Result<CowArray<'a, f32, Ix2>, String> {
    let x = operands.get(operand).copied().flatten().ok_or("a layer reads a weight")?.f32()?;
    let k = x.shape().last().copied().unwrap_or(1);
    x.to_shape((x.len() / k.max(1), k)).map_err(|e| e.to_string())
}

/// `Σ x xᵀ` over the rows of all samples. The sums are in the same order on any number of threads.
fn moments(samples: &[CowArray<'_, f32, Ix2>]) -> Array2<f32> {
    const BAND: usize = 256;
    let k = samples.first().map_or(0, |x| x.ncols());
    let mut h = Array2::zeros((k, k));
    let bands: Vec<_> = h.axis_chunks_iter_mut(Axis(0), BAND).enumerate().collect();
    bands.into_par_iter().for_each(|(i, mut band)| {
        for x in samples {
            let columns = x.slice(s![.., i * BAND..i * BAND + band.nrows()]);
            general_mat_mul(1.0, &columns.t(), x, 1.0, &mut band);
        }
    });
    h
}
