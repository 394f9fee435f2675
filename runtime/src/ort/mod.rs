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
use vlmc_artifact::{Bindings, DType, MANIFEST, Manifest, State};

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
        let manifest = artifact.manifest().clone();
        let device = Device::open(&manifest, options)?;
        let entries = manifest
            .entries
            .iter()
            .map(|e| {
                let path = artifact.require(&e.file)?;
                if let Some(s) = e.states.iter().find(|s| s.axis >= s.shape.len()) {
                    let why = format!("state '{}' has no axis {}", s.past, s.axis);
                    return Err(Error::file(artifact.dir().join(MANIFEST), why));
                }
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
            if value.shape().len() != state.shape.len() {
                return Err(Error::Input(format!(
                    "{entry}: '{}' has {} axes, not {}",
                    state.present,
                    value.shape().len(),
                    state.shape.len()
                )));
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Provider;
    use ::ort::{
        editor::{Graph, Model, Node, ONNX_DOMAIN, Opset},
        operator::Attribute,
        value::{Outlet, Shape, SymbolicDimensions, ValueType},
    };
    use serde_json::json;

    const OPTIONS: EngineOptions =
        EngineOptions { threads: None, provider: Some(Provider::Cpu), engine_cache: None, large_pages: false, progress: |_| {} };
    /// Of a row of queries, keys and values.
    const WIDTH: usize = 8;

    fn outlet(name: &str, ty: TensorElementType, rank: usize) -> Outlet {
        let (shape, dimension_symbols) = (Shape::new(std::iter::repeat_n(-1, rank)), SymbolicDimensions::empty(rank));
        Outlet::new(name, ValueType::Tensor { ty, shape, dimension_symbols })
    }

    /// A decoder of one head whose keys are also its queries and values: attention over its cache, written in place, or nothing but a
    /// cache, by concatenation.
    fn engine(in_place: bool) -> OrtEngine {
        let f32 = TensorElementType::Float32;
        let mut graph = Graph::new().unwrap();
        let places = ["last", "total"].map(|name| outlet(name, TensorElementType::Int64, usize::from(name == "last")));
        let pasts = ["past.key", "past.value"].map(|name| outlet(name, f32, 4));
        graph.set_inputs(std::iter::once(outlet("x", f32, 3)).chain(places).chain(pasts)).unwrap();
        graph.set_outputs([outlet("y", f32, 3), outlet("present.key", f32, 4), outlet("present.value", f32, 4)]).unwrap();
        let int = |name, v: i64| Attribute::new(name, v).unwrap();
        let mut node = |op, domain, name, inputs: &[&str], outputs: &[&str], attributes: Vec<Attribute>| {
            graph.add_node(Node::new(op, domain, name, inputs, outputs, attributes).unwrap()).unwrap();
        };
        if in_place {
            node("Cast", ONNX_DOMAIN, "cast last", &["last"], &["last32"], vec![int("to", 6)]);
            node("Cast", ONNX_DOMAIN, "cast total", &["total"], &["total32"], vec![int("to", 6)]);
            let inputs = ["x", "x", "x", "past.key", "past.value", "last32", "total32"];
            let outputs = ["y", "present.key", "present.value"];
            node("GroupQueryAttention", "com.microsoft", "attend", &inputs, &outputs, vec![int("num_heads", 1), int("kv_num_heads", 1)]);
        } else {
            node("Identity", ONNX_DOMAIN, "y", &["x"], &["y"], vec![]);
            let axes = || vec![Attribute::new("perm", vec![0i64, 2, 1, 3]).unwrap()];
            node("Unsqueeze", ONNX_DOMAIN, "head", &["x", "two"], &["x4"], vec![]);
            node("Transpose", ONNX_DOMAIN, "order", &["x4"], &["new"], axes());
            for part in ["key", "value"] {
                node("Concat", ONNX_DOMAIN, part, &[&format!("past.{part}"), "new"], &[&format!("present.{part}")], vec![int("axis", 2)]);
            }
            let mut two = ::ort::value::Tensor::<i64>::new(&Default::default(), [1usize]).unwrap();
            two.extract_tensor_mut().1[0] = 2;
            graph.add_initializer("two", two, false).unwrap();
        }
        let state = |part: &str| {
            json!({"past": format!("past.{part}"), "present": format!("present.{part}"), "dtype": "f32",
                   "shape": ["batch", 1, "past", WIDTH], "axis": 2, "in_place": in_place})
        };
        let port = |name: &str, dtype: &str, shape: serde_json::Value| json!({"name": name, "dtype": dtype, "shape": shape});
        let manifest = json!({
            "format": 2, "compiler": "", "target": "onnx-cpu", "architecture": "", "parameters": 0,
            "source": {"config_sha256": "", "weights": {}},
            "symbols": [{"name": "batch", "min": 1, "max": 9}, {"name": "seq", "min": 1, "max": 99}, {"name": "past", "min": 0, "max": 99}],
            "entries": [{
                "name": "decoder", "file": "",
                "inputs": [port("x", "f32", json!(["batch", "seq", WIDTH])), port("last", "i64", json!(["batch"])), port("total", "i64", json!([]))],
                "outputs": [port("y", "f32", json!(["batch", "seq", WIDTH]))],
                "states": [state("key"), state("value")],
            }],
            "task": {"kind": "classify", "labels": []}, "processor": null, "generation": {}, "files": {},
        });
        let manifest: Manifest = serde_json::from_value(manifest).unwrap();
        let device = Device::open(&manifest, &OPTIONS).unwrap();
        let mut model = Model::new([Opset::new(ONNX_DOMAIN, 21).unwrap(), Opset::new("com.microsoft", 1).unwrap()]).unwrap();
        model.set_graph(graph).unwrap();
        let session = model.into_session(&device.builder(None).unwrap()).unwrap();
        let host = MemoryInfo::default();
        OrtEngine { manifest, entries: vec![Loaded { session, states: vec![] }], device, host, resizer: Resizer::new() }
    }

    /// Runs the tokens `from..to` of one sequence; each has other numbers.
    fn run(engine: &mut OrtEngine, from: usize, to: usize) -> Vec<f32> {
        assert_eq!(engine.past(), from);
        let x: Vec<f32> = (from * WIDTH..to * WIDTH).map(|i| (i as f32 * 0.7).sin()).collect();
        let x = Tensor::new([1, to - from, WIDTH], x).unwrap();
        let (last, total) = (Tensor::new([1], vec![to as i64 - 1]).unwrap(), Tensor::new([], vec![to as i64]).unwrap());
        let out = engine.run("decoder", &[("x", &x), ("last", &last), ("total", &total)]).unwrap();
        out[0].f32().unwrap().to_vec()
    }

    fn buffers(engine: &OrtEngine) -> Vec<(usize, usize)> {
        let states = engine.entries[0].states.iter();
        states.map(|s| (s.value.data_ptr() as usize, s.room(2))).collect()
    }

    #[test]
    fn a_state_in_place_is_one_buffer_until_it_doubles() {
        let mut whole = engine(true);
        let expected = run(&mut whole, 0, 33);
        let mut stepped = engine(true);
        run(&mut stepped, 0, 4);
        let mut rooms = vec![];
        for at in 4..33 {
            let before = buffers(&stepped);
            let y = run(&mut stepped, at, at + 1);
            let row = &expected[at * WIDTH..][..WIDTH];
            assert!(y.iter().zip(row).all(|(a, b)| (a - b).abs() < 1e-5), "token {at}: {y:?} instead of {row:?}");
            // Nothing is allocated or copied but when it is full.
            assert_eq!(buffers(&stepped) == before, !at.is_power_of_two(), "token {at}");
            rooms.push(buffers(&stepped)[0].1);
        }
        rooms.dedup();
        assert_eq!(rooms, [8, 16, 32, 64]);
        // Forgetting some takes no other memory either, and what follows is as if they had not been.
        let before = buffers(&stepped);
        stepped.truncate(20).unwrap();
        let y = run(&mut stepped, 20, 33);
        assert!(y.iter().zip(&expected[20 * WIDTH..]).all(|(a, b)| (a - b).abs() < 1e-5));
        assert_eq!(buffers(&stepped), before);
        stepped.truncate(0).unwrap();
        assert!(buffers(&stepped).is_empty() && stepped.past() == 0);
    }

    #[test]
    fn other_states_are_what_the_graph_made() {
        let mut engine = engine(false);
        run(&mut engine, 0, 4);
        run(&mut engine, 4, 9);
        engine.truncate(3).unwrap();
        assert_eq!((engine.past(), buffers(&engine)[0].1), (3, 3), "shortened");
        run(&mut engine, 3, 7);
        let kept = engine.entries[0].states[1].value.try_extract_tensor::<f32>().unwrap().1.to_vec();
        let expected: Vec<f32> = (0..7 * WIDTH).map(|i| (i as f32 * 0.7).sin()).collect();
        assert_eq!(kept, expected);
        assert!(engine.truncate(8).unwrap_err().to_string().contains("cannot keep 8 positions of 7"));
    }
}
