//! The reference interpreter: runs a graph op by op on ndarray, in `f32`, by the ops' own definitions. Slow, and the oracle
//! for everything else.

use crate::{
    Bindings, DType, Def, Dim, Graph, Literal, Op, Program, Type,
    builder::Builder,
    weights::{Recipe, WeightDef},
};
use ndarray::{ArrayD, IxDyn, Zip};
use std::collections::{BTreeMap, HashMap};
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
    let fail = |scope: &str, message: String| EvalError { graph: graph.name.clone(), scope: scope.into(), message };
    let named = |table: &BTreeMap<String, Array>, name: &str, ty: &Type| {
        let a = table.get(name).ok_or_else(|| fail("", format!("no value for '{name}'")))?;
        let shape = extents(&ty.shape, env.symbols).map_err(|m| fail("", m))?;
        let same_kind = a.dtype() == ty.dtype || (a.dtype() == DType::F32 && ty.dtype.is_float());
        if !same_kind || a.shape() != shape {
            return Err(fail("", format!("'{name}' must be {ty}, here {shape:?}, got {}{:?}", a.dtype(), a.shape())));
        }
        Ok(a.clone())
    };
    // A value is dropped after its last use, so that whole models fit.
    let mut uses: HashMap<_, usize> = HashMap::new();
    for (_, n) in graph.nodes() {
        n.args.iter().for_each(|a| *uses.entry(*a).or_default() += 1);
    }
    let kept = graph.outputs.iter().map(|o| o.value).chain(graph.states.iter().filter_map(|s| graph.present(s)));
    kept.for_each(|v| *uses.entry(v).or_default() += 1);

    let mut values: HashMap<_, Array> = HashMap::new();
    for (v, ty, def) in graph.values() {
        let array = match def {
            Def::Input(i) => named(env.inputs, &graph.inputs[*i as usize].name, ty)?,
            Def::State(i) => named(env.inputs, &graph.states[*i as usize].past_name, ty)?,
            Def::Literal(l) => l.try_into().map_err(|m| fail("", m))?,
            Def::Weight(_) | Def::Node(..) => continue,
        };
        values.insert(v, array);
    }
    for (_, node) in graph.nodes() {
        let in_node = |m: String| fail(&node.scope, format!("{}: {m}", node.op.name()));
        let mut args = Vec::with_capacity(node.args.len());
        for a in &node.args {
            args.push(match graph.def(*a) {
                Def::Weight(name) => named(env.weights, name, graph.ty(*a))?,
                _ => values.get(a).cloned().ok_or_else(|| in_node(format!("value %{} is used before it is defined", a.index())))?,
            });
        }
        let types: Vec<Type> = node.args.iter().map(|a| graph.ty(*a).clone()).collect();
        let outs = eval(&node.op, &types, args, env.symbols).map_err(in_node)?;
        values.extend(node.outs.iter().copied().zip(outs));
        for a in &node.args {
            let left = uses.entry(*a).or_default();
            *left -= 1;
            if *left == 0 {
                values.remove(a);
            }
        }
    }
    let states = graph.states.iter().filter_map(|s| Some((&s.present_name, graph.present(s)?)));
    let outputs = graph.outputs.iter().map(|o| (&o.name, o.value)).chain(states);
    outputs
        .map(|(name, v)| match values.get(&v) {
            Some(a) => Ok((name.clone(), a.clone())),
            None => Err(fail("", format!("output '{name}' has no value"))),
        })
        .collect()
}

/// Meaning of one op: its own if it is a primitive, else that of its decomposition.
///
/// # Errors
/// Values that have no meaning.
pub fn eval(op: &Op, types: &[Type], args: Vec<Array>, symbols: &Bindings) -> Result<Vec<Array>, String> {
    let b = Builder::new(&op.name(), None);
    if !decompose_into(&b, op, types) {
        return op.eval(&args, symbols);
    }
    let graph = b.finish().map_err(|e| e.to_string())?;
    let inputs = graph.inputs.iter().map(|p| p.name.clone()).zip(args).collect();
    let mut outs = run(&graph, &Env { symbols, inputs: &inputs, weights: &BTreeMap::new() }).map_err(|e| e.to_string())?;
    graph.outputs.iter().map(|o| outs.remove(&o.name).ok_or_else(|| "result missing".to_string())).collect()
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
        Recipe::Cast(inner, dtype) => Ok(recipe(inner, source, k)?
            .into_iter()
            .map(|v| match dtype {
                DType::F16 => half::f16::from_f32(v).to_f32(),
                DType::BF16 => half::bf16::from_f32(v).to_f32(),
                _ => v,
            })
            .collect()),
    }
}

/// All weights of a program.
///
/// # Errors
/// As [`weight`], with the weight's name.
pub fn weights(program: &Program, source: &dyn Fn(&str) -> Result<Vec<f32>, String>) -> Result<BTreeMap<String, Array>, String> {
    program.weights.iter().map(|(n, d)| Ok((n.clone(), weight(d, source).map_err(|e| format!("weight '{n}': {e}"))?))).collect()
}
