//! `vlmc verify`: an artifact beside the reference interpretation of its checkpoint.
//!
//! The artifact runs first; what its nodes with weights take and give goes to a temporary file. Then the frontend's program is
//! interpreted in `f32`, with weights straight from the checkpoint, and each of its nodes with weights is compared twice: its result
//! with the artifact's (`propagated`: all errors so far), and its result *for the artifact's own operands* with the artifact's
//! (`local`: the error of this node alone). The second is what says where something is wrong.
//!
//! Calibration may have moved factors of columns from a norm into the layers that read it: where the layers say so, neither is wrong.
//!
//! Nodes are the same if they have the same weights, by name; of several nodes with the same weights, the first is the first.

mod html;
mod measure;
mod plot;
mod reference;
mod spool;
mod tap;

pub use html::html;
pub use measure::Errors;

use crate::{
    Error, Result,
    checkpoint::known_dtype,
    compile::{COMPILER, Model, WEIGHTS},
    digest,
    safetensors_header::Header,
};
pub(crate) use measure::kl;
pub(crate) use reference::array;
use reference::{Reference, Step};
use serde::Serialize;
use spool::{Kept, Spool};
use std::{
    borrow::Cow,
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    fs::File,
    ops::Range,
    path::PathBuf,
    rc::Rc,
};
use tap::Tapped;
use vlmc_artifact::{
    Scheme,
    program::{Program, Unary},
    quant::{Codes, Method},
};
use vlmc_ir::{
    DType, Def, Graph, Op, Type, ValueId,
    interp::{self, Array},
    ops::Elementwise1,
    weights::WeightDef,
};
use vlmc_runtime::{
    Artifact, CpuEngine, Data, Engine, EngineOptions, Observed, Observer, Pipeline, Scored, Tensor, Tensors,
    artifact::{Certificate, PROGRAM, is_weights},
    forward,
};

/// What to compare on, and how.
pub struct Options<'a> {
    /// How the artifact runs.
    pub engine: EngineOptions,
    /// Tokens to generate greedily by both, for models that answer prompts.
    pub new_tokens: usize,
    /// Called with what is being done.
    pub progress: &'a dyn Fn(&str),
}

/// Tensors of a request, named as in the Hugging Face forward signature.
#[derive(Clone, Debug)]
pub struct Request {
    /// Where it comes from.
    pub name: String,
    /// What the model is run on.
    pub tensors: Tensors,
}

/// A node with weights, in the artifact and in the reference.
#[derive(Clone, Debug, Serialize)]
pub struct Node {
    /// Entry of the artifact.
    pub entry: String,
    /// Where in the model it stands.
    pub scope: String,
    /// Name of the op.
    pub op: String,
    /// Its weights.
    pub weights: Vec<String>,
    /// Its own error; `None` if the artifact computes it together with others.
    pub local: Option<Errors>,
    /// Its error with all before it.
    pub propagated: Option<Errors>,
    /// Relative local error that the storage of its weights explains.
    pub tolerance: f64,
}

impl Node {
    /// Whether it does something else than the reference.
    pub fn is_wrong(&self) -> bool {
        self.local.is_some_and(|e| e.relative > self.tolerance)
    }

    /// The layer it belongs to: its scope up to the first number.
    pub fn layer(&self) -> String {
        let parts: Vec<&str> = self.scope.split('.').collect();
        let end = parts.iter().position(|p| p.parse::<usize>().is_ok()).map_or(parts.len(), |i| i + 1);
        let layer = parts[..end].join(".");
        if layer.is_empty() { self.entry.clone() } else { layer }
    }
}

/// Logits of a request, position by position.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Logits {
    /// Divergence from the reference's probabilities, in nats.
    pub kl: Vec<f64>,
    /// Share of positions whose most probable token is the reference's.
    pub top1: f64,
    /// Of as many greedy tokens as were generated, how many are the reference's, up to the first other one.
    pub greedy: Option<[usize; 2]>,
}

/// A request that both have run.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// Name of the request.
    pub name: String,
    /// SHA-256 (hex) of its tensors.
    pub sha256: String,
    /// Errors of the model's outputs, by name.
    pub outputs: BTreeMap<String, Errors>,
    /// Of models that give any.
    pub logits: Option<Logits>,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Target of the artifact.
    pub target: String,
    /// `model_type`.
    pub architecture: String,
    /// Nodes with weights, in the order of the reference; errors are the worst of all requests.
    pub nodes: Vec<Node>,
    /// The requests.
    pub requests: Vec<Compared>,
    /// Largest relative error of an output that the storage of the weights explains; absent if they are quantized.
    pub output_tolerance: Option<f64>,
    /// Values of the symbols in each entry, in the first request.
    pub symbols: BTreeMap<String, BTreeMap<String, i64>>,
}

/// Relative error of a node whose weights are stored exactly: the rounding of sums in another order.
const EXACT: f64 = 1e-4;
/// As [`EXACT`], of the outputs of a whole model.
const EXACT_OUTPUT: f64 = 2e-3;
/// Roundings of a node that computes in a narrow float: of its weights, its product, what is added to that, its result.
const ROUNDINGS: f64 = 4.0;
/// As [`ROUNDINGS`], of the outputs of a whole model, where those of all nodes come together.
const OUTPUT_ROUNDINGS: f64 = 40.0;

/// The node that takes most of its tolerance, or else the first.
pub fn worst<'n>(nodes: &[&'n Node]) -> &'n Node {
    nodes[1..].iter().fold(nodes[0], |worst, n| if n.excess() > worst.excess() { n } else { worst })
}

impl Report {
    /// The nodes of each layer, in order; never none.
    pub fn layers(&self) -> Vec<(String, Vec<&Node>)> {
        let mut layers: Vec<(String, Vec<&Node>)> = vec![];
        for node in &self.nodes {
            let layer = node.layer();
            match layers.iter_mut().find(|(name, _)| *name == layer) {
                Some((_, nodes)) => nodes.push(node),
                None => layers.push((layer, vec![node])),
            }
        }
        layers
    }

    /// The first node that is wrong.
    pub fn first_wrong(&self) -> Option<&Node> {
        self.nodes.iter().find(|n| n.is_wrong())
    }

    /// The output that is wrong, with its request, though no node may be.
    pub fn wrong_output(&self) -> Option<(&Compared, &str)> {
        let tolerance = self.output_tolerance?;
        self.requests.iter().find_map(|r| Some((r, r.outputs.iter().find(|(_, e)| e.relative > tolerance)?.0.as_str())))
    }

    /// Whether the artifact does what its checkpoint says.
    pub fn is_right(&self) -> bool {
        self.first_wrong().is_none() && self.wrong_output().is_none()
    }

    /// What goes into the manifest.
    pub fn certificate(&self) -> Certificate {
        let logits = || self.requests.iter().filter_map(|r| r.logits.as_ref());
        let worst = self.nodes.iter().filter(|n| n.local.is_some());
        let worst = worst.max_by(|a, b| a.excess().total_cmp(&b.excess()));
        let all: Vec<f64> = logits().flat_map(|l| &l.kl).copied().collect();
        let mean = |v: &mut dyn Iterator<Item = f64>, n: usize| rounded(v.sum::<f64>() / n.max(1) as f64);
        Certificate {
            compiler: COMPILER.into(),
            requests: self.requests.iter().map(|r| r.sha256.clone()).collect(),
            nodes: self.nodes.iter().filter(|n| n.local.is_some()).count(),
            nodes_not_compared: self.nodes.iter().filter(|n| n.local.is_none()).count(),
            worst_scope: worst.map(|n| n.scope.clone()),
            worst_weights: worst.map(|n| n.weights.clone()).unwrap_or_default(),
            worst_relative_error: worst.and_then(|n| n.local).map(|e| rounded(e.relative)),
            logit_kl_mean: (!all.is_empty()).then(|| mean(&mut all.iter().copied(), all.len())),
            logit_kl_max: all.iter().copied().reduce(f64::max).map(rounded),
            top1_agreement: logits().next().map(|_| mean(&mut logits().map(|l| l.top1), logits().count())),
            output_relative_error: self.requests.iter().flat_map(|r| r.outputs.values()).map(|e| e.relative).reduce(f64::max).map(rounded),
            right: self.is_right(),
        }
    }
}

impl Node {
    /// How much of its tolerance it takes.
    fn excess(&self) -> f64 {
        self.local.map_or(0.0, |e| e.relative / self.tolerance)
    }
}

/// Three digits: what a reader wants, and what other sums in another order leave alone. JSON knows no infinity.
fn rounded(v: f64) -> f64 {
    format!("{:.2e}", v.min(f64::MAX)).parse().unwrap_or(v)
}

/// Compares an artifact with the checkpoint of `model` on `requests`.
///
/// # Errors
/// The artifact is of another checkpoint, a request does not fit the model, or something cannot be read or run.
pub fn verify(artifact: &Artifact, model: Model, requests: &[Request], options: &Options<'_>) -> Result<Report> {
    artifact.check_layout()?;
    let manifest = artifact.manifest().clone();
    if manifest.source != model.checkpoint().source() {
        let message = "is not what the artifact was compiled from: the digests in its manifest are of other files";
        return Err(Error::file(model.checkpoint().dir(), message));
    }
    let (program, weights) = reference::program(&model, &manifest)?;
    let (model, program, weights) = (Rc::new(model), Rc::new(program), Rc::new(weights));
    let constants = program.graphs.iter().map(|g| (g.name.clone(), Constants::of(g))).collect();
    let state = Rc::new(RefCell::new(State {
        stored: Stored::open(artifact, weights.clone())?,
        spool: Spool::new()?,
        records: HashMap::new(),
        constants,
        uses: HashMap::new(),
        nodes: vec![],
        index: HashMap::new(),
        symbols: BTreeMap::new(),
        scaled: HashMap::new(),
        active: false,
    }));

    let recorder: Observer = {
        let state = state.clone();
        Box::new(move |observed| state.borrow_mut().record(observed).map_err(|e| vlmc_runtime::Error::Input(e.to_string())))
    };
    let engine: Box<dyn Engine> = if manifest.target == "cpu" {
        let mut engine = CpuEngine::open(artifact, &options.engine)?;
        engine.observe(recorder);
        Box::new(engine)
    } else {
        Box::new(Tapped::open(artifact, &options.engine, recorder)?)
    };
    let watcher = {
        let state = state.clone();
        Box::new(move |step: &Step<'_>| state.borrow_mut().compare(step).map_err(|e| e.to_string()))
    };
    let reference = Reference::new(manifest.clone(), model, program, weights.clone(), watcher);
    let (mut engine, mut reference) = (Runner::new(engine)?, Runner::new(Box::new(reference))?);

    let mut compared = vec![];
    for request in requests {
        state.borrow_mut().begin()?;
        (options.progress)(&format!("{}: {}", request.name, manifest.target));
        let got = engine.run(request, options.new_tokens, &state)?;
        (options.progress)(&format!("{}: reference", request.name));
        let expected = reference.run(request, options.new_tokens, &state)?;
        compared.push(compare_outputs(request, &got, &expected)?);
    }
    drop((engine, reference));
    let mut state = state.borrow_mut();
    let rounding = state.stored.rounding;
    let exact = state.nodes.iter().all(|n| n.tolerance <= EXACT + ROUNDINGS * rounding);
    Ok(Report {
        target: manifest.target,
        architecture: manifest.architecture,
        nodes: std::mem::take(&mut state.nodes),
        requests: compared,
        output_tolerance: exact.then_some(EXACT_OUTPUT + OUTPUT_ROUNDINGS * rounding),
        symbols: std::mem::take(&mut state.symbols),
    })
}

/// Runs requests on an engine, whatever its model is for.
enum Runner {
    Prompts(Box<Pipeline>),
    Others(Box<dyn Engine>),
}

impl Runner {
    fn new(engine: Box<dyn Engine>) -> Result<Self> {
        Ok(if engine.manifest().task.prompt().is_some() { Self::Prompts(Box::new(Pipeline::new(engine)?)) } else { Self::Others(engine) })
    }

    /// All that the model gives; its nodes are told of, but for those of single tokens.
    fn run(&mut self, request: &Request, new_tokens: usize, state: &RefCell<State>) -> Result<Tensors> {
        let Request { name, tensors } = request;
        let failed = |e: vlmc_runtime::Error| Error::Request { name: name.clone(), message: e.to_string() };
        state.borrow_mut().active = true;
        match self {
            Self::Others(engine) => forward(&mut **engine, tensors).map_err(failed),
            Self::Prompts(pipeline) => {
                pipeline.clear()?;
                let features = pipeline.features(tensors).map_err(failed)?;
                let logits = pipeline.prefill(tensors, &features, Scored::All).map_err(failed)?;
                state.borrow_mut().active = false;
                let mut out: Tensors = features.image.into_iter().flatten().collect();
                if new_tokens > 0 {
                    out.insert("generated_ids".into(), pipeline.continue_greedily(&logits, new_tokens).map_err(failed)?);
                }
                out.insert("logits".into(), logits);
                Ok(out)
            }
        }
    }
}

fn compare_outputs(request: &Request, got: &Tensors, expected: &Tensors) -> Result<Compared> {
    let (mut outputs, mut logits) = (BTreeMap::new(), None);
    for (name, reference) in expected {
        let Data::F32(r) = reference.data() else { continue };
        let g = got.get(name).map(Tensor::f32).transpose()?.unwrap_or_default();
        if g.len() != r.len() {
            let message = format!("the artifact gives {} numbers as '{name}', the reference {}", g.len(), r.len());
            return Err(Error::Request { name: request.name.clone(), message });
        }
        outputs.insert(name.clone(), Errors::of(g, r));
        let width = reference.shape().last().copied().unwrap_or(1);
        if name.starts_with("logits") && width > 1 {
            let rows = || g.chunks_exact(width).zip(r.chunks_exact(width));
            let same = rows().filter(|(g, r)| top(g) == top(r)).count();
            let ids = |t: &Tensors| t.get("generated_ids").map(|t| t.i64().map(<[i64]>::to_vec)).transpose();
            let greedy = ids(got)?.zip(ids(expected)?).map(|(g, r)| [g.iter().zip(&r).take_while(|(g, r)| g == r).count(), r.len()]);
            let kl = rows().map(|(g, r)| kl(g, r)).collect();
            logits = Some(Logits { kl, top1: same as f64 / rows().count().max(1) as f64, greedy });
        }
    }
    Ok(Compared { name: request.name.clone(), sha256: sha256(&request.tensors), outputs, logits })
}

/// Index of the largest number.
fn top(row: &[f32]) -> usize {
    row.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, v)| if *v > best.1 { (i, *v) } else { best }).0
}

fn sha256(tensors: &Tensors) -> String {
    let mut bytes = vec![];
    for (name, t) in tensors {
        bytes.extend(format!("{name} {} {:?}\n", t.dtype(), t.shape()).bytes());
        match t.data() {
            Data::F32(v) => bytes.extend(v.iter().flat_map(|v| v.to_le_bytes())),
            Data::I64(v) => bytes.extend(v.iter().flat_map(|v| v.to_le_bytes())),
            Data::Bool(v) => bytes.extend(v.iter().map(|v| u8::from(*v))),
        }
    }
    digest::sha256(&bytes)
}

/// Which values of a graph are known without a request, and the weights that they are made of.
struct Constants {
    /// By value.
    weights: Vec<Option<Vec<String>>>,
    /// How many nodes have the same weights.
    uses: HashMap<Vec<String>, usize>,
}

impl Constants {
    fn of(graph: &Graph) -> Self {
        let mut this = Self { weights: vec![None; graph.values().len()], uses: HashMap::new() };
        for (v, _, def) in graph.values() {
            this.weights[v.index()] = match def {
                Def::Weight(name) => Some(vec![name.clone()]),
                Def::Literal(_) => Some(vec![]),
                _ => None,
            };
        }
        for (_, node) in graph.nodes() {
            let (weights, others) = this.split(node);
            if weights.is_empty() {
                continue;
            }
            if others.is_empty() {
                node.outs.iter().for_each(|o| this.weights[o.index()] = Some(weights.clone()));
            } else {
                *this.uses.entry(weights).or_default() += 1;
            }
        }
        this
    }

    /// The weights among a node's operands, and the operands that a request decides.
    fn split(&self, node: &vlmc_ir::Node) -> (Vec<String>, Vec<usize>) {
        let (mut weights, mut others) = (vec![], vec![]);
        for (i, a) in node.args.iter().enumerate() {
            match &self.weights[a.index()] {
                Some(names) => weights.extend_from_slice(names),
                None => others.push(i),
            }
        }
        (weights, others)
    }
}

/// The artifact's weight file: what its tensors are called in the program, and how they are stored.
struct Stored {
    path: PathBuf,
    file: File,
    tensors: HashMap<String, crate::stored::Stored>,
    dtypes: HashMap<String, DType>,
    weights: Rc<BTreeMap<String, WeightDef>>,
    /// What a backend adds to the name of a weight in a layout of its own.
    suffixes: &'static [&'static str],
    /// Relative error of rounding to the float that graphs compute in, 0 for f32.
    rounding: f64,
}

impl Stored {
    fn open(artifact: &Artifact, weights: Rc<BTreeMap<String, WeightDef>>) -> Result<Self> {
        let path = artifact.require(WEIGHTS)?;
        let file = File::open(&path).map_err(Error::io(&path))?;
        let header = Header::read(&path, &file)?;
        let mut dtypes: HashMap<String, DType> =
            header.tensors.iter().filter_map(|(name, t)| Some((name.clone(), known_dtype(t.dtype)?))).collect();
        if artifact.path(PROGRAM).is_some() {
            // Here quantized tensors are bytes; the program knows more.
            let json = artifact.require(PROGRAM)?;
            let bytes = std::fs::read(&json).map_err(Error::io(&json))?;
            let program: Program = serde_json::from_slice(&bytes).map_err(|e| Error::file(&json, e.to_string()))?;
            dtypes.extend(program.weights.into_iter().map(|w| (w.name, w.dtype)));
            let tensors = header.tensors.into_iter().collect();
            return Ok(Self { path, file, tensors, dtypes, weights, suffixes: &[".rows"], rounding: 0.0 });
        }
        // Codes of blocks: [.., rows, blocks, bytes of a block]; signed ones: [rows, bytes], with scales of rows or of their groups.
        let tensors: HashMap<String, crate::stored::Stored> = header.tensors.into_iter().collect();
        for (name, t) in &tensors {
            let weight = name.strip_suffix(".codes").and_then(|n| Some((n, weights.get(n)?.shape.last()?)));
            if let (Some((weight, k)), [_, bytes]) = (weight, &t.shape[..]) {
                let groups = tensors.get(&format!("{weight}.scales")).and_then(|scales| scales.shape.get(1));
                let group = groups.and_then(|groups| k.checked_div(*groups)).and_then(|group| u16::try_from(group).ok());
                let scheme = Scheme { bits: if bytes < k { 4 } else { 8 }, group, zero_points: false };
                dtypes.insert(name.clone(), DType::Quant(scheme));
            }
            if let (Some((weight, k)), [_, .., blocks, bytes]) = (weight, &t.shape[..])
                && t.shape.len() > 2
            {
                let bits = if blocks * bytes * 8 >= k * 8 { 8 } else { 4 };
                let block = (bytes * 8).checked_div(bits).and_then(|b| u16::try_from(b).ok());
                let scheme =
                    DType::Quant(Scheme { bits: bits as u8, group: block, zero_points: dtypes.contains_key(&format!("{weight}.zeros")) });
                dtypes.extend([".codes", ".rows"].map(|part| (format!("{weight}{part}"), scheme)));
            }
        }
        // The checkpoint's own files, where the graphs read these.
        for name in artifact.manifest().files.keys().filter(|n| is_weights(n) && *n != WEIGHTS) {
            let path = artifact.require(name)?;
            let header = Header::read(&path, &File::open(&path).map_err(Error::io(&path))?)?;
            dtypes.extend(header.tensors.iter().filter_map(|(name, t)| Some((name.clone(), known_dtype(t.dtype)?))));
        }
        // Graphs compute in the type of their weights.
        let rounding = dtypes.values().map(|d| rounding(*d)).fold(0.0, f64::max);
        Ok(Self { path, file, tensors, dtypes, weights, suffixes: &[".T", ".codes", ".rows"], rounding })
    }

    /// A vector of floats as the artifact has it; `None` if it has none of that name.
    fn vector(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(t) = self.tensors.get(name).filter(|t| known_dtype(t.dtype) == Some(DType::F32) && t.shape.len() == 1) else {
            return Ok(None);
        };
        let mut bytes = vec![];
        t.read_rows(&self.file, 0..t.shape[0], &mut bytes).map_err(Error::io(&self.path))?;
        Ok(Some(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()))
    }

    /// The frontend's weights in a tensor: one, or several whose rows were put together (`a+b`), or none that it knows.
    fn parts(&self, stored: &str) -> Vec<String> {
        let stripped = self.suffixes.iter().filter_map(|s| stored.strip_suffix(s));
        for name in stripped.chain([stored]) {
            if self.weights.contains_key(name) {
                return vec![name.into()];
            }
            let parts: Vec<&str> = name.split('+').collect();
            if parts.iter().all(|p| self.weights.contains_key(*p)) {
                return parts.into_iter().map(String::from).collect();
            }
        }
        vec![]
    }

    /// How the weights of a node are stored: in the least exact of its tensors.
    fn storage(&self, stored: &[String]) -> Storage {
        let of = |name: &String| {
            let parts = self.parts(name);
            let from = parts.first().and_then(|p| self.weights.get(p)).map_or(DType::F32, |w| w.dtype);
            match self.dtypes.get(name) {
                Some(DType::Quant(_)) if from.scheme().is_some() => Storage::Kept,
                Some(DType::Quant(scheme)) => Storage::Quantized(*scheme),
                Some(dtype @ (DType::F16 | DType::BF16)) if self.rounding > 0.0 => Storage::Computed(rounding(*dtype)),
                Some(DType::BF16) if from != DType::BF16 => Storage::Narrowed(4e-3),
                Some(DType::F16) if from != DType::F16 && from != DType::BF16 => Storage::Narrowed(5e-4),
                _ => Storage::Exact,
            }
        };
        stored.iter().map(of).fold(Storage::Exact, |a, b| if b > a { b } else { a })
    }
}

/// What the artifact did, and what was found so far.
struct State {
    stored: Stored,
    spool: Spool,
    /// By entry and weights.
    records: HashMap<(String, Vec<String>), Vec<Record>>,
    constants: HashMap<String, Constants>,
    /// Nodes of the reference so far, by entry and weights.
    uses: HashMap<(String, Vec<String>), usize>,
    nodes: Vec<Node>,
    /// Places in `nodes`, by entry, weights and use.
    index: HashMap<(String, Vec<String>, usize), usize>,
    symbols: BTreeMap<String, BTreeMap<String, i64>>,
    /// Norms with other weights than the checkpoint's, by entry and result.
    scaled: HashMap<(String, ValueId), Scaled>,
    /// Whether what is computed now is to be compared.
    active: bool,
}

/// A norm whose result has factors by column, for the layers that read it to undo.
struct Scaled {
    /// Its place among the nodes.
    node: usize,
    factors: Vec<f32>,
    /// Its error.
    plain: Errors,
    /// Its error but for the factors.
    errors: Errors,
    /// How far the layers that read it go to undo them, and how far they should, as [`way`] tells.
    way: [f64; 2],
}

/// A node as the artifact computed it.
struct Record {
    operands: Vec<Kept>,
    result: Kept,
    /// Function that was applied to the result.
    act: Option<Unary>,
    /// Its part of the result's last axis.
    columns: Range<usize>,
    storage: Storage,
}

/// How exactly a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Storage {
    /// As in the checkpoint, or wider.
    Exact,
    /// In a narrower float type, of that relative step.
    Narrowed(f64),
    /// In a narrow float that its node computes in, which rounds to that relative error.
    Computed(f64),
    /// As the codes that the checkpoint has.
    Kept,
    /// As codes.
    Quantized(Scheme),
}

/// Relative error of rounding to a float, 0 for f32.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => 0.0,
    }
}

/// Relative error of rounding what a layer reads to 8 bits, as layers of quantized weights may do.
const DYNAMIC: f64 = 0.02;

impl Storage {
    /// Relative error of a node that it explains. Of codes that the compiler found it is twice the error that rounding to nearest
    /// makes in these very weights, since activations do not lie evenly.
    fn tolerance(self, step: &Step<'_>) -> f64 {
        match self {
            Self::Exact => EXACT,
            Self::Narrowed(step) => EXACT + 2.0 * step,
            Self::Computed(rounding) => EXACT + ROUNDINGS * rounding,
            Self::Kept => EXACT + DYNAMIC,
            Self::Quantized(scheme) => {
                let error = |w: &Array| {
                    let (k, data) = (w.shape().last().copied().unwrap_or(1), w.f32().ok()?.iter().copied().collect::<Vec<_>>());
                    let rounded = Codes::of(&data, k, scheme, Method::Round).dequantize(k, scheme);
                    Some(Errors::of(&rounded, &data).relative).filter(|e| e.is_finite())
                };
                let matrices = step.node.args.iter().filter_map(|v| match step.graph.def(*v) {
                    Def::Weight(name) => step.weights.get(name).filter(|w| w.shape().len() > 1),
                    _ => None,
                });
                EXACT + DYNAMIC + 2.0 * matrices.filter_map(|w| error(w)).fold(0.0, f64::max)
            }
        }
    }
}

impl State {
    /// Forgets what the artifact did for the last request.
    fn begin(&mut self) -> Result<()> {
        self.spool = Spool::new()?;
        self.records.clear();
        self.uses.clear();
        self.scaled.clear();
        Ok(())
    }

    fn record(&mut self, observed: Observed) -> std::io::Result<()> {
        if !self.active {
            return Ok(());
        }
        let Observed { entry, weights, operands, result, act } = observed;
        let parts: Vec<Vec<String>> = weights.iter().map(|w| self.stored.parts(w)).filter(|p| !p.is_empty()).collect();
        let Some(count) = parts.first().map(Vec::len).filter(|n| parts.iter().all(|p| p.len() == *n)) else { return Ok(()) };
        let width = result.shape().last().copied().unwrap_or(1);
        // Rows of the weights that were put together are columns of the result.
        let rows = |part: &String| self.stored.weights.get(part).and_then(|w| w.shape.first()).copied().unwrap_or(0);
        let widths: Vec<usize> = if count == 1 { vec![width] } else { parts[0].iter().map(rows).collect() };
        if widths.iter().sum::<usize>() != width {
            return Ok(());
        }
        let storage = self.stored.storage(&weights);
        let operands = operands.iter().map(|t| self.spool.put(t)).collect::<std::io::Result<Vec<_>>>()?;
        let result = self.spool.put(&result)?;
        let mut start = 0;
        for (i, width) in widths.into_iter().enumerate() {
            let key = (entry.clone(), parts.iter().map(|p| p[i].clone()).collect());
            let columns = start..start + width;
            start += width;
            self.records.entry(key).or_default().push(Record { operands: operands.clone(), result: result.clone(), act, columns, storage });
        }
        Ok(())
    }

    /// Compares a node of the reference with the artifact's.
    fn compare(&mut self, step: &Step<'_>) -> Result<()> {
        if !self.active {
            return Ok(());
        }
        let entry = step.graph.name.clone();
        self.symbols.entry(entry.clone()).or_insert_with(|| step.symbols.iter().map(|(name, v)| (name.to_string(), v)).collect());
        let constants = &self.constants[&entry];
        let (weights, others) = constants.split(step.node);
        if weights.is_empty() || others.is_empty() {
            return Ok(());
        }
        let expected = constants.uses.get(&weights).copied().unwrap_or(0);
        let key = (entry.clone(), weights.clone());
        let number = self.uses.entry(key.clone()).or_default();
        let this = *number;
        *number += 1;
        // With fewer or more nodes of these weights than here, which is which cannot be told.
        let records = self.records.get(&key).filter(|r| expected > 0 && r.len().is_multiple_of(expected));
        let record = records.and_then(|r| r.get(this));

        let index = *self.index.entry((key.0, key.1, this)).or_insert_with(|| {
            self.nodes.push(Node {
                entry,
                scope: step.node.scope.clone(),
                op: step.node.op.name(),
                weights,
                local: None,
                propagated: None,
                tolerance: EXACT,
            });
            self.nodes.len() - 1
        });
        let Some(record) = record else { return Ok(()) };
        let got = columns(&self.spool.get(&record.result)?, &record.columns)?;
        let errors = |reference: &Array| {
            let applied = |f| {
                let ty = Type::new(DType::F32, reference.shape().iter().copied());
                interp::eval(&Elementwise1 { f }.into(), &[ty], &[reference], step.symbols).ok()?.pop()
            };
            let reference = match record.act {
                Some(f) => applied(f)?,
                None => reference.clone(),
            };
            let reference: Vec<f32> = reference.f32().ok()?.iter().copied().collect();
            (reference.len() == got.len()).then(|| Errors::of(&got, &reference))
        };
        let alone = local(step, &others, record, &self.spool, None)?;
        let mut local_errors = alone.as_ref().and_then(errors);
        // Of every request the same; found once.
        let tolerance = match self.nodes[index].tolerance {
            EXACT => record.storage.tolerance(step),
            known => known,
        };
        if let (Op::Linear(_), Some(scaled)) = (&step.node.op, self.scaled.get_mut(&(step.graph.name.clone(), step.node.args[0]))) {
            let undone = local(step, &others, record, &self.spool, Some(&scaled.factors))?;
            if let Some([along, length]) = alone.as_ref().zip(undone.as_ref()).and_then(|(a, b)| way(&got, a, b)) {
                scaled.way[0] += along;
                scaled.way[1] += length;
            }
            let undoes = scaled.way[0] > 0.5 * scaled.way[1];
            if undoes {
                local_errors = undone.as_ref().and_then(errors);
            }
            self.nodes[scaled.node].local = Some(if undoes { scaled.errors } else { scaled.plain });
        }
        if let (Op::RmsNorm(_) | Op::LayerNorm(_), Some(alone), Some(e)) = (&step.node.op, &alone, local_errors)
            && e.relative > tolerance
            && let Some(factors) = self.factors(step)?
        {
            let reference = alone.f32().map_err(Error::Backend)?.iter().zip(factors.iter().cycle()).map(|(y, f)| y * f);
            let errors = Errors::of(&got, &reference.collect::<Vec<_>>());
            if errors.relative <= tolerance {
                let scaled = Scaled { node: index, factors, plain: e, errors, way: [0.0; 2] };
                self.scaled.insert((step.graph.name.clone(), step.node.outs[0]), scaled);
            }
        }
        let worse = |before: Option<Errors>, now: Option<Errors>| match (before, now) {
            (Some(a), Some(b)) => Some(a.worse(b)),
            (a, b) => a.or(b),
        };
        let propagated = step.results.first().and_then(errors);
        let node = &mut self.nodes[index];
        node.local = worse(node.local, local_errors);
        node.propagated = worse(node.propagated, propagated);
        node.tolerance = tolerance;
        Ok(())
    }

    /// What the artifact's weight of a norm is of the checkpoint's, column by column.
    fn factors(&self, step: &Step<'_>) -> Result<Option<Vec<f32>>> {
        let Some(Def::Weight(name)) = step.node.args.get(1).map(|v| step.graph.def(*v)) else { return Ok(None) };
        let (Some(stored), Some(weight)) = (self.stored.vector(name)?, step.weights.get(name)) else { return Ok(None) };
        let weight = weight.f32().map_err(Error::Backend)?;
        let ratio = |(s, w): (&f32, &f32)| if w == s { 1.0 } else { s / w };
        let factors: Vec<f32> = stored.iter().zip(weight).map(ratio).collect();
        Ok((stored.len() == weight.len() && factors.iter().all(|f| f.is_finite() && *f != 0.0)).then_some(factors))
    }
}

/// How far `got` goes from `a` along the way to `b`, and how far that is, in units that make layers comparable. Errors in all other
/// directions, which are those of quantization, do not count.
fn way(got: &[f32], a: &Array, b: &Array) -> Option<[f64; 2]> {
    let (a, b) = (a.f32().ok()?, b.f32().ok()?);
    let (mut along, mut length, mut unit) = (0.0, 0.0, 0.0);
    for ((g, a), b) in got.iter().zip(a).zip(b) {
        let step = f64::from(b - a);
        along += f64::from(g - a) * step;
        length += step * step;
        unit += f64::from(*a) * f64::from(*a);
    }
    (a.len() == got.len() && unit > 0.0).then(|| [along / unit, length / unit])
}

/// Some columns of a tensor of floats.
fn columns(t: &Tensor, columns: &Range<usize>) -> Result<Vec<f32>> {
    let Data::F32(data) = t.data() else { return Ok(vec![]) };
    let width = t.shape().last().copied().unwrap_or(1).max(1);
    if columns.len() == width {
        return Ok(data.clone());
    }
    Ok(data.chunks_exact(width).flat_map(|row| &row[columns.clone()]).copied().collect())
}

/// The node's result for the operands that it has in the artifact, the first of them with its columns divided by factors; `None`
/// if these do not fit.
fn local(step: &Step<'_>, others: &[usize], record: &Record, spool: &Spool, factors: Option<&[f32]>) -> Result<Option<Array>> {
    if others.len() != record.operands.len() {
        return Ok(None);
    }
    let mut args = vec![];
    let mut types: Vec<Type> = step.node.args.iter().map(|a| step.graph.ty(*a).clone()).collect();
    for (i, v) in step.node.args.iter().enumerate() {
        let reference = match (step.operands[i], step.graph.def(*v)) {
            (Some(a), _) => a,
            (None, Def::Weight(name)) => match step.weights.get(name) {
                Some(w) => w,
                None => return Ok(None),
            },
            _ => return Ok(None),
        };
        args.push(match others.iter().position(|o| *o == i) {
            None => Cow::Borrowed(reference),
            Some(at) => {
                let kept = &record.operands[at];
                if kept.shape.iter().product::<usize>() != reference.shape().iter().product::<usize>() {
                    return Ok(None);
                }
                types[i].dtype = kept.dtype;
                let mut operand = reference::array(&spool.get(&Kept { shape: reference.shape().to_vec(), ..kept.clone() })?)?;
                if let (0, Array::F32(x), Some(factors)) = (at, &mut operand, factors) {
                    x.iter_mut().zip(factors.iter().cycle()).for_each(|(x, f)| *x /= f);
                }
                Cow::Owned(operand)
            }
        });
    }
    // The artifact may have an operand of another type (a mask that is added), if the op takes it.
    if step.node.op.infer(&types).is_err() {
        return Ok(None);
    }
    let args: Vec<&Array> = args.iter().map(AsRef::as_ref).collect();
    // What has no meaning for these operands (an index out of range) is no computation of the artifact's either.
    Ok(interp::eval(&step.node.op, &types, &args, step.symbols).ok().and_then(|r| r.into_iter().next()))
}
