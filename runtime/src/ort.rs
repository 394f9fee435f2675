//! The engine of `onnx-*` artifacts: ONNX Runtime, whose library is loaded when it is needed (`ORT_DYLIB_PATH` names it).

use crate::{Artifact, Data, Engine, Error, Result, Tensor, binding};
use half::{bf16, f16};
use ort::{
    environment::Environment,
    session::{Session, SessionInputValue, builder::GraphOptimizationLevel},
    value::{DynTensor, DynValue, PrimitiveTensorElementType, TensorElementType, ValueType},
};
use std::{
    borrow::Cow,
    num::NonZero,
    path::Path,
    sync::{Mutex, PoisonError},
};
use vlmc_artifact::{Bindings, DType, Manifest};

/// Environment variable that names the library.
const LIBRARY: &str = "ORT_DYLIB_PATH";

/// Runs an `onnx-*` artifact on ONNX Runtime's CPU provider.
pub(crate) struct OrtEngine {
    manifest: Manifest,
    entries: Vec<Loaded>,
}

struct Loaded {
    session: Session,
    /// Present values of the last run, in the order of the entry's states.
    states: Vec<DynValue>,
}

fn failed(what: &str) -> impl Fn(ort::Error) -> Error {
    let what = what.to_string();
    move |e| Error::Input(format!("{what}: ONNX Runtime: {e}"))
}

impl OrtEngine {
    /// Loads the graphs; `threads` is the number of CPU threads, by default as many as [`crate::threads`] says.
    ///
    /// # Errors
    /// The library is not there or too old, or it refuses a graph.
    pub(crate) fn open(artifact: &Artifact, threads: Option<NonZero<usize>>) -> Result<Self> {
        let environment = environment()?;
        let manifest = artifact.manifest().clone();
        let threads = crate::threads(threads);
        let entries = manifest
            .entries
            .iter()
            .map(|e| {
                let path = artifact.require(&e.file)?;
                let refused = |why: String| Error::file(&path, format!("ONNX Runtime refuses it: {why}"));
                let session = Session::builder(environment)
                    .and_then(|b| Ok(b.with_optimization_level(GraphOptimizationLevel::All)?))
                    .and_then(|b| Ok(b.with_intra_threads(threads)?))
                    .and_then(|mut b| b.commit_from_file(&path))
                    .map_err(|e| refused(e.to_string()))?;
                let takes: Vec<&str> = session.inputs().iter().map(|i| i.name()).collect();
                let gives: Vec<&str> = session.outputs().iter().map(|o| o.name()).collect();
                let inputs = e.inputs.iter().map(|p| &p.name).chain(e.states.iter().map(|s| &s.past));
                let outputs = e.outputs.iter().map(|p| &p.name).chain(e.states.iter().map(|s| &s.present));
                let missing =
                    inputs.filter(|n| !takes.contains(&n.as_str())).chain(outputs.filter(|n| !gives.contains(&n.as_str()))).next();
                match missing {
                    Some(name) => Err(refused(format!("it has no input or output '{name}'"))),
                    None => Ok(Loaded { session, states: vec![] }),
                }
            })
            .collect::<Result<_>>()?;
        Ok(Self { manifest, entries })
    }
}

/// ONNX Runtime's environment, of which a process can have one only.
fn environment() -> Result<&'static Environment> {
    static ENVIRONMENT: Mutex<Option<&'static Environment>> = Mutex::new(None);
    let mut environment = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(environment) = *environment {
        return Ok(environment);
    }
    let how = "install the Python package onnxruntime, or download a release, and let it name libonnxruntime.so (in the package: onnxruntime/capi)";
    let library = std::env::var_os(LIBRARY).ok_or_else(|| {
        Error::Unsupported(format!("this artifact runs on ONNX Runtime, but the environment variable {LIBRARY} is not set; {how}"))
    })?;
    if !Path::new(&library).is_file() {
        return Err(Error::Unsupported(format!("{LIBRARY} names {}, which is not a file; {how}", library.display())));
    }
    let unusable = |e: &dyn std::fmt::Display| Error::Unsupported(format!("{}: cannot be used as ONNX Runtime: {e}", library.display()));
    let made = ort::init_from(&library).map_err(|e| unusable(&e))?.with_name("vlmc").build().map_err(|e| unusable(&e))?;
    // It lives as long as the process.
    Ok(environment.insert(Box::leak(Box::new(made))))
}

fn shape_of(v: &DynValue) -> Vec<usize> {
    v.shape().iter().map(|d| *d as usize).collect()
}

/// The kernels of attention on a GPU know the length of a row, and no mask.
fn padding_is_last(inputs: &[(&str, &Tensor)]) -> Result<()> {
    let Some((_, mask)) = inputs.iter().find(|(name, _)| *name == "attention_mask") else { return Ok(()) };
    let Data::I64(live) = mask.data() else { return Ok(()) };
    let width = mask.shape().last().copied().unwrap_or(1).max(1);
    match live.chunks(width).position(|row| row.windows(2).any(|w| w[0] == 0 && w[1] != 0)) {
        Some(row) => Err(Error::Unsupported(format!(
            "attention_mask: row {row} has padding before tokens; for target 'onnx-cuda' it must stand at the end"
        ))),
        None => Ok(()),
    }
}

/// A state without positions.
fn empty(dtype: DType, shape: Vec<i64>) -> ort::Result<DynValue> {
    Ok(match dtype {
        DType::F16 => ort::value::Tensor::<f16>::from_array((shape, vec![]))?.into_dyn(),
        DType::BF16 => ort::value::Tensor::<bf16>::from_array((shape, vec![]))?.into_dyn(),
        _ => ort::value::Tensor::<f32>::from_array((shape, vec![]))?.into_dyn(),
    })
}

/// A state's first `len` positions along `axis`.
fn shortened<T: PrimitiveTensorElementType + std::fmt::Debug + Copy + 'static>(
    value: &DynValue,
    axis: usize,
    len: usize,
) -> ort::Result<DynValue> {
    let mut shape = shape_of(value);
    let (outer, inner): (usize, usize) = (shape[..axis].iter().product(), shape[axis + 1..].iter().product());
    let (_, data) = value.try_extract_tensor::<T>()?;
    let row = shape[axis] * inner;
    let kept: Vec<T> = (0..outer).flat_map(|o| &data[o * row..o * row + len * inner]).copied().collect();
    shape[axis] = len;
    let shape: Vec<i64> = shape.into_iter().map(|d| d as i64).collect();
    Ok(ort::value::Tensor::from_array((shape, kept))?.into_dyn())
}

fn to_ort(t: &Tensor) -> ort::Result<DynTensor> {
    let shape: Vec<i64> = t.shape().iter().map(|d| *d as i64).collect();
    Ok(match t.data() {
        Data::F32(v) => ort::value::Tensor::from_array((shape, v.clone()))?.upcast(),
        Data::I64(v) => ort::value::Tensor::from_array((shape, v.clone()))?.upcast(),
        Data::Bool(v) => ort::value::Tensor::from_array((shape, v.clone()))?.upcast(),
    })
}

fn from_ort(v: &DynValue) -> Result<Tensor> {
    let kind = match v.dtype() {
        ValueType::Tensor { ty, .. } => *ty,
        _ => return Err(Error::Input("an output is not a tensor".into())),
    };
    let bad = failed("reading an output");
    let shape = shape_of(v);
    match kind {
        TensorElementType::Float32 => Tensor::new(shape, v.try_extract_tensor::<f32>().map_err(bad)?.1.to_vec()),
        TensorElementType::Float16 => {
            Tensor::new(shape, v.try_extract_tensor::<f16>().map_err(bad)?.1.iter().map(|v| v.to_f32()).collect::<Vec<f32>>())
        }
        TensorElementType::Bfloat16 => {
            Tensor::new(shape, v.try_extract_tensor::<bf16>().map_err(bad)?.1.iter().map(|v| v.to_f32()).collect::<Vec<f32>>())
        }
        TensorElementType::Int64 => Tensor::new(shape, v.try_extract_tensor::<i64>().map_err(bad)?.1.to_vec()),
        TensorElementType::Bool => Tensor::new(shape, v.try_extract_tensor::<bool>().map_err(bad)?.1.to_vec()),
        other => Err(Error::Unsupported(format!("an output has type {other:?}"))),
    }
}

impl Engine for OrtEngine {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn run(&mut self, entry: &str, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>> {
        let index = self.manifest.entries.iter().position(|e| e.name == entry);
        let index = index.ok_or_else(|| Error::Input(format!("the artifact has no entry '{entry}'")))?;
        if self.manifest.target == "onnx-cuda" && !self.manifest.entries[index].states.is_empty() && self.past() == 0 {
            padding_is_last(inputs)?;
        }
        let (e, loaded) = (&self.manifest.entries[index], &mut self.entries[index]);
        let mut symbols = Bindings::default();
        let bound = binding::bind(&self.manifest.symbols, e, inputs, |i| loaded.states.get(i).map(shape_of), &mut symbols)?;
        let bad = failed(entry);

        let mut feed: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = vec![];
        for (port, tensor) in e.inputs.iter().zip(bound) {
            feed.push((port.name.as_str().into(), to_ort(tensor).map_err(&bad)?.into()));
        }
        for (i, state) in e.states.iter().enumerate() {
            let past = match loaded.states.get(i) {
                Some(value) => value.into(),
                None => {
                    let shape = state.shape.iter().map(|d| d.eval(&symbols)).collect::<Result<Vec<i64>, _>>();
                    let shape = shape.map_err(|e| Error::Input(format!("{entry}: state '{}': {e}", state.past)))?;
                    empty(state.dtype, shape).map_err(&bad)?.into()
                }
            };
            feed.push((state.past.as_str().into(), past));
        }
        let mut results = loaded.session.run(feed).map_err(&bad)?;
        let missing = |name: &str| Error::Input(format!("{entry}: ONNX Runtime gave no '{name}'"));
        let outputs =
            e.outputs.iter().map(|p| from_ort(results.get(&p.name).ok_or_else(|| missing(&p.name))?)).collect::<Result<Vec<_>>>()?;
        let states = e.states.iter().map(|s| results.remove(&s.present).ok_or_else(|| missing(&s.present))).collect::<Result<Vec<_>>>()?;
        drop(results);
        loaded.states = states;
        Ok(outputs)
    }

    fn past(&self) -> usize {
        let states = self.manifest.entries.iter().zip(&self.entries).flat_map(|(e, l)| e.states.iter().zip(&l.states));
        states.filter(|(s, _)| s.follows_text()).map(|(s, v)| shape_of(v)[s.axis]).next().unwrap_or(0)
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        let past = self.past();
        if len > past {
            return Err(Error::Input(format!("cannot keep {len} positions of {past}")));
        }
        for (entry, loaded) in self.manifest.entries.iter().zip(&mut self.entries) {
            if len == 0 {
                loaded.states.clear();
            }
            for (state, value) in entry.states.iter().zip(&mut loaded.states) {
                if shape_of(value)[state.axis] == len || !state.follows_text() {
                    continue;
                }
                *value = match state.dtype {
                    DType::F16 => shortened::<f16>(value, state.axis, len),
                    DType::BF16 => shortened::<bf16>(value, state.axis, len),
                    _ => shortened::<f32>(value, state.axis, len),
                }
                .map_err(failed("shortening a state"))?;
            }
        }
        Ok(())
    }
}
