//! The engine of `onnx-*` artifacts: ONNX Runtime, whose library is loaded when it is needed (`ORT_DYLIB_PATH` names it).

mod provider;
mod resize;

use crate::{Artifact, Data, Engine, EngineOptions, Error, Result, Tensor, binding};
use half::{bf16, f16};
use ort::{
    memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType},
    session::Session,
    value::{DynTensor, DynTensorValueType, DynValue, TensorElementType},
};
use provider::Device;
use resize::Resizer;
use vlmc_artifact::{Bindings, DType, Manifest, State};

/// Runs an `onnx-*` artifact on ONNX Runtime.
///
/// All inputs and outputs are bound, so that states (the KV cache) stay where the provider computes and are never copied from or to
/// the host. A state that its graph writes in place has one buffer, bound to past and present alike, which doubles when it is full:
/// there is never more than twice the memory that is needed, and a token costs no copy of the tokens before it. Other states, of
/// graphs that concatenate (`onnx-tensorrt`), are what the last run made, bound as the next run's past: that copy is the graph's own.
pub(crate) struct OrtEngine {
    manifest: Manifest,
    entries: Vec<Loaded>,
    device: Device,
    host: MemoryInfo<'static>,
    resizer: Resizer,
}

struct Loaded {
    session: Session,
    /// In the order of the entry's states; none before the first run.
    states: Vec<Kept>,
}

/// A state.
struct Kept {
    value: DynTensor,
    /// Positions in use along its axis; a buffer that is written in place may have more.
    len: usize,
}

impl Kept {
    /// Of the positions in use.
    fn shape(&self, axis: usize) -> Vec<usize> {
        let mut shape = shape_of(&self.value);
        shape[axis] = self.len;
        shape
    }

    /// Positions that its memory has.
    fn room(&self, axis: usize) -> usize {
        self.value.shape()[axis] as usize
    }
}

fn failed(what: &str) -> impl Fn(ort::Error) -> Error {
    let what = what.to_string();
    move |e| Error::Input(format!("{what}: ONNX Runtime: {e}"))
}

impl OrtEngine {
    /// Loads the graphs.
    ///
    /// # Errors
    /// The library is not there or too old, has not the provider, or refuses a graph.
    pub(crate) fn open(artifact: &Artifact, options: &EngineOptions) -> Result<Self> {
        let device = Device::open(artifact, options)?;
        let manifest = artifact.manifest().clone();
        let entries = manifest
            .entries
            .iter()
            .map(|e| {
                let path = artifact.require(&e.file)?;
                let session = device.session(e, &path)?;
                let takes: Vec<&str> = session.inputs().iter().map(|i| i.name()).collect();
                let gives: Vec<&str> = session.outputs().iter().map(|o| o.name()).collect();
                let inputs = e.inputs.iter().map(|p| &p.name).chain(e.states.iter().map(|s| &s.past));
                let outputs = e.outputs.iter().map(|p| &p.name).chain(e.states.iter().map(|s| &s.present));
                let missing =
                    inputs.filter(|n| !takes.contains(&n.as_str())).chain(outputs.filter(|n| !gives.contains(&n.as_str()))).next();
                match missing {
                    Some(name) => Err(Error::file(path, format!("the graph has no input or output '{name}', which the manifest lists"))),
                    None => Ok(Loaded { session, states: vec![] }),
                }
            })
            .collect::<Result<_>>()?;
        let host = MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::Default).map_err(failed("memory"))?;
        Ok(Self { manifest, entries, device, host, resizer: Resizer::new() })
    }
}

fn shape_of(v: &DynTensor) -> Vec<usize> {
    v.shape().iter().map(|d| *d as usize).collect()
}

/// A value that is a tensor.
fn tensor(value: DynValue) -> ort::Result<DynTensor> {
    value.downcast::<DynTensorValueType>()
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
fn empty(dtype: DType, shape: Vec<i64>) -> ort::Result<DynTensor> {
    Ok(match dtype {
        DType::F16 => ort::value::Tensor::<f16>::from_array((shape, vec![]))?.upcast(),
        DType::BF16 => ort::value::Tensor::<bf16>::from_array((shape, vec![]))?.upcast(),
        _ => ort::value::Tensor::<f32>::from_array((shape, vec![]))?.upcast(),
    })
}

fn to_ort(t: &Tensor) -> ort::Result<DynTensor> {
    let shape: Vec<i64> = t.shape().iter().map(|d| *d as i64).collect();
    Ok(match t.data() {
        Data::F32(v) => ort::value::Tensor::from_array((shape, v.clone()))?.upcast(),
        Data::I64(v) => ort::value::Tensor::from_array((shape, v.clone()))?.upcast(),
        Data::Bool(v) => ort::value::Tensor::from_array((shape, v.clone()))?.upcast(),
    })
}

fn from_ort(v: &DynTensor) -> Result<Tensor> {
    let bad = failed("reading an output");
    let shape = shape_of(v);
    match *v.data_type() {
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
        let past = |i: usize| Some(loaded.states.get(i)?.shape(e.states[i].axis));
        let bound = binding::bind(&self.manifest.symbols, e, inputs, past, &mut symbols)?;
        let bad = failed(entry);
        // Positions that this run adds to states that follow the text.
        let new = symbols.get("seq").and_then(|n| usize::try_from(n).ok()).unwrap_or(0);

        let mut run = loaded.session.create_binding().map_err(&bad)?;
        for (port, tensor) in e.inputs.iter().zip(bound) {
            run.bind_input(&port.name, &to_ort(tensor).map_err(&bad)?).map_err(&bad)?;
        }
        for port in &e.outputs {
            run.bind_output_to_device(&port.name, &self.host).map_err(&bad)?;
        }
        for (i, state) in e.states.iter().enumerate() {
            let Some(kept) = loaded.states.get_mut(i) else {
                // The graph allocates what the first run needs.
                let shape = state.shape.iter().map(|d| d.eval(&symbols)).collect::<Result<Vec<i64>, _>>();
                let shape = shape.map_err(|e| Error::Input(format!("{entry}: state '{}': {e}", state.past)))?;
                run.bind_input(&state.past, &empty(state.dtype, shape).map_err(&bad)?).map_err(&bad)?;
                run.bind_output_to_device(&state.present, &self.device.memory).map_err(&bad)?;
                continue;
            };
            while state.in_place && kept.room(state.axis) < kept.len + new {
                kept.value = self.resizer.double(&self.device, &kept.value, state.axis).map_err(&bad)?;
            }
            run.bind_input(&state.past, &kept.value).map_err(&bad)?;
            if state.in_place {
                run.bind_output(&state.present, &mut kept.value).map_err(&bad)?;
            } else {
                run.bind_output_to_device(&state.present, &self.device.memory).map_err(&bad)?;
            }
        }
        // What was copied to a GPU must be there.
        run.synchronize_inputs().map_err(&bad)?;
        let mut results = loaded.session.run_binding(&run).map_err(&bad)?;
        let mut result = |name: &str| {
            let value = results.remove(name).ok_or_else(|| Error::Input(format!("{entry}: ONNX Runtime gave no '{name}'")))?;
            tensor(value).map_err(&bad)
        };
        let outputs = e.outputs.iter().map(|p| from_ort(&result(&p.name)?)).collect::<Result<Vec<_>>>()?;
        // Of a state that was written in place this is the same buffer.
        let kept = |(i, state): (usize, &State)| {
            let value = result(&state.present)?;
            let before = loaded.states.get(i).filter(|_| state.in_place);
            Ok(Kept { len: before.map_or_else(|| shape_of(&value)[state.axis], |b| b.len + new), value })
        };
        let states = e.states.iter().enumerate().map(kept).collect::<Result<_>>()?;
        drop(results);
        loaded.states = states;
        Ok(outputs)
    }

    fn past(&self) -> usize {
        let states = self.manifest.entries.iter().zip(&self.entries).flat_map(|(e, l)| e.states.iter().zip(&l.states));
        states.filter(|(s, _)| s.follows_text()).map(|(_, kept)| kept.len).next().unwrap_or(0)
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
            for (state, kept) in entry.states.iter().zip(&mut loaded.states) {
                if kept.len == len || !state.follows_text() {
                    continue;
                }
                if !state.in_place {
                    kept.value = self.resizer.keep(&self.device, &kept.value, state.axis, len).map_err(failed("shortening a state"))?;
                }
                kept.len = len;
            }
        }
        Ok(())
    }
}
