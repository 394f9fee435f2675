//! From a checkpoint to an artifact.

use crate::{
    Error, Result,
    arch::{Architecture, SideFiles},
    artifact_dir::ArtifactDir,
    back::{self, Stored},
    calibrate::Recipes,
    checkpoint::Checkpoint,
    layout::{self, Layout, Place},
    loss, packed, target, tiktoken,
    weights_writer::{PAD, TensorSpec, WeightsWriter},
};
use prost::Message;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};
use vlmc_artifact::{Entry, FORMAT, Generation, Manifest, PROGRAM, Port, Processor, State, Task};
use vlmc_ir::{DType, Graph, Program, Verified, Weights, verify};
use vlmc_passes::{
    Checked, Target, Trace, keep_states,
    quantize::{Calibration, Choice, Outcome, Policy, quantize, round_statically},
};

/// Name and version of this compiler, as manifests have it.
pub const COMPILER: &str = concat!("vlmc ", env!("CARGO_PKG_VERSION"));
/// File name of the weights in an artifact.
pub const WEIGHTS: &str = "weights.safetensors";
/// File name of the commands that build TensorRT engines from an artifact's graphs.
pub const TRTEXEC: &str = "trtexec.txt";
/// Files that an artifact takes from the checkpoint as they are.
pub const COPIED: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"];

/// Files that go into the manifest.
const SIDE_FILES: [&str; 4] =
    ["generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"];

/// A checkpoint with the frontend that understands it.
pub struct Model {
    architecture: &'static Architecture,
    checkpoint: Checkpoint,
    with_loss: bool,
    kv: DType,
    layout: &'static Layout,
    /// What calibration has found.
    found: Recipes,
}

/// What the program of a model is, besides its graphs.
pub struct Lowered {
    /// As the frontend wrote it.
    pub program: Verified,
    /// What the model is for.
    pub task: Task,
    /// Checkpoint tensors that nothing uses, sorted.
    pub unused: Vec<String>,
    /// Fields of the config that the frontend does not know.
    pub unknown: Vec<String>,
    /// What became of the weights that could have been quantized, by name.
    pub outcomes: BTreeMap<String, Outcome>,
}

/// What to compile, and how to tell of it.
pub struct Options<'a> {
    /// Target.
    pub target: &'a Target,
    /// Which weights are quantized, and how.
    pub policy: &'a Policy,
    /// Directory of the artifact.
    pub out: &'a Path,
    /// Whether nodes that the target's provider does not run are told of rather than refused.
    pub allow_fallback: bool,
    /// Called while weights are written, with the numbers done and in all. From any thread.
    pub progress: &'a (dyn Fn(u64, u64) + Sync),
}

/// What was compiled.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// Directory of the artifact.
    pub out: PathBuf,
    /// `model_type`.
    pub architecture: String,
    /// Target name.
    pub target: String,
    /// Number of weights.
    pub parameters: u64,
    /// Bytes of the artifact's weight file.
    pub weight_bytes: u64,
    /// Weights by element type.
    pub weights: BTreeMap<String, usize>,
    /// What the user should know: what was left out, and what is missing.
    pub warnings: Vec<String>,
    /// What each pass did.
    #[serde(skip)]
    pub passes: Vec<Trace>,
}

impl Model {
    /// Opens a checkpoint directory.
    ///
    /// # Errors
    /// It is not a checkpoint, or of an architecture that is not supported.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::new(Checkpoint::open(dir)?)
    }

    /// Opens a checkpoint directory with the LoRA adapters of another one merged into its weights.
    ///
    /// # Errors
    /// As [`Self::open`], or the adapters do not fit.
    pub fn open_with_lora(dir: &Path, lora: &Path) -> Result<Self> {
        let model = Self::open(dir)?;
        Ok(Self { checkpoint: model.checkpoint.with_lora(lora, model.architecture.canonical_name)?, ..model })
    }

    /// The structure of a model from its `config.json` alone: good for everything but an artifact.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_config(config: &Path) -> Result<Self> {
        Self::new(Checkpoint::from_config(config)?)
    }

    fn new(checkpoint: Checkpoint) -> Result<Self> {
        let architecture = Architecture::of(checkpoint.config())?;
        let checkpoint = checkpoint.with_names(architecture.canonical_name)?.with_packed()?;
        Ok(Self { architecture, checkpoint, with_loss: false, kv: DType::F32, layout: &layout::PLAIN, found: Recipes::default() })
    }

    /// The model with the losses of its kind as entries, which only pairs of towers have.
    #[must_use]
    pub fn with_loss(self) -> Self {
        Self { with_loss: true, ..self }
    }

    /// The model with its states (the KV cache) kept in `kv`: `f32`, `bf16` or `i8`, which not every target does.
    #[must_use]
    pub fn with_kv(self, kv: DType) -> Self {
        Self { kv, ..self }
    }

    /// The model with the interface and the files that a client wants, when it is compiled for a target of ONNX.
    #[must_use]
    pub fn with_layout(self, layout: &'static Layout) -> Self {
        Self { layout, ..self }
    }

    /// The model with tensors that calibration has found, and the recipes of weights that use them.
    pub(crate) fn with_found(self, add: impl FnOnce(Checkpoint) -> Checkpoint, found: Recipes) -> Self {
        Self { checkpoint: add(self.checkpoint), found, ..self }
    }

    /// The frontend.
    pub fn architecture(&self) -> &'static Architecture {
        self.architecture
    }

    /// The checkpoint, with canonical tensor names.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The program as the frontend writes it.
    ///
    /// # Errors
    /// The config or a tensor does not fit.
    pub fn lower(&self) -> Result<Lowered> {
        let (mut program, task, unknown) =
            self.architecture.lower(self.checkpoint.config(), Weights::new(&self.checkpoint), &self.side_files()?)?;
        if self.with_loss {
            loss::add(&mut program, &task)?;
        }
        let used = program.weights.values().flat_map(|w| w.recipe.sources());
        let unused = self.checkpoint.unused(used).into_iter().filter(|n| !n.starts_with(PAD) && !(self.architecture.ignored)(n)).collect();
        Ok(Lowered { program: verified(program)?, task, unused, unknown, outcomes: BTreeMap::new() })
    }

    /// As [`Self::lower`], with the codes of layers that come quantized where `target` runs them.
    pub(crate) fn lower_with_codes(&self, target: &Target) -> Result<Lowered> {
        let lowered = self.lower()?;
        let program = packed::use_codes(lowered.program.into_inner(), self.checkpoint.packed(), target)?;
        Ok(Lowered { program: verified(program)?, ..lowered })
    }

    /// The program as `target` runs it, quantized by `policy`; `after` sees it after each pass.
    ///
    /// # Errors
    /// As [`Self::lower`], or the target cannot run the program.
    pub fn lower_for(&self, target: &Target, policy: &Policy, after: impl FnMut(&Trace, &Verified)) -> Result<Lowered> {
        let lowered = self.lower_with_codes(target)?;
        let (mut program, outcomes) = self.quantized(target, policy, lowered.program)?;
        if self.kv != DType::F32 {
            program = keep_states(program, self.kv)?;
        }
        self.layout.check(&program.name, target.name)?;
        let program = (self.layout.adapt)(program, &lowered.task)?;
        let program = vlmc_passes::run(target, verified(program)?, target.passes, after)?;
        Ok(Lowered { program, outcomes, ..lowered })
    }

    /// The program quantized by `policy`, with what calibration has found.
    fn quantized(&self, target: &Target, policy: &Policy, program: Verified) -> Result<(Program, BTreeMap<String, Outcome>)> {
        let (mut program, outcomes) = quantize(target, policy, program.into_inner())?;
        self.found.apply(&mut program);
        if target.static_activations {
            program = round_statically(program, &|weight| self.found.largest(weight))?;
        }
        Ok((program, outcomes))
    }

    /// Holds every pass of `target` to its contract, on the weights that `policy` quantizes: see [`vlmc_passes::check`].
    ///
    /// # Errors
    /// As [`Self::lower`], or a pass that is wrong, or a model that cannot be checked.
    pub fn check_passes(&self, target: &Target, policy: &Policy) -> Result<Vec<Checked>> {
        let source = |name: &str| self.checkpoint.floats(name).map_err(|e| e.to_string());
        let (program, _) = self.quantized(target, policy, self.lower_with_codes(target)?.program)?;
        Ok(vlmc_passes::check(target, verified(program)?, target.passes, 0, &source)?)
    }

    /// How pictures become tensors, if the checkpoint says.
    ///
    /// # Errors
    /// A setting that is not supported.
    pub fn processor(&self) -> Result<Option<Processor>> {
        self.architecture.processor(self.checkpoint.config(), &self.side_files()?)
    }

    pub(crate) fn side_files(&self) -> Result<SideFiles> {
        let json = |file| self.checkpoint.json(file);
        Ok(SideFiles {
            preprocessor: json("preprocessor_config.json")?,
            video_preprocessor: json("video_preprocessor_config.json")?,
            processor: json("processor_config.json")?,
            tokenizer_config: json("tokenizer_config.json")?,
            tokenizer: json("tokenizer.json")?,
            generation: json("generation_config.json")?,
        })
    }

    /// A name for this checkpoint and a policy: changes when the policy, the config, tensors' names and places, or a file's size
    /// or date change.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn fingerprint(&self, policy: &Policy) -> Result<String> {
        let source = self.checkpoint.source();
        let mut text = format!("{}\n{}\n{}\n", policy.text(), self.checkpoint.dir().display(), source.config_sha256);
        for name in source.weights.keys().map(String::as_str).chain(COPIED).chain(SIDE_FILES) {
            let path = self.checkpoint.dir().join(name);
            if let Ok(stat) = fs::metadata(&path) {
                let date = stat.modified().map_err(Error::io(&path))?;
                text += &format!("{name} {} {date:?} {:?}\n", stat.len(), source.weights.get(name));
            }
        }
        Ok(crate::digest::sha256(text.as_bytes())[..16].into())
    }

    /// Compiles the model to an artifact.
    ///
    /// # Errors
    /// Anything from the config to the disk; nothing is left at `out` then.
    pub fn compile(&self, options: &Options<'_>) -> Result<Report> {
        let target = options.target;
        let mut passes = vec![];
        let lowered = self.lower_for(target, options.policy, |trace, _| passes.push(trace.clone()))?;
        let Lowered { program, task, unused, unknown, outcomes } = &lowered;
        let mut warnings = vec![];
        let (mut missed, mut unrounded) = (vec![], vec![]);
        for (name, outcome) in outcomes {
            let Outcome::Done(Choice { scheme, calibration, dynamic, .. }) = outcome else { continue };
            if target.static_activations && *dynamic && scheme.bits == 8 && self.found.largest(name).is_none() {
                unrounded.push(name.clone());
            }
            let needed = matches!(calibration, Calibration::Gptq | Calibration::Awq | Calibration::Smooth);
            if needed && self.found.is_empty() {
                return Err(Error::Uncalibrated(name.clone()));
            }
            let wanted = *calibration == Calibration::Gptq || *calibration == Calibration::Optional && scheme.bits < 8;
            if wanted && !self.found.is_empty() && !self.found.has(name, *scheme) {
                missed.push(name.clone());
            }
        }
        if !missed.is_empty() {
            let names = abridged(&missed);
            warnings.push(format!("{} weights are quantized without calibration, because no sample reached them: {names}", missed.len()));
        }
        if !unrounded.is_empty() {
            let names = abridged(&unrounded);
            warnings.push(format!(
                "{} layers of 8 bits read numbers that are not rounded, for which --calibrate is needed: {names}",
                unrounded.len()
            ));
        }
        if !unknown.is_empty() {
            let fields = abridged(unknown);
            warnings.push(format!("config.json has fields that vlmc does not know, and which it ignores: {fields}"));
        }
        if !unused.is_empty() {
            warnings.push(format!("{} tensors of the checkpoint are not used: {}", unused.len(), abridged(unused)));
        }
        warnings.extend(refusals(outcomes));

        let dir = ArtifactDir::create(options.out)?;
        let (entries, parts) = if target.name == "cpu" {
            let (native, stored) = back::native::lower(program)?;
            let json = serde_json::to_vec(&native).map_err(|e| Error::Backend(e.to_string()))?;
            write_file(&dir.path().join(PROGRAM), &json)?;
            let writer = writer(program, &stored, &dir.path().join(WEIGHTS))?;
            (native_entries(program, &native), vec![(stored, writer)])
        } else {
            self.emit(target, program, dir.path(), options.allow_fallback, &mut warnings)?
        };
        let elements = |s: &Stored| Some(program.weights.get(&s.weight)?.elements());
        let total = parts.iter().flat_map(|(stored, _)| stored).filter_map(elements).sum();
        let done = AtomicU64::new(0);
        let mut weight_bytes = 0;
        for (stored, writer) in parts {
            back::write(program, &self.checkpoint, &stored, &writer, &|elements| {
                (options.progress)(done.fetch_add(elements, Ordering::Relaxed) + elements, total);
            })?;
            weight_bytes += writer.finish()?.bytes;
        }
        let manifest = self.manifest(target, &lowered, entries)?;
        for (name, bytes) in (self.layout.files)(self, &manifest)? {
            let path = dir.path().join(name);
            make_parent(&path)?;
            write_file(&path, &bytes)?;
        }
        self.copy_side_files(dir.path(), task, manifest.processor.is_some(), &mut warnings)?;
        let report = Report {
            out: options.out.into(),
            architecture: manifest.architecture.clone(),
            target: manifest.target.clone(),
            parameters: manifest.parameters,
            weight_bytes,
            weights: program.weights.values().fold(BTreeMap::new(), |mut types, w| {
                *types.entry(w.dtype.to_string()).or_default() += 1;
                types
            }),
            warnings,
            passes,
        };
        dir.commit(manifest)?;
        Ok(report)
    }

    /// Writes the graphs as ONNX where the layout wants them, and begins their files of weights.
    fn emit(
        &self,
        target: &Target,
        program: &Verified,
        dir: &Path,
        allow_fallback: bool,
        warnings: &mut Vec<String>,
    ) -> Result<(Vec<Entry>, Parts)> {
        let places: Vec<Place> = program.graphs.iter().map(|g| (self.layout.place)(g)).collect();
        let mut files: Vec<&str> = places.iter().map(|p| p.weights.as_str()).collect();
        files.sort_unstable();
        files.dedup();
        let (mut parts, mut uncovered) = (vec![], vec![]);
        for file in files {
            let mut part = (**program).clone();
            let mut inside = places.iter().map(|p| p.weights == file);
            part.graphs.retain(|_| inside.next().unwrap_or(false));
            let part = verified(part)?;
            let mut stored = back::onnx::stored(target, &part);
            // Clients want files of their own names.
            let linked = if self.layout.is_plain() { linked(&part, &self.checkpoint, &stored) } else { BTreeMap::new() };
            stored.retain(|s| !linked.contains_key(&s.name));
            for (file, from) in linked.values().map(|(place, from)| (&place.file, from)).collect::<BTreeMap<_, _>>() {
                link(from, &dir.join(file))?;
            }
            let path = dir.join(file);
            make_parent(&path)?;
            let writer = writer(&part, &stored, &path)?;
            let beside = Path::new(file).file_name().and_then(|n| n.to_str()).unwrap_or(file);
            let written = |name: &str| {
                Some(back::Place { file: beside.into(), offset: writer.offset_of(name).ok()?, bytes: writer.len_of(name).ok()? })
            };
            let place = |name: &str| linked.get(name).map(|(place, _)| place.clone()).or_else(|| written(name));
            let inside = places.iter().filter(|p| p.weights == file);
            for ((_, mut model), place) in back::onnx::emit(target, &part, &place)?.into_iter().zip(inside) {
                uncovered.extend(back::onnx::uncovered(target, &model));
                back::onnx::rename_axes(&mut model, self.layout.symbols);
                write_file(&dir.join(&place.onnx), &model.encode_to_vec())?;
            }
            parts.push((stored, writer));
        }
        if !uncovered.is_empty() && !allow_fallback {
            return Err(Error::Uncovered { target: target.name, nodes: uncovered });
        }
        warnings.extend(uncovered.iter().map(|node| format!("target '{}' leaves a node to another provider: {node}", target.name)));
        let entry = |(g, place): (&Graph, Place)| {
            let mut entry = entry(g, place.onnx, None);
            entry.states.iter_mut().zip(&g.states).for_each(|(state, s)| state.in_place = back::onnx::in_place(g, s));
            entry
        };
        let mut entries: Vec<Entry> = program.graphs.iter().zip(places).map(entry).collect();
        if target.name == "onnx-tensorrt" {
            let mut commands = String::new();
            for entry in &mut entries {
                entry.provider_options = back::onnx::provider_options(&program.symbols, entry)?;
                commands += &format!("{}\n", back::onnx::trtexec(&program.symbols, entry)?);
            }
            write_file(&dir.join(TRTEXEC), commands.as_bytes())?;
        }
        Ok((entries, parts))
    }

    /// What an artifact for `cpu` would hold, without its files: manifest, program and bytes of the weights.
    ///
    /// # Errors
    /// As [`Self::lower_for`].
    pub fn outline(&self, policy: &Policy) -> Result<(Manifest, vlmc_artifact::program::Program, u64)> {
        let target = target::named("cpu")?;
        let lowered = self.lower_for(target, policy, |_, _| {})?;
        let (native, stored) = back::native::lower(&lowered.program)?;
        let manifest = self.manifest(target, &lowered, native_entries(&lowered.program, &native))?;
        let specs = specs(&lowered.program, &stored)?;
        Ok((manifest, native, specs.iter().filter_map(TensorSpec::bytes).sum()))
    }

    /// The manifest, but for the list of files.
    fn manifest(&self, target: &Target, lowered: &Lowered, entries: Vec<Entry>) -> Result<Manifest> {
        let program = &lowered.program;
        Ok(Manifest {
            format: FORMAT,
            compiler: COMPILER.into(),
            target: target.name.into(),
            layout: (!self.layout.is_plain()).then(|| self.layout.name.into()),
            architecture: program.name.clone(),
            parameters: program.weights.values().map(vlmc_ir::weights::WeightDef::elements).sum(),
            source: self.checkpoint.source(),
            symbols: program.symbols.clone(),
            entries,
            task: lowered.task.clone(),
            processor: self.processor()?,
            generation: self.generation()?,
            files: Default::default(),
            certificate: None,
        })
    }

    fn copy_side_files(&self, dir: &Path, task: &Task, has_processor: bool, warnings: &mut Vec<String>) -> Result<()> {
        let mut copied = vec![];
        for name in COPIED {
            let (from, to) = (self.checkpoint.dir().join(name), dir.join(name));
            // A layout may have its own.
            if from.exists() && !to.exists() {
                fs::copy(&from, &to).map_err(Error::io(&from))?;
            }
            if to.exists() {
                copied.push(name);
            }
        }
        let ranks = self.checkpoint.dir().join(tiktoken::QWEN);
        if !copied.contains(&"tokenizer.json") && ranks.exists() {
            let text = fs::read_to_string(&ranks).map_err(Error::io(&ranks))?;
            let json = tiktoken::qwen_tokenizer(&ranks, &text)?;
            write_file(&dir.join("tokenizer.json"), json.to_string().as_bytes())?;
            copied.push("tokenizer.json");
        }
        let only_run = if task.prompt().is_some() { "only `vlmc run` needs it" } else { "only `vlmc run` and `vlmc embed` need it" };
        if !matches!(task, Task::Classify { .. }) && !copied.contains(&"tokenizer.json") {
            warnings.push(format!("the checkpoint has no tokenizer.json; {only_run}"));
        }
        let in_config = || Ok::<_, Error>(self.checkpoint.json("tokenizer_config.json")?.is_some_and(|c| c.get("chat_template").is_some()));
        let wants_template = task.prompt().is_some_and(|p| p.template.is_none());
        if wants_template && !copied.iter().any(|n| n.starts_with("chat_template")) && !in_config()? {
            warnings.push(format!("the checkpoint has no chat template; {only_run}"));
        }
        if !has_processor {
            warnings.push(format!("the checkpoint has no preprocessor_config.json; {only_run}, for pictures"));
        }
        Ok(())
    }

    /// Defaults of `generation_config.json`; without one, the ends of the config.
    fn generation(&self) -> Result<Generation> {
        const FILE: &str = "generation_config.json";
        let file = self.checkpoint.json(FILE)?;
        let invalid = |message: String| Error::file(self.checkpoint.dir().join(FILE), message);
        let field = |name: &str| file.as_ref().and_then(|f| f.get(name)).filter(|v| !v.is_null());
        let number = |name: &str, default: f32| match field(name) {
            None => Ok(default),
            Some(v) => {
                v.as_f64().map(|v| v as f32).filter(|v| v.is_finite()).ok_or_else(|| invalid(format!("`{name}` must be a number, is {v}")))
            }
        };
        let ids = |v: &Value| match v {
            Value::Array(ids) => ids.iter().map(Value::as_i64).collect::<Option<Vec<_>>>(),
            id => id.as_i64().map(|id| vec![id]),
        };
        let config = self.checkpoint.config();
        let eos = field("eos_token_id")
            .or_else(|| config.get("eos_token_id"))
            .or_else(|| ["text_config", "language_config"].iter().find_map(|part| config.get(part)?.get("eos_token_id")));
        let eos_token_ids = match eos.filter(|v| !v.is_null()) {
            None => vec![],
            Some(v) => ids(v).ok_or_else(|| invalid(format!("`eos_token_id` must be a token id or a list of them, is {v}")))?,
        };
        let mut eos_token_ids = eos_token_ids;
        if field("chat_format").is_some_and(|f| f == "chatml") {
            // Qwen's turns begin and end with the tokens after the end of text (`qwen_generation_utils.py`, get_stop_words_ids).
            eos_token_ids.extend(eos_token_ids.clone().iter().flat_map(|id| [id + 1, id + 2]));
        }
        let default = Generation::default();
        Ok(Generation {
            eos_token_ids,
            pad_token_id: field("pad_token_id").and_then(Value::as_i64),
            do_sample: field("do_sample").and_then(Value::as_bool).unwrap_or(default.do_sample),
            temperature: number("temperature", default.temperature)?,
            top_k: number("top_k", default.top_k as f32)? as usize,
            top_p: number("top_p", default.top_p)?,
            repetition_penalty: number("repetition_penalty", default.repetition_penalty)?,
        })
    }
}

/// Files of weights that are begun, and what goes into each.
type Parts = Vec<(Vec<Stored>, WeightsWriter)>;

fn verified(program: Program) -> Result<Verified> {
    verify(program).map_err(|found| Error::Invalid(found.iter().map(|d| format!("\n  {d}")).collect()))
}

/// Warnings of weights that the policy wants quantized, and the target does not, by reason.
fn refusals(outcomes: &BTreeMap<String, Outcome>) -> Vec<String> {
    let mut by_reason: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (name, outcome) in outcomes {
        if let Outcome::Refused(why) = outcome {
            by_reason.entry(why).or_default().push(name.clone());
        }
    }
    by_reason.iter().map(|(why, names)| format!("{} weights are not quantized: {why}: {}", names.len(), abridged(names))).collect()
}

fn make_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |dir| fs::create_dir_all(dir).map_err(Error::io(dir)))
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(Error::io(path))
}

/// Weights that the checkpoint's files have as the artifact wants them, by their names in the artifact, each with the path of its
/// file. All weights of such a file are used so.
fn linked<'c>(program: &Verified, checkpoint: &'c Checkpoint, stored: &[Stored]) -> BTreeMap<String, (back::Place, &'c Path)> {
    let (mut found, mut touched) = (BTreeMap::new(), BTreeSet::new());
    for s in stored {
        let Some(def) = program.weights.get(&s.weight) else { continue };
        let same = |name: &&str| s.layout == back::Layout::Rows && checkpoint.tensor(name).is_some_and(|(dtype, _)| dtype == def.dtype);
        match def.untouched().filter(same).and_then(|name| checkpoint.place(name)) {
            Some((file, path, range)) if !file.contains('/') && file != WEIGHTS => {
                let place = back::Place { file: file.into(), offset: range.start, bytes: range.end - range.start };
                found.insert(s.name.clone(), (place, path));
            }
            _ => touched
                .extend(def.recipe.sources().into_iter().filter_map(|name| checkpoint.place(name).map(|(file, ..)| file.to_string()))),
        }
    }
    found.retain(|_, (place, _)| !touched.contains(&place.file));
    found
}

/// The same file under another name; where that cannot be, a copy.
fn link(from: &Path, to: &Path) -> Result<()> {
    let from = from.canonicalize().map_err(Error::io(from))?;
    fs::hard_link(&from, to).or_else(|_| fs::copy(&from, to).map(|_| ())).map_err(Error::io(to))
}

fn specs(program: &Verified, stored: &[Stored]) -> Result<Vec<TensorSpec>> {
    let specs = |s: &Stored| s.specs(program.weights.get(&s.weight).ok_or_else(|| Error::tensor(&s.weight, "is not declared"))?);
    Ok(stored.iter().map(specs).collect::<Result<Vec<_>>>()?.concat())
}

fn writer(program: &Verified, stored: &[Stored], path: &Path) -> Result<WeightsWriter> {
    WeightsWriter::create(path, &specs(program, stored)?)
}

fn native_entries(program: &Verified, native: &vlmc_artifact::program::Program) -> Vec<Entry> {
    let arena = |g: &Graph| native.functions.iter().find(|f| f.name == g.name).map(back::native::arena);
    program.graphs.iter().map(|g| entry(g, PROGRAM.into(), arena(g))).collect()
}

pub(crate) fn entry(g: &Graph, file: String, arena: Option<vlmc_artifact::Dim>) -> Entry {
    let port = |p: &vlmc_ir::Port| {
        let ty = g.ty(p.value);
        Port { name: p.name.clone(), dtype: ty.dtype, shape: ty.shape.clone() }
    };
    let state = |s: &vlmc_ir::State| {
        let ty = g.ty(s.past);
        State {
            past: s.past_name.clone(),
            present: s.present_name.clone(),
            dtype: g.kept(s),
            shape: ty.shape.clone(),
            axis: s.axis,
            in_place: false,
        }
    };
    Entry {
        name: g.name.clone(),
        file,
        inputs: g.inputs.iter().map(port).collect(),
        outputs: g.outputs.iter().map(port).collect(),
        states: g.states.iter().map(state).collect(),
        arena,
        provider_options: BTreeMap::new(),
    }
}

/// The first few names, and how many more.
fn abridged(names: &[String]) -> String {
    let shown = names.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > 5 { format!("{shown}, ... ({} more)", names.len() - 5) } else { shown }
}
