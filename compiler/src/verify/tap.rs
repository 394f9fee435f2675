//! ONNX artifacts that give out what nodes with weights compute: each graph gets the operands and results of these nodes as further
//! outputs, in a temporary artifact that shares the weight file with the one it was made of.

use crate::{Error, Result, back::onnx, digest};
use prost::Message;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};
use tempfile::TempDir;
use vlmc_runtime::{
    Artifact, Engine, EngineOptions, Observed, Observer, Tensor,
    artifact::{DType, FileEntry, MANIFEST, Manifest, Port},
    open_engine,
};

/// A node with weights.
struct Tap {
    /// Names in the weight file.
    weights: Vec<String>,
    operands: Vec<String>,
    result: String,
    /// Heads that lie side by side in operands of three axes and in the result, where the reference has them apart.
    heads: Option<usize>,
}

/// An engine of such an artifact, which looks like that of the original.
pub(super) struct Tapped {
    engine: Box<dyn Engine>,
    manifest: Manifest,
    taps: BTreeMap<String, Vec<Tap>>,
    observer: Observer,
    _dir: TempDir,
}

impl Tapped {
    /// Of an `onnx-*` artifact.
    ///
    /// # Errors
    /// A graph cannot be read, the temporary files cannot be written, or no engine runs it.
    pub(super) fn open(artifact: &Artifact, options: &EngineOptions, observer: Observer) -> Result<Self> {
        let manifest = artifact.manifest().clone();
        let dir = near(artifact.dir())?;
        let mut tapped = manifest.clone();
        let mut taps = BTreeMap::new();
        for entry in &mut tapped.entries {
            let mut model = onnx::read(&artifact.require(&entry.file)?)?;
            let graph = model.graph.as_mut().ok_or_else(|| Error::file(artifact.dir().join(&entry.file), "has no graph"))?;
            let found = find(graph);
            let inputs: BTreeSet<String> = graph.input.iter().filter_map(|i| i.name.clone()).collect();
            let mut outputs: BTreeSet<String> = graph.output.iter().filter_map(|o| o.name.clone()).collect();
            for name in found.iter().flat_map(|t| t.operands.iter().chain([&t.result])) {
                if !inputs.contains(name) && outputs.insert(name.clone()) {
                    // The type is the engine's to find out.
                    graph.output.push(onnx::proto::ValueInfoProto { name: Some(name.clone()), ..Default::default() });
                    entry.outputs.push(Port { name: name.clone(), dtype: DType::F32, shape: vec![] });
                }
            }
            let bytes = model.encode_to_vec();
            let path = dir.path().join(&entry.file);
            fs::write(&path, &bytes).map_err(Error::io(&path))?;
            tapped
                .files
                .insert(entry.file.clone(), FileEntry { bytes: bytes.len() as u64, sha256: digest::sha256(&bytes), header_sha256: None });
            taps.insert(entry.name.clone(), found);
        }
        for name in tapped.files.keys().filter(|n| !tapped.entries.iter().any(|e| e.file == **n)) {
            share(&artifact.require(name)?, &dir.path().join(name))?;
        }
        let path = dir.path().join(MANIFEST);
        let json = serde_json::to_vec(&tapped).map_err(|e| Error::Backend(e.to_string()))?;
        fs::write(&path, json).map_err(Error::io(&path))?;
        let engine = open_engine(&Artifact::open(dir.path())?, options)?;
        Ok(Self { engine, manifest, taps, observer, _dir: dir })
    }
}

/// A directory beside the artifact, so that files can be in both; where none can be made, among the temporary ones.
fn near(artifact: &Path) -> Result<TempDir> {
    let beside = artifact.canonicalize().ok().and_then(|a| tempfile::Builder::new().prefix(".vlmc-verify-").tempdir_in(a.parent()?).ok());
    beside.map_or_else(tempfile::tempdir, Ok).map_err(Error::io(std::env::temp_dir()))
}

/// The same file under another name.
fn share(from: &Path, to: &Path) -> Result<()> {
    let from = from.canonicalize().map_err(Error::io(from))?;
    fs::hard_link(&from, to).or_else(|_| std::os::unix::fs::symlink(&from, to)).map_err(Error::io(to))
}

/// The nodes that read weights, or what was computed from weights alone, together with other values.
fn find(graph: &onnx::proto::GraphProto) -> Vec<Tap> {
    // What is a constant, and of which weights it is made.
    let mut constants: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for tensor in &graph.initializer {
        let name = tensor.name();
        constants.insert(name, if tensor.external_data.is_empty() { vec![] } else { vec![name.into()] });
    }
    let mut taps: Vec<Tap> = vec![];
    for node in &graph.node {
        // Shapes and bounds are attributes elsewhere; an operand that is left out has no name.
        let data = if matches!(node.op_type(), "Reshape" | "Expand" | "Slice") { 1 } else { node.input.len() };
        let inputs: Vec<&str> = node.input.iter().take(data).map(String::as_str).filter(|n| !n.is_empty()).collect();
        let weights: Vec<String> = inputs.iter().filter_map(|n| constants.get(n)).flatten().cloned().collect();
        let operands: Vec<String> = match node.op_type() {
            // What is normed is the sum, the last result.
            "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" => node.output.last().cloned().into_iter().collect(),
            _ => inputs.iter().filter(|n| !constants.contains_key(*n)).map(|n| (*n).to_string()).collect(),
        };
        if operands.is_empty() && !inputs.is_empty() {
            node.output.iter().for_each(|o| drop(constants.insert(o, weights.clone())));
            continue;
        }
        let Some(result) = node.output.iter().find(|o| !o.is_empty()).filter(|_| !weights.is_empty()) else { continue };
        let heads = node.attribute.iter().find(|a| node.op_type() == "MultiHeadAttention" && a.name() == "num_heads");
        let heads = heads.and_then(|a| usize::try_from(a.i()).ok());
        let mut tap = Tap { weights, operands, result: result.clone(), heads };
        // A linear layer with a bias is two nodes here.
        let product = taps.iter().position(|t| node.op_type() == "Add" && tap.operands == [t.result.clone()]);
        if let Some(product) = product.filter(|p| taps[*p].result.starts_with(&format!("{result}/"))) {
            let product = taps.remove(product);
            tap = Tap { weights: [product.weights, tap.weights].concat(), operands: product.operands, ..tap };
        }
        taps.push(tap);
    }
    taps
}

/// `f32[batch, s, heads * d]` as `[batch, heads, s, d]`; `None` for other tensors.
fn apart(t: &Tensor, heads: usize) -> Option<Tensor> {
    let [batch, s, width] = t.shape()[..] else { return None };
    let (x, d) = (t.f32().ok()?, width.checked_div(heads)?);
    let rows = (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..s).map(move |i| ((b * s + i) * heads + h) * d)));
    let split: Vec<f32> = rows.flat_map(|from| &x[from..from + d]).copied().collect();
    Tensor::new([batch, heads, s, d], split).ok()
}

impl Engine for Tapped {
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn run(&mut self, entry: &str, inputs: &[(&str, &Tensor)]) -> vlmc_runtime::Result<Vec<Tensor>> {
        let outputs = self.engine.run(entry, inputs)?;
        let ports = self.engine.manifest().entries.iter().find(|e| e.name == entry).map(|e| &e.outputs[..]).unwrap_or_default();
        let value = |name: &String| {
            let input = inputs.iter().find(|(n, _)| n == name).map(|(_, t)| (*t).clone());
            input.or_else(|| Some(outputs[ports.iter().position(|p| p.name == *name)?].clone()))
        };
        for tap in self.taps.get(entry).into_iter().flatten() {
            let value = |name| value(name).map(|t| tap.heads.and_then(|heads| apart(&t, heads)).unwrap_or(t));
            let operands = tap.operands.iter().map(value).collect::<Option<Vec<_>>>();
            let (Some(operands), Some(result)) = (operands, value(&tap.result)) else { continue };
            (self.observer)(Observed { entry: entry.into(), weights: tap.weights.clone(), operands, result, act: None })?;
        }
        let own = self.manifest.entries.iter().find(|e| e.name == entry).map_or(0, |e| e.outputs.len());
        Ok(outputs.into_iter().take(own).collect())
    }

    fn past(&self) -> usize {
        self.engine.past()
    }

    fn truncate(&mut self, len: usize) -> vlmc_runtime::Result<()> {
        self.engine.truncate(len)
    }
}
