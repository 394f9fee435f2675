//! `vlmc bench`.

use super::{
    EngineArgs,
    inspect::{bytes, size},
    print, print_json,
    profile::{self, Phase},
};
use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::ProgressBar;
use memmap2::MmapMut;
use serde::Serialize;
use std::{
    fmt::Write,
    num::NonZero,
    path::{Path, PathBuf},
    time::Instant,
};
use vlmc_kernels::{Arithmetic, Isa, Kernels};
use vlmc_runtime::{
    Artifact, CpuEngine, Engine, Features, Pipeline, Request, Run, Scored, Tensor, Tensors,
    artifact::{PromptRules, Task, program::Program},
    forward, needs, open_engine,
    prepare::{synthetic_picture, synthetic_prompt, synthetic_text},
    processor, threads,
    tokenizer::Tokenizer,
    work,
};

/// Side of a picture, tokens of a prompt, and tokens in the cache, where nothing is asked for.
const SIDE: usize = 448;
const PROMPT: usize = 512;
const CONTEXT: usize = 128;
/// Most bytes of the buffer that the bandwidth is measured with: no cache holds as much.
const MAX_BUFFER: usize = 1 << 30;
const MIN_BUFFER: usize = 4096;

#[derive(Args)]
pub(super) struct BenchArgs {
    /// Artifact directory
    artifact: PathBuf,
    /// Size of a made-up picture to encode; may be repeated [default: 448x448]
    #[arg(long, value_name = "WxH", value_parser = size)]
    picture: Vec<[usize; 2]>,
    /// Tokens of a prompt to prefill; may be repeated [default: 512]. The first one is what the first token waits for
    #[arg(long, value_name = "N")]
    prompt_tokens: Vec<NonZero<usize>>,
    /// Tokens to decode, one by one
    #[arg(long, value_name = "N", default_value = "64")]
    new_tokens: NonZero<usize>,
    /// Tokens in the cache when decoding begins [default: 128]
    #[arg(long, value_name = "N")]
    context: Option<NonZero<usize>>,
    /// Measurements of each
    #[arg(long, value_name = "N", default_value = "5")]
    repeat: NonZero<usize>,
    #[command(flatten)]
    engine: EngineArgs,
    /// Run once more, with the time of every step: a table by kernel, shape and type of the weights
    #[arg(long)]
    profile: bool,
    /// Write the times of every step to FILE, for Perfetto or chrome://tracing
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

/// Of several measurements.
#[derive(Clone, Copy, Debug, Serialize)]
struct Stats {
    median: f64,
    min: f64,
    max: f64,
}

impl Stats {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Some(Self { median, min, max })
    }
}

/// What is measured. `_s` is seconds, `gb` 10^9 bytes, `gop` 10^9 multiplications and additions (of products of matrices and of
/// attention, whose segments count as one). What is not known of an artifact (ONNX Runtime does not tell what it reads) or of a
/// machine is null.
#[derive(Serialize)]
struct Report {
    architecture: String,
    target: String,
    /// `generate`, `contrast` or `classify`.
    task: &'static str,
    /// Measurements of each number.
    repeat: usize,
    machine: Machine,
    /// Opening the artifact, its tokenizer included, from a warm file cache.
    load_s: Stats,
    /// Loading, and prefill of the first of the prompts.
    first_token_s: Option<Stats>,
    /// Of models that answer prompts, pictures through the tower; of others, a picture, and a text if they take one, through all.
    encode: Vec<Encode>,
    prefill: Vec<Prefill>,
    decode: Option<Decode>,
    /// Most memory that was resident, before the machine was measured.
    peak_memory_bytes: Option<u64>,
    /// Weight files.
    weight_bytes: u64,
    /// Of them, in pages of 2 MiB, if a measurement when the artifact was loaded chose such.
    large_page_bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<Vec<profile::Table>>,
}

#[derive(Serialize)]
struct Machine {
    cpu: Option<String>,
    threads: usize,
    /// Instruction set of the kernels.
    isa: String,
    /// Bytes of the buffer that was read: as many as a token reads of weights, up to a limit.
    buffer_bytes: usize,
    /// Plain reading with all threads, with the better of the two kinds of pages.
    bandwidth_gb_s: Stats,
    pages_4k_gb_s: Stats,
    /// Null where the system gives none.
    pages_2m_gb_s: Option<Stats>,
    /// Arithmetic alone with all threads; null where there is no instruction for it.
    peak_gop_s: Peaks,
}

#[derive(Serialize)]
struct Peaks {
    int8: Option<Stats>,
    bf16: Option<Stats>,
    f32: Option<Stats>,
}

#[derive(Serialize)]
struct Encode {
    /// Width and height.
    picture: String,
    /// Tokens that it takes in a prompt.
    tokens: usize,
    seconds: Stats,
    #[serde(flatten)]
    arithmetic: Arithmetics,
}

#[derive(Serialize)]
struct Prefill {
    tokens: usize,
    seconds: Stats,
    tokens_per_s: Stats,
    #[serde(flatten)]
    arithmetic: Arithmetics,
}

#[derive(Serialize)]
struct Arithmetics {
    gop: Option<f64>,
    gop_s: Option<Stats>,
    /// How long it would take at the peak of the arithmetic used, as a share of how long it took.
    fraction_of_peak: Option<Stats>,
}

#[derive(Serialize)]
struct Decode {
    new_tokens: usize,
    /// Tokens in the cache before.
    context: usize,
    tokens_per_s: Stats,
    /// `weight_bytes_per_token` and, in the middle of the new tokens, `kv_bytes_per_token`.
    bytes_per_token: Option<u64>,
    /// Matrices, with their scales, and the rows in use of tables and of experts.
    weight_bytes_per_token: Option<u64>,
    kv_bytes_per_token: Option<u64>,
    gb_s: Option<Stats>,
    /// Of `bandwidth_gb_s`, measured beside it.
    fraction_of_bandwidth: Option<Stats>,
    /// How many tokens there would be if a token did nothing but read its bytes.
    bound_tokens_per_s: Option<Stats>,
    #[serde(flatten)]
    arithmetic: Arithmetics,
}

/// What runs read and compute.
#[derive(Clone, Copy, Default)]
struct Total {
    weight_bytes: usize,
    state_bytes: usize,
    int8: usize,
    bf16: usize,
    f32: usize,
}

impl Total {
    fn of(program: &Program, runs: &[Run], only_largest: bool) -> Result<Self> {
        let mut total = Self::default();
        for run in runs {
            for work in work(program, &run.entry, &run.symbols, Isa::detect(), only_largest)? {
                total.weight_bytes += work.weight_bytes;
                total.state_bytes += work.state_bytes;
                *match work.arithmetic {
                    Arithmetic::Int8 => &mut total.int8,
                    Arithmetic::Bf16 => &mut total.bf16,
                    Arithmetic::F32 => &mut total.f32,
                } += work.operations;
            }
        }
        Ok(total)
    }

    fn gop(&self) -> f64 {
        1e-9 * (self.int8 + self.bf16 + self.f32) as f64
    }

    /// Seconds of arithmetic at its peak.
    fn seconds(&self, peaks: &[(Arithmetic, f64)]) -> Option<f64> {
        let peak = |a: Arithmetic| peaks.iter().find(|(b, _)| *b == a).map(|(_, peak)| *peak);
        let parts = [(Arithmetic::Int8, self.int8), (Arithmetic::Bf16, self.bf16), (Arithmetic::F32, self.f32)];
        parts.into_iter().filter(|(_, n)| *n > 0).map(|(a, n)| Some(n as f64 / peak(a)?)).sum()
    }
}

/// One measurement of something, with what the machine did beside it.
struct Sample {
    seconds: f64,
    peaks: Vec<(Arithmetic, f64)>,
}

fn arithmetics(total: Option<Total>, samples: &[Sample], count: usize) -> Arithmetics {
    let each = |f: &dyn Fn(Total, &Sample) -> Option<f64>| {
        let values: Option<Vec<f64>> = samples.iter().map(|s| f(total?, s)).collect();
        values.and_then(Stats::of)
    };
    Arithmetics {
        gop: total.map(|t| t.gop()),
        gop_s: each(&|t, s| Some(t.gop() * count as f64 / s.seconds)),
        fraction_of_peak: each(&|t, s| Some(t.seconds(&s.peaks)? * count as f64 / s.seconds)),
    }
}

fn seconds(f: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    f()?;
    Ok(start.elapsed().as_secs_f64())
}

/// A picture as the model takes it.
struct Picture {
    size: [usize; 2],
    tokens: usize,
    inputs: Tensors,
}

impl Picture {
    fn name(&self) -> String {
        format!("{}x{}", self.size[0], self.size[1])
    }
}

/// An artifact that is ready to run.
enum Ready {
    Answers(Box<Pipeline>),
    Others(Box<dyn Engine>),
}

impl Ready {
    /// And how long that took, in seconds.
    fn open(dir: &Path, engine: impl FnOnce(&Artifact) -> vlmc_runtime::Result<Box<dyn Engine>>) -> Result<(Self, f64)> {
        let start = Instant::now();
        let artifact = Artifact::open(dir)?;
        let tokenizer = artifact.path("tokenizer.json").map(|p| Tokenizer::open(&p)).transpose()?;
        let engine = engine(&artifact)?;
        let ready = match artifact.manifest().task {
            Task::Generate(_) => Self::Answers(Box::new(Pipeline::new(engine)?)),
            _ => Self::Others(engine),
        };
        let time = start.elapsed().as_secs_f64();
        drop(tokenizer);
        Ok((ready, time))
    }

    fn encode(&mut self, inputs: &Tensors) -> Result<()> {
        match self {
            Self::Answers(pipeline) => _ = pipeline.features(inputs)?,
            Self::Others(engine) => _ = forward(&mut **engine, inputs)?,
        }
        Ok(())
    }

    fn engine(&self) -> &dyn Engine {
        match self {
            Self::Answers(pipeline) => pipeline.engine(),
            Self::Others(engine) => &**engine,
        }
    }

    fn pipeline(&mut self) -> Result<&mut Pipeline> {
        match self {
            Self::Answers(pipeline) => Ok(pipeline),
            Self::Others(_) => bail!("the model answers no prompts"),
        }
    }

    /// Runs a prompt and gives its last logits.
    fn prefill(&mut self, ids: &[i64]) -> Result<Tensor> {
        let pipeline = self.pipeline()?;
        pipeline.clear()?;
        let inputs = Tensors::from([("input_ids".into(), Tensor::new([1, ids.len()], ids.to_vec())?)]);
        Ok(pipeline.prefill(&inputs, &Features::default(), Scored::Last)?)
    }

    /// Logits of the last of the tokens `ids`, those before it being in the cache.
    fn again(&mut self, ids: &[i64]) -> Result<Tensor> {
        let last = ids.len() - 1;
        if last == 0 {
            return self.prefill(ids);
        }
        let pipeline = self.pipeline()?;
        pipeline.truncate(last)?;
        let axes = pipeline.position_axes(1, 1);
        let positions = vec![last as i64; axes.iter().product()];
        let inputs = Tensors::from([
            ("input_ids".into(), Tensor::new([1, 1], vec![ids[last]])?),
            ("position_ids".into(), Tensor::new(axes.to_vec(), positions)?),
        ]);
        Ok(pipeline.prefill(&inputs, &Features::default(), Scored::Last)?)
    }
}

/// What is asked for, checked against what the model takes.
struct Asked {
    pictures: Vec<Picture>,
    prompts: Vec<Vec<i64>>,
    /// What is in the cache when decoding begins; empty for models without prompts.
    context: Vec<i64>,
}

impl Asked {
    fn new(args: &BenchArgs, artifact: &Artifact) -> Result<Self> {
        let manifest = artifact.manifest();
        let sizes = match (&manifest.processor, args.picture.is_empty()) {
            (Some(_), true) => vec![[SIDE, SIDE]],
            (None, false) => bail!("--picture: the checkpoint had no preprocessor_config.json, so the artifact takes no pictures"),
            _ => args.picture.clone(),
        };
        let text = if let Task::Contrast(rules) = &manifest.task { synthetic_text(rules)? } else { Tensors::new() };
        let picture = |size: [usize; 2]| {
            let [width, height] = size;
            let what = || format!("--picture {width}x{height}");
            let processor = manifest.processor.as_ref().with_context(what)?;
            processor::outline(processor, width, height, 1).with_context(what)?;
            let picture = synthetic_picture(width, height).context("has too many pixels").with_context(what)?;
            let mut pixels = processor::image(processor, &picture).with_context(what)?;
            pixels.inputs.extend(text.clone());
            Ok(Picture { size, tokens: pixels.tokens, inputs: pixels.inputs })
        };
        let pictures = sizes.into_iter().map(picture).collect::<Result<Vec<_>>>()?;
        let Task::Generate(rules) = &manifest.task else {
            if !args.prompt_tokens.is_empty() || args.context.is_some() {
                let does = manifest.task.purpose();
                bail!("--prompt-tokens and --context: the model (of type {}) {does}; it has no prompts", manifest.architecture);
            }
            if pictures.is_empty() {
                bail!("the checkpoint had no preprocessor_config.json, so the artifact takes no pictures, and there is nothing to run");
            }
            return Ok(Self { pictures, prompts: vec![], context: vec![] });
        };
        let longest = rules.max_positions;
        let prompts = match &args.prompt_tokens[..] {
            [] => vec![prompt(rules, PROMPT.min(longest))?],
            given => given.iter().map(|n| prompt(rules, n.get()).context("--prompt-tokens")).collect::<Result<Vec<_>>>()?,
        };
        let room = longest.checked_sub(args.new_tokens.get()).filter(|room| *room > 0);
        let room = room.with_context(|| {
            format!("--new-tokens: {} tokens and a prompt are more than the model's context of {longest}", args.new_tokens)
        })?;
        let context = args.context.map_or(CONTEXT.min(room), NonZero::get);
        if context > room {
            bail!("--context: {context} + {} new tokens are more than the model's context of {longest}", args.new_tokens);
        }
        Ok(Self { pictures, prompts, context: prompt(rules, context)? })
    }
}

/// A made-up prompt of `n` tokens.
fn prompt(rules: &PromptRules, n: usize) -> Result<Vec<i64>> {
    if n > rules.max_positions {
        bail!("{n} tokens are more than the model's context of {}", rules.max_positions);
    }
    let ids = synthetic_prompt(rules, n);
    if ids.len() < n {
        bail!("the vocabulary of {} tokens has none without a meaning of its own", rules.vocab_size);
    }
    Ok(ids)
}

/// Counts what requests read and compute, if the program is known.
struct Counter<'a> {
    artifact: &'a Artifact,
    program: Option<Program>,
    threads: usize,
}

impl Counter<'_> {
    /// Of the runs that `chosen` takes of those of a request.
    fn count(
        &self,
        pictures: &[[usize; 2]],
        context: usize,
        new_tokens: usize,
        only_largest: bool,
        chosen: impl Fn(&[Run]) -> &[Run],
    ) -> Result<Option<Total>> {
        let Some(program) = &self.program else { return Ok(None) };
        let request = Request { pictures: pictures.to_vec(), context, new_tokens, threads: self.threads };
        let runs = needs(self.artifact.manifest(), Some(program), &request)?.runs;
        Total::of(program, chosen(&runs), only_largest).map(Some)
    }

    fn picture(&self, picture: &Picture) -> Result<Option<Total>> {
        match self.artifact.manifest().task.prompt() {
            // The tower is counted as part of the shortest prompt with the picture, if the model has room for one.
            Some(rules) if picture.tokens >= rules.max_positions => Ok(None),
            Some(_) => self.count(&[picture.size], picture.tokens + 1, 1, false, |runs| runs.get(..1).unwrap_or_default()),
            None => self.count(&[picture.size], 0, 0, false, |runs| runs),
        }
    }

    fn prefill(&self, tokens: usize) -> Result<Option<Total>> {
        self.count(&[], tokens, 1, false, |runs| runs.get(..2).unwrap_or_default())
    }

    /// Of a token after so many, chosen as the most probable one.
    fn token(&self, past: usize) -> Result<Option<Total>> {
        self.count(&[], past + 1, 2, true, |runs| runs.get(runs.len().saturating_sub(2)..).unwrap_or_default())
    }
}

/// Memory to read, in large pages or in small ones; `None` if the system has no large ones.
fn buffer(len: usize, large: bool) -> Result<Option<MmapMut>> {
    let enabled = || std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if large && !["[always]", "[madvise]"].iter().any(|state| enabled().contains(state)) {
        return Ok(None);
    }
    let mut map = MmapMut::map_anon(len).context("memory to measure the bandwidth with")?;
    #[cfg(target_os = "linux")]
    if map.advise(if large { memmap2::Advice::HugePage } else { memmap2::Advice::NoHugePage }).is_err() && large {
        return Ok(None);
    }
    map.fill(1);
    Ok(Some(map))
}

/// `VmHWM` of this process.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"))?;
    kib.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn cpu() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("model name"))?;
    Some(line.trim_start_matches([' ', '\t', ':']).to_string())
}

pub(super) fn bench(args: &BenchArgs) -> Result<()> {
    let artifact = Artifact::open(&args.artifact)?;
    let manifest = artifact.manifest();
    let program = artifact.program()?;
    let profiled = args.profile || args.trace.is_some();
    if profiled && program.is_none() {
        bail!("--profile and --trace are for artifacts of target 'cpu'; this one is for '{}'", manifest.target);
    }
    let asked = Asked::new(args, &artifact)?;
    let threads = threads(args.engine.threads);
    let counter = Counter { artifact: &artifact, program, threads };
    let bar = super::spinner();
    let mut report = measure(args, &asked, &counter, &bar)?;
    if profiled && let Some(program) = &counter.program {
        bar.set_message("profile");
        let phases = profile_phases(args, &asked)?;
        if let Some(file) = &args.trace {
            profile::write_trace(file, program, &phases)?;
        }
        if args.profile {
            report.profile = Some(profile::tables(program, &phases)?);
        }
    }
    bar.finish_and_clear();
    if args.json { print_json(&report) } else { print(&text(&report)) }
}

fn measure(args: &BenchArgs, asked: &Asked, counter: &Counter<'_>, bar: &ProgressBar) -> Result<Report> {
    let (manifest, repeat) = (counter.artifact.manifest(), args.repeat.get());
    let kernels = Kernels::new(counter.threads);
    let open = || Ready::open(&args.artifact, |a| open_engine(a, &args.engine.options()));
    // Once without being measured: files and memory are warm then, and nothing else has taken memory.
    bar.set_message("warming up");
    let (mut model, _) = open()?;
    asked.pictures.iter().try_for_each(|p| model.encode(&p.inputs))?;
    asked.prompts.iter().try_for_each(|ids| model.prefill(ids).map(drop))?;
    if !asked.context.is_empty() {
        let logits = model.prefill(&asked.context)?;
        model.pipeline()?.continue_greedily(&logits, 2)?;
    }
    let peak_memory_bytes = peak_memory();

    let (mut loads, mut firsts) = (vec![], vec![]);
    for i in 0..repeat {
        bar.set_message(format!("loading, {} of {repeat}", i + 1));
        drop(model);
        let (fresh, load) = open()?;
        model = fresh;
        loads.push(load);
        if let Some(ids) = asked.prompts.first() {
            firsts.push(load + seconds(|| model.prefill(ids).map(drop))?);
        }
    }

    let large_page_bytes = model.engine().large_page_bytes();
    const KINDS: [Arithmetic; 3] = [Arithmetic::Int8, Arithmetic::Bf16, Arithmetic::F32];
    let mut peaks: Vec<Vec<(Arithmetic, f64)>> = vec![];
    let mut encoded: Vec<Vec<Sample>> = asked.pictures.iter().map(|_| vec![]).collect();
    let mut prefilled: Vec<Vec<Sample>> = asked.prompts.iter().map(|_| vec![]).collect();
    for i in 0..repeat {
        bar.set_message(format!("pictures and prompts, {} of {repeat}", i + 1));
        let beside: Vec<_> = KINDS.into_iter().filter_map(|a| Some((a, kernels.peak(a)?))).collect();
        for (picture, samples) in asked.pictures.iter().zip(&mut encoded) {
            samples.push(Sample { seconds: seconds(|| model.encode(&picture.inputs))?, peaks: beside.clone() });
        }
        for (ids, samples) in asked.prompts.iter().zip(&mut prefilled) {
            samples.push(Sample { seconds: seconds(|| model.prefill(ids).map(drop))?, peaks: beside.clone() });
        }
        peaks.push(beside);
    }

    let new_tokens = args.new_tokens.get();
    let token = if asked.context.is_empty() { None } else { counter.token(asked.context.len() + new_tokens / 2)? };
    let weight_bytes: u64 = manifest.files.iter().filter(|(name, _)| name.ends_with(".safetensors")).map(|(_, f)| f.bytes).sum();
    let read = token.map_or(usize::try_from(weight_bytes).unwrap_or(MAX_BUFFER), |t| t.weight_bytes);
    let buffer_bytes = read.clamp(MIN_BUFFER, MAX_BUFFER);
    let small = buffer(buffer_bytes, false)?.context("memory to measure the bandwidth with")?;
    let large = buffer(buffer_bytes, true)?;
    let (mut small_pages, mut large_pages, mut bandwidths, mut decoded) = (vec![], vec![], vec![], vec![]);
    if !asked.context.is_empty() {
        model.prefill(&asked.context)?;
    }
    for beside in &peaks {
        bar.set_message(format!("tokens, {} of {repeat}", bandwidths.len() + 1));
        small_pages.push(1e-9 * kernels.read_bandwidth(&small));
        large_pages.extend(large.as_ref().map(|m| 1e-9 * kernels.read_bandwidth(m)));
        bandwidths.push(large_pages.last().copied().unwrap_or(0.0).max(small_pages[small_pages.len() - 1]));
        if !asked.context.is_empty() {
            let logits = model.again(&asked.context)?;
            // The first of the tokens follows from the logits that are there.
            let time = seconds(|| Ok(_ = model.pipeline()?.continue_greedily(&logits, new_tokens + 1)?))?;
            decoded.push(Sample { seconds: time, peaks: beside.clone() });
        }
    }

    let stats = |values: Vec<f64>| Stats::of(values).context("nothing was measured");
    let times = |samples: &[Sample]| stats(samples.iter().map(|s| s.seconds).collect());
    let of_peak = |kind: Arithmetic| {
        let of = |p: &Vec<(Arithmetic, f64)>| p.iter().find(|(a, _)| *a == kind).map(|(_, peak)| 1e-9 * peak);
        Stats::of(peaks.iter().filter_map(of).collect())
    };
    let encode = |(picture, samples): (&Picture, &Vec<Sample>)| {
        let total = counter.picture(picture)?;
        let (picture, tokens) = (picture.name(), picture.tokens);
        Ok(Encode { picture, tokens, seconds: times(samples)?, arithmetic: arithmetics(total, samples, 1) })
    };
    let prefill = |(ids, samples): (&Vec<i64>, &Vec<Sample>)| {
        let tokens_per_s = stats(samples.iter().map(|s| ids.len() as f64 / s.seconds).collect())?;
        let arithmetic = arithmetics(counter.prefill(ids.len())?, samples, 1);
        Ok(Prefill { tokens: ids.len(), seconds: times(samples)?, tokens_per_s, arithmetic })
    };
    let decode = || {
        let rate = |s: &Sample| new_tokens as f64 / s.seconds;
        let bytes = token.map(|t| t.weight_bytes + t.state_bytes);
        let gb = bytes.map(|b| 1e-9 * b as f64);
        let beside = || decoded.iter().zip(&bandwidths);
        Ok::<_, anyhow::Error>(Decode {
            new_tokens,
            context: asked.context.len(),
            tokens_per_s: stats(decoded.iter().map(rate).collect())?,
            bytes_per_token: bytes.map(|b| b as u64),
            weight_bytes_per_token: token.map(|t| t.weight_bytes as u64),
            kv_bytes_per_token: token.map(|t| t.state_bytes as u64),
            gb_s: gb.and_then(|gb| Stats::of(decoded.iter().map(|s| gb * rate(s)).collect())),
            fraction_of_bandwidth: gb.and_then(|gb| Stats::of(beside().map(|(s, b)| gb * rate(s) / b).collect())),
            bound_tokens_per_s: gb.and_then(|gb| Stats::of(bandwidths.iter().map(|b| b / gb).collect())),
            arithmetic: arithmetics(token, &decoded, new_tokens),
        })
    };
    Ok(Report {
        architecture: manifest.architecture.clone(),
        target: manifest.target.clone(),
        task: match manifest.task {
            Task::Generate(_) => "generate",
            Task::Contrast(_) => "contrast",
            Task::Classify { .. } => "classify",
        },
        repeat,
        load_s: stats(loads)?,
        first_token_s: Stats::of(firsts),
        encode: asked.pictures.iter().zip(&encoded).map(encode).collect::<Result<_>>()?,
        prefill: asked.prompts.iter().zip(&prefilled).map(prefill).collect::<Result<_>>()?,
        decode: if decoded.is_empty() { None } else { Some(decode()?) },
        peak_memory_bytes,
        weight_bytes,
        large_page_bytes,
        profile: None,
        machine: Machine {
            cpu: cpu(),
            threads: kernels.pool().threads(),
            isa: format!("{:?}", kernels.isa()).to_lowercase(),
            buffer_bytes,
            bandwidth_gb_s: stats(bandwidths)?,
            pages_4k_gb_s: stats(small_pages)?,
            pages_2m_gb_s: Stats::of(large_pages),
            peak_gop_s: Peaks { int8: of_peak(Arithmetic::Int8), bf16: of_peak(Arithmetic::Bf16), f32: of_peak(Arithmetic::F32) },
        },
    })
}

/// Runs everything once more, timed step by step.
fn profile_phases(args: &BenchArgs, asked: &Asked) -> Result<Vec<Phase>> {
    let recorder = profile::Recorder::default();
    let open = |artifact: &Artifact| {
        let mut engine = CpuEngine::open(artifact, &args.engine.options())?;
        engine.profile(recorder.profiler());
        Ok(Box::new(engine) as Box<dyn Engine>)
    };
    let (mut model, _) = Ready::open(&args.artifact, open)?;
    let mut phases = vec![];
    for picture in &asked.pictures {
        model.encode(&picture.inputs)?;
        phases.push(recorder.phase(format!("picture {}", picture.name())));
    }
    for ids in &asked.prompts {
        model.prefill(ids)?;
        phases.push(recorder.phase(format!("prompt of {}", ids.len())));
    }
    if !asked.context.is_empty() {
        let logits = model.prefill(&asked.context)?;
        recorder.phase(String::new());
        model.pipeline()?.continue_greedily(&logits, args.new_tokens.get() + 1)?;
        phases.push(recorder.phase(format!("{} tokens after {}", args.new_tokens, asked.context.len())));
    }
    Ok(phases)
}

fn text(r: &Report) -> String {
    let mut out = String::new();
    let m = &r.machine;
    let _ = writeln!(out, "{} for {}, {} thread(s), median of {} (least to most)", r.architecture, r.target, m.threads, r.repeat);
    let _ = writeln!(out, "{}, {}", m.cpu.as_deref().unwrap_or("an unknown CPU"), m.isa);
    let mut line = |what: &str, s: &Stats, unit: &str, note: &str| {
        let range = format!("({} to {})", number(s.min), number(s.max));
        let _ = writeln!(out, "{what:22} {:>8} {unit:6} {range:20} {note}", number(s.median));
    };
    line("reads, 4 KiB pages", &m.pages_4k_gb_s, "GB/s", "");
    if let Some(s) = &m.pages_2m_gb_s {
        line("reads, 2 MiB pages", s, "GB/s", "");
    }
    for (name, peak) in [("int8", &m.peak_gop_s.int8), ("bf16", &m.peak_gop_s.bf16), ("f32", &m.peak_gop_s.f32)] {
        if let Some(s) = peak {
            line(&format!("peak, {name}"), s, "GOP/s", "");
        }
    }
    line("load", &r.load_s, "s", "");
    if let Some(s) = &r.first_token_s {
        line("start to first token", s, "s", &r.prefill.first().map_or(String::new(), |p| format!("after {} tokens", p.tokens)));
    }
    let of_peak = |a: &Arithmetics| match (a.gop_s, a.fraction_of_peak) {
        (Some(rate), Some(share)) => format!("{} GOP/s, {:.0} % of peak", number(rate.median), 100.0 * share.median),
        _ => String::new(),
    };
    for e in &r.encode {
        line(&format!("picture {}", e.picture), &e.seconds, "s", &of_peak(&e.arithmetic));
    }
    for p in &r.prefill {
        line(&format!("prompt of {}", p.tokens), &p.tokens_per_s, "tok/s", &of_peak(&p.arithmetic));
    }
    if let Some(d) = &r.decode {
        let note = match (d.bytes_per_token, d.fraction_of_bandwidth, d.bound_tokens_per_s) {
            (Some(b), Some(share), Some(bound)) => {
                format!("{} a token, {:.0} % of the bandwidth (bound {})", bytes(b), 100.0 * share.median, number(bound.median))
            }
            _ => String::new(),
        };
        line(&format!("{} tokens after {}", d.new_tokens, d.context), &d.tokens_per_s, "tok/s", &note);
    }
    if let Some(peak) = r.peak_memory_bytes {
        let _ = writeln!(out, "{:22} {:>8}", "peak memory", bytes(peak));
    }
    let large = match r.large_page_bytes {
        0 => String::new(),
        large => format!(", {} of them in 2 MiB pages", bytes(large as u64)),
    };
    let _ = writeln!(out, "{:22} {:>8}{large}", "weights", bytes(r.weight_bytes));
    if r.task != "generate" {
        let _ = writeln!(out, "The model answers no prompts: a picture is a whole run of it.");
    }
    for table in r.profile.iter().flatten() {
        let _ = write!(out, "\n{table}");
    }
    out
}

/// Three digits.
fn number(v: f64) -> String {
    match v.abs() {
        a if a >= 100.0 => format!("{v:.0}"),
        a if a >= 10.0 => format!("{v:.1}"),
        a if a >= 1.0 => format!("{v:.2}"),
        _ => format!("{v:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_lie_in_the_middle() {
        let of = |v: &[f64]| Stats::of(v.to_vec()).map(|s| [s.min, s.median, s.max]);
        assert_eq!(of(&[3.0, 1.0, 2.0]), Some([1.0, 2.0, 3.0]));
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]), Some([1.0, 2.5, 4.0]));
        assert_eq!(of(&[]), None);
    }

    #[test]
    fn a_mixture_takes_the_sum_of_its_parts_at_their_peaks() {
        let total = Total { int8: 800, f32: 100, ..Total::default() };
        assert_eq!(total.seconds(&[(Arithmetic::Int8, 400.0), (Arithmetic::F32, 50.0)]), Some(4.0));
        assert_eq!(total.seconds(&[(Arithmetic::Int8, 400.0)]), None, "a peak is missing");
    }
}
