//! The reference interpreter: runs a graph op by op on ndarray, in `f32`, by the ops' own definitions. Slow, and the oracle
//! for everything else.

use crate::{
    Bindings, DType, Def, Dim, Graph, Literal, Node, Op, Program, Type, ValueId,
    builder::Builder,
    ops::Linear,
    weights::{Recipe, WeightDef},
};
use ndarray::{ArrayD, IxDyn, Zip};
use rayon::prelude::*;
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
};
use vlmc_artifact::quant::Codes;

/// A tensor. All float types hold `f32` values.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    F32(ArrayD<f32>),
    I64(ArrayD<i64>),
    Bool(ArrayD<bool>),
}

impl Array {
    /// Elements of an `f32` (or `f16`, `bf16`) tensor.
    ///
    /// # Errors
    /// It is another.
    pub fn f32(&self) -> Result<&ArrayD<f32>, String> {
        if let Self::F32(a) = self { Ok(a) } else { Err(format!("expected f32, got {}", self.dtype())) }
    }

    /// Elements of an `i64` tensor.
    ///
    /// # Errors
    /// It is another.
    pub fn i64(&self) -> Result<&ArrayD<i64>, String> {
        if let Self::I64(a) = self { Ok(a) } else { Err(format!("expected i64, got {}", self.dtype())) }
    }

    /// Elements of a `bool` tensor.
    ///
    /// # Errors
    /// It is another.
    pub fn bool(&self) -> Result<&ArrayD<bool>, String> {
        if let Self::Bool(a) = self { Ok(a) } else { Err(format!("expected bool, got {}", self.dtype())) }
    }

    /// Element type; `f32` for all floats.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::I64(_) => DType::I64,
            Self::Bool(_) => DType::Bool,
        }
    }

    /// Shape.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::F32(a) => a.shape(),
            Self::I64(a) => a.shape(),
            Self::Bool(a) => a.shape(),
        }
    }
}

impl TryFrom<&Literal> for Array {
    type Error = String;

    fn try_from(l: &Literal) -> Result<Self, String> {
        fn array<T>(l: &Literal, f: fn(&f64) -> T) -> Result<ArrayD<T>, String> {
            ArrayD::from_shape_vec(IxDyn(&l.shape), l.data.iter().map(f).collect()).map_err(|e| e.to_string())
        }
        Ok(match l.dtype {
            DType::I64 => Self::I64(array(l, |v| *v as i64)?),
            DType::Bool => Self::Bool(array(l, |v| *v != 0.0)?),
            d if d.is_float() => Self::F32(array(l, |v| *v as f32)?),
            d => return Err(format!("no literals of {d}")),
        })
    }
}

/// Why a graph did not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{graph}{}{scope}: {message}", if .scope.is_empty() { "" } else { ": " })]
pub struct EvalError {
    /// Graph name.
    pub graph: String,
    /// Scope of the node, if a node failed.
    pub scope: String,
    /// What is wrong.
    pub message: String,
}

/// `f` over two arrays with NumPy broadcasting.
pub(crate) fn broadcast2<A: Copy, B: Copy, C>(a: &ArrayD<A>, b: &ArrayD<B>, f: impl Fn(A, B) -> C) -> Result<ArrayD<C>, String> {
    let dims = |s: &[usize]| s.iter().map(|d| Dim::from(*d)).collect::<Vec<_>>();
    let shape = crate::ops::broadcast_shapes(&dims(a.shape()), &dims(b.shape()))?;
    let shape: Vec<usize> = shape.iter().map(|d| d.as_const().unwrap_or(0) as usize).collect();
    let (a, b) = (a.broadcast(shape.clone()).ok_or("no broadcast")?, b.broadcast(shape).ok_or("no broadcast")?);
    Ok(Zip::from(a).and(b).map_collect(|a, b| f(*a, *b)))
}

/// Values of dims.
pub(crate) fn extents(shape: &[Dim], symbols: &Bindings) -> Result<Vec<usize>, String> {
    let extent = |d: &Dim| {
        let v = d.eval(symbols).map_err(|e| e.to_string())?;
        usize::try_from(v).map_err(|_| format!("dim {d} is {v}"))
    };
    shape.iter().map(extent).collect()
}

/// What a run needs besides the graph.
pub struct Env<'a> {
    /// Values of the symbols.
    pub symbols: &'a Bindings,
    /// Inputs, and states by their `past` name.
    pub inputs: &'a BTreeMap<String, Array>,
    /// Weights by name.
    pub weights: &'a BTreeMap<String, Array>,
}

/// Runs `graph`: its outputs, and its states by their `present` name.
///
/// # Errors
/// An input is missing or has another type, or an op met values without meaning.
pub fn run(graph: &Graph, env: &Env<'_>) -> Result<BTreeMap<String, Array>, EvalError> {
    let weights = |name: &str| env.weights.get(name).map(Cow::Borrowed).ok_or_else(|| format!("no value for '{name}'"));
    let sample = Sample { symbols: env.symbols, inputs: env.inputs };
    run_samples(graph, &[sample], &weights, &mut Unwatched).map(|mut outs| outs.remove(0))
}

/// What a run of several samples needs for each.
#[derive(Clone, Copy)]
pub struct Sample<'a> {
    /// Values of the symbols.
    pub symbols: &'a Bindings,
    /// Inputs, and states by their `past` name.
    pub inputs: &'a BTreeMap<String, Array>,
}

/// Weights that are in memory, by name.
pub type Resident<'w> = BTreeMap<String, Cow<'w, Array>>;

/// Sees every node of a run of several samples, and may change the weights that it works with.
pub trait Observer {
    /// `node` comes next, and its weights are resident; what is put in the place of one is what the node computes with, as do later
    /// nodes that use the same weight. `operands` has for each sample the node's operands, `None` for a weight.
    ///
    /// # Errors
    /// Ends the run.
    fn before(&mut self, _node: &Node, _weights: &mut Resident<'_>, _operands: &[Vec<Option<&Array>>]) -> Result<(), String> {
        Ok(())
    }

    /// `node` has computed `results`, for each sample, which may be changed; else as [`Self::before`].
    ///
    /// # Errors
    /// Ends the run.
    fn after(
        &mut self,
        _node: &Node,
        _weights: &Resident<'_>,
        _operands: &[Vec<Option<&Array>>],
        _results: &mut [Vec<Array>],
    ) -> Result<(), String> {
        Ok(())
    }
}

struct Unwatched;

impl Observer for Unwatched {}

/// Runs `graph` on several samples in step: each node on all of them before the next node. A weight is asked from `weights` when
/// the first node that uses it comes, and dropped after the last, as values are: whole models fit that way. For each sample, its
/// outputs, and its states by their `present` name.
///
/// # Errors
/// As [`run`], and what `weights` and the observer say.
pub fn run_samples<'w>(
    graph: &Graph,
    samples: &[Sample<'_>],
    weights: &dyn Fn(&str) -> Result<Cow<'w, Array>, String>,
    observer: &mut dyn Observer,
) -> Result<Vec<BTreeMap<String, Array>>, EvalError> {
    let fail = |message: String| EvalError { graph: graph.name.clone(), scope: String::new(), message };
    let states = graph.states.iter().filter_map(|s| Some((&s.present_name, graph.present(s)?)));
    let (names, outs): (Vec<_>, Vec<_>) = graph.outputs.iter().map(|o| (&o.name, o.value)).chain(states).unzip();
    let values = samples.iter().map(|s| given(graph, s)).collect::<Result<Vec<_>, _>>().map_err(fail)?;
    let symbols: Vec<&Bindings> = samples.iter().map(|s| s.symbols).collect();
    let results = execute(graph, &outs, &symbols, values, weights, observer)?;
    Ok(results.into_iter().map(|outs| names.iter().map(|n| (*n).clone()).zip(outs).collect()).collect())
}

/// Values of a sample, or of a decomposition.
type Values<'s> = HashMap<ValueId, Cow<'s, Array>>;

/// Inputs and states, as a sample gives them.
fn given<'s>(graph: &Graph, sample: &Sample<'s>) -> Result<Values<'s>, String> {
    let ports = graph.inputs.iter().map(|p| (&p.name, p.value)).chain(graph.states.iter().map(|s| (&s.past_name, s.past)));
    ports
        .map(|(name, v)| {
            let array = sample.inputs.get(name).ok_or_else(|| format!("no value for '{name}'"))?;
            check_type(name, array, graph.ty(v), sample.symbols)?;
            Ok((v, Cow::Borrowed(array)))
        })
        .collect()
}

/// The values `outs` of each sample, from those that are given.
fn execute<'w>(
    graph: &Graph,
    outs: &[ValueId],
    symbols: &[&Bindings],
    mut values: Vec<Values<'_>>,
    weights: &dyn Fn(&str) -> Result<Cow<'w, Array>, String>,
    observer: &mut dyn Observer,
) -> Result<Vec<Vec<Array>>, EvalError> {
    let fail = |scope: &str, message: String| EvalError { graph: graph.name.clone(), scope: scope.into(), message };
    let mut uses: HashMap<ValueId, usize> = HashMap::new();
    graph.nodes().flat_map(|(_, n)| &n.args).chain(outs).for_each(|v| *uses.entry(*v).or_default() += 1);
    for (v, _, def) in graph.values() {
        if let Def::Literal(l) = def {
            let array = Array::try_from(l).map_err(|m| fail("", m))?;
            values.iter_mut().for_each(|values| drop(values.insert(v, Cow::Owned(array.clone()))));
        }
    }
    let mut resident = Resident::new();
    for (_, node) in graph.nodes() {
        let in_node = |m: String| fail(&node.scope, format!("{}: {m}", node.op.name()));
        let weight_of = |v: &ValueId| if let Def::Weight(name) = graph.def(*v) { Some(name) } else { None };
        for v in &node.args {
            match weight_of(v) {
                Some(name) if !resident.contains_key(name) => {
                    let weight = weights(name).map_err(in_node)?;
                    check_type(name, &weight, graph.ty(*v), &Bindings::default()).map_err(in_node)?;
                    resident.insert(name.clone(), weight);
                }
                None if !values.iter().all(|values| values.contains_key(v)) => {
                    return Err(in_node(format!("value %{} is used before it is defined", v.index())));
                }
                _ => {}
            }
        }
        let operands: Vec<Vec<Option<&Array>>> =
            values.iter().map(|values| node.args.iter().map(|v| values.get(v).map(AsRef::as_ref)).collect()).collect();
        observer.before(node, &mut resident, &operands).map_err(in_node)?;

        let types: Vec<Type> = node.args.iter().map(|a| graph.ty(*a).clone()).collect();
        let compute = |(operands, symbols): (&Vec<Option<&Array>>, &&Bindings)| {
            let args = std::iter::zip(operands, &node.args)
                .map(|(a, v)| a.or_else(|| resident.get(weight_of(v)?).map(AsRef::as_ref)).ok_or("a weight was taken away"))
                .collect::<Result<Vec<_>, _>>()?;
            eval(&node.op, &types, &args, symbols)
        };
        let mut results = operands.par_iter().zip(symbols).map(compute).collect::<Result<Vec<_>, String>>().map_err(in_node)?;
        observer.after(node, &resident, &operands, &mut results).map_err(in_node)?;

        for (values, results) in values.iter_mut().zip(results) {
            values.extend(node.outs.iter().copied().zip(results.into_iter().map(Cow::Owned)));
        }
        for v in &node.args {
            let left = uses.entry(*v).or_default();
            *left -= 1;
            if *left == 0 {
                values.iter_mut().for_each(|values| drop(values.remove(v)));
                weight_of(v).map(|name| resident.remove(name));
            }
        }
    }
    let taken = |values: &mut Values<'_>, (i, v): (usize, &ValueId)| {
        let again = outs[i + 1..].contains(v);
        let value = if again { values.get(v).cloned() } else { values.remove(v) };
        value.map(Cow::into_owned).ok_or_else(|| fail("", "an output has no value".into()))
    };
    values.iter_mut().map(|values| outs.iter().enumerate().map(|o| taken(values, o)).collect()).collect()
}

fn check_type(name: &str, array: &Array, ty: &Type, symbols: &Bindings) -> Result<(), String> {
    let shape = extents(&ty.shape, symbols)?;
    let same_kind = array.dtype() == ty.dtype || (array.dtype() == DType::F32 && ty.dtype.is_float());
    if same_kind && array.shape() == shape {
        return Ok(());
    }
    Err(format!("'{name}' must be {ty}, here {shape:?}, got {}{:?}", array.dtype(), array.shape()))
}

/// Meaning of one op: its own if it is a primitive, else that of its decomposition. Results of narrower floats are rounded.
///
/// # Errors
/// Values that have no meaning.
pub fn eval(op: &Op, types: &[Type], args: &[&Array], symbols: &Bindings) -> Result<Vec<Array>, String> {
    let narrow = |t: &Type| matches!(t.dtype, DType::F16 | DType::BF16);
    if !types.iter().any(narrow) {
        return eval_wide(op, types, args, symbols);
    }
    let wide: Vec<Type> = types.iter().map(|t| if narrow(t) { t.with_dtype(DType::F32) } else { t.clone() }).collect();
    let results = eval_wide(op, &wide, args, symbols)?;
    let rounded = results.into_iter().zip(op.infer(types)?).map(|(result, ty)| match result {
        Array::F32(a) if narrow(&ty) => Array::F32(a.mapv(|v| round(v, ty.dtype))),
        other => other,
    });
    Ok(rounded.collect())
}

/// The nearest number of a float type.
fn round(v: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => half::f16::from_f32(v).to_f32(),
        DType::BF16 => half::bf16::from_f32(v).to_f32(),
        _ => v,
    }
}

fn eval_wide(op: &Op, types: &[Type], args: &[&Array], symbols: &Bindings) -> Result<Vec<Array>, String> {
    // What models spend their time in: the same sums as the decomposition's, without its copies of the weight.
    if let Op::Linear(Linear { dynamic: false, act: None }) = op {
        return op.eval(args, symbols);
    }
    let b = Builder::new(&op.name(), None);
    if !decompose_into(&b, op, types) {
        return op.eval(args, symbols);
    }
    let graph = b.finish().map_err(|e| e.to_string())?;
    let values = graph.inputs.iter().map(|p| p.value).zip(args.iter().map(|a| Cow::Borrowed(*a))).collect();
    let outs: Vec<ValueId> = graph.outputs.iter().map(|o| o.value).collect();
    let no_weights = |name: &str| Err(format!("no weight '{name}'"));
    let results = execute(&graph, &outs, &[symbols], vec![values], &no_weights, &mut Unwatched).map_err(|e| e.to_string())?;
    Ok(results.into_iter().flatten().collect())
}

fn decompose_into<'g>(b: &'g Builder<'g>, op: &Op, types: &[Type]) -> bool {
    let args: Vec<_> = types.iter().enumerate().map(|(i, t)| b.input(&format!("arg{i}"), t.dtype, t.shape.iter())).collect();
    let outs = op.decompose(b, &args);
    outs.iter().flatten().enumerate().for_each(|(i, v)| b.output(&format!("out{i}"), *v));
    outs.is_some()
}

/// Elements of a weight, from `source`, which reads a checkpoint tensor as `f32` in row-major order.
///
/// # Errors
/// What `source` said, or a recipe that does not fit its tensors.
pub fn weight(def: &WeightDef, source: &dyn Fn(&str) -> Result<Vec<f32>, String>) -> Result<Array, String> {
    let data = recipe(&def.recipe, source, def.shape.last().copied().unwrap_or(1))?;
    ArrayD::from_shape_vec(IxDyn(&def.shape), data).map(Array::F32).map_err(|e| e.to_string())
}

/// `k`: the last dim of the weight.
fn recipe(r: &Recipe, source: &dyn Fn(&str) -> Result<Vec<f32>, String>, k: usize) -> Result<Vec<f32>, String> {
    match r {
        Recipe::Source(name) => source(name),
        Recipe::Reshape(inner, _) => recipe(inner, source, k),
        Recipe::Transpose(inner, rows) => {
            let data = recipe(inner, source, k)?;
            let n = data.len() / (*rows).max(1);
            Ok((0..n).flat_map(|c| (0..*rows).map(move |r| (r, c))).map(|(r, c)| data[r * n + c]).collect())
        }
        Recipe::Concat(parts) => Ok(parts.iter().map(|p| recipe(p, source, k)).collect::<Result<Vec<_>, _>>()?.concat()),
        Recipe::Interleave(parts, rows) => {
            let parts = parts.iter().map(|p| recipe(p, source, k)).collect::<Result<Vec<_>, _>>()?;
            let matrices = parts.first().map_or(0, |p| p.len() / (rows * k).max(1));
            let rows = (0..matrices * rows).flat_map(|r| parts.iter().map(move |p| p.get(r * k..(r + 1) * k)));
            Ok(rows.collect::<Option<Vec<_>>>().ok_or("interleaved matrices are of different shapes")?.concat())
        }
        Recipe::Scale(inner, by) => {
            let by = source(by)?;
            Ok(recipe(inner, source, k)?.iter().zip(by.iter().cycle()).map(|(x, s)| x * s).collect())
        }
        Recipe::Quantize(inner, scheme, method) => Ok(Codes::of(&recipe(inner, source, k)?, k, *scheme, *method).dequantize(k, *scheme)),
        Recipe::Codes(name, scheme) => {
            let part = |part: &str| source(&format!("{name}.{part}"));
            let bytes = |v: Vec<f32>| v.into_iter().map(|c| c as u8).collect();
            let codes = Codes { codes: bytes(part("codes")?), scales: part("scales")?, zeros: bytes(part("zeros")?) };
            Ok(codes.dequantize(k, *scheme))
        }
        Recipe::Cast(inner, dtype) => Ok(recipe(inner, source, k)?.into_iter().map(|v| round(v, *dtype)).collect()),
    }
}

/// All weights of a program.
///
/// # Errors
/// As [`weight`], with the weight's name.
pub fn weights(program: &Program, source: &dyn Fn(&str) -> Result<Vec<f32>, String>) -> Result<BTreeMap<String, Array>, String> {
    program.weights.iter().map(|(n, d)| Ok((n.clone(), weight(d, source).map_err(|e| format!("weight '{n}': {e}"))?))).collect()
}
