//! `vlmc`: arguments, progress bars and what is printed. The work is done by the library.

mod bench;
mod embed;
mod eval;
mod inspect;
mod profile;
mod ranges;
mod run;
mod verify;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::{IsTerminal, Write},
    num::NonZero,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};
use vlmc::{
    arch::ARCHITECTURES,
    back::onnx,
    calibrate::{self, Budgeted, Report, chosen},
    compile, hub, layout, samples, synth, target,
};
use vlmc_ir::DType;
use vlmc_passes::{
    Target, Trace,
    quantize::{Part, Policy},
};
use vlmc_runtime::{Artifact, EngineOptions, Provider, artifact::MANIFEST, open_engine};

/// Compiles vision-language models ahead of time: from a Hugging Face checkpoint to ONNX graphs or to an artifact for vlmc's
/// own CPU runtime. No Python is needed, neither to compile nor to run.
///
/// Try:  vlmc run fixtures/shapes-vl --image fixtures/shapes-vl/example.png --prompt "How many circles are there?"
#[derive(Parser)]
#[command(name = "vlmc", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compile a checkpoint to an artifact
    ///
    /// MODEL is a checkpoint directory (config.json and safetensors), a Hugging Face id such as Qwen/Qwen2-VL-2B-Instruct, or
    /// an alias such as qwen2-vl. Ids and aliases are looked for in the local Hugging Face cache, then downloaded.
    Compile(CompileArgs),
    /// Ask a model about pictures
    ///
    /// MODEL is an artifact, or anything that `compile` takes: a checkpoint is compiled into a cache first. A model that answers
    /// prompts needs --prompt or --chat. A classifier (ViT) gives the most probable labels of each --image. A model of pairs
    /// (CLIP, SigLIP) says how well each --text goes with each --image.
    Run(run::RunArgs),
    /// Make vectors of pictures or texts, for search
    ///
    /// MODEL is as for `run`: a model of pairs (CLIP, SigLIP) or, for pictures only, a classifier (ViT).
    Embed(embed::EmbedArgs),
    /// Run an artifact on tensors
    ///
    /// Tensors are named as in the Hugging Face forward signature: input_ids, attention_mask, pixel_values, image_grid_thw,
    /// pixel_values_videos, video_grid_thw, position_ids. Writes logits, image_features and, with --max-new-tokens,
    /// generated_ids (greedy, end-of-text ignored).
    Exec(ExecArgs),
    /// Compare an artifact with its checkpoint, layer by layer
    ///
    /// Runs the artifact and, in plain f32, the program of the checkpoint; compares each layer's result with what the checkpoint's
    /// weights make of the same operands, and the outputs. Names the first layer that is wrong, and then exits with 1. The
    /// result goes into the artifact's manifest. Without --image, --prompt and --data, on a made-up picture and text.
    Verify(verify::VerifyArgs),
    /// Measure what quantization costs on your data
    ///
    /// Asks an artifact and a reference (the same model without quantization) about pictures; says how many answers are the same,
    /// how many are right if the data knows, and how far the probabilities of tokens diverge.
    Eval(eval::EvalArgs),
    /// Measure how fast an artifact runs on this machine, and how fast it could
    ///
    /// Loads it, encodes made-up pictures, prefills made-up prompts and decodes tokens, and measures beside that what this machine
    /// reads from memory and computes at most.
    Bench(bench::BenchArgs),
    /// Find out where a model would leave the range of f16
    ///
    /// Interprets the checkpoint on samples, names what has to stay in f32 on targets that compute in f16, and compares the
    /// outputs with and without that.
    Ranges(ranges::RangesArgs),
    /// Show what a checkpoint or an artifact holds
    Inspect(inspect::InspectArgs),
    /// Print the graphs of a checkpoint or an artifact
    Dump(inspect::DumpArgs),
    /// List the architectures that can be compiled
    Archs(ListArgs),
    /// List the targets to compile for
    Targets(ListArgs),
    /// Write a checkpoint of a published size with random weights
    ///
    /// For benchmarks and capacity planning without a download. The checkpoint has the layout of the real one.
    Synth(SynthArgs),
}

/// Types of a KV cache.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Kv {
    F32,
    Bf16,
    Int8,
}

impl From<Kv> for DType {
    fn from(kv: Kv) -> Self {
        match kv {
            Kv::F32 => Self::F32,
            Kv::Bf16 => Self::BF16,
            Kv::Int8 => Self::I8,
        }
    }
}

/// The policy that is made for a budget.
const AUTO: &str = "auto";

#[derive(Args)]
struct CompileArgs {
    /// Checkpoint directory, Hugging Face id or alias
    model: String,
    #[command(flatten)]
    target: TargetArgs,
    /// Client that the artifact is for: plain, genai, transformers-js or triton
    ///
    /// plain: vlmc itself, and callers of ONNX Runtime. genai: onnxruntime-genai. transformers-js: transformers.js in Node and browsers.
    /// triton: a model repository of Triton Inference Server. All but plain need a target of ONNX; what they support is in
    /// docs/clients.md.
    #[arg(long, value_name = "NAME", default_value = "plain")]
    layout: String,
    /// Directory of the artifact [default: MODEL's name and the target, in the current directory]
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Directory of LoRA adapters (PEFT) to merge into the weights
    #[arg(long, value_name = "DIR")]
    lora: Option<PathBuf>,
    /// Pictures and prompts to find codes of 3 and 4 bits for (GPTQ): a directory of files a.png and a.txt, or a list (.jsonl) of {"image": ...,
    /// "prompt": ..., "answer": ...}. A few dozen that are like what the model will be asked will do; answers help.
    #[arg(long, value_name = "PATH")]
    calibrate: Option<PathBuf>,
    /// With --quant auto, bits per weight of linear layers and experts, scales counted: 4.5 or 4.5bpw
    ///
    /// Each gets 4 bits with a scale per 128 or per 32 columns, or 8 bits (a decoder's also 3 bits, target cpu only), by how much the
    /// error of its output (with --calibrate), or of its weights, falls per bit.
    #[arg(long, value_name = "BITS", value_parser = bits_per_weight)]
    budget: Option<f64>,
    /// Add the contrastive losses as entries, for pairs of towers (CLIP, SigLIP)
    #[arg(long)]
    with_loss: bool,
    /// Compile even if the target's execution provider has no kernel for a node
    ///
    /// Such nodes are told of. They run on another provider (the CPU, for a GPU), with copies before and after.
    #[arg(long)]
    allow_fallback: bool,
    /// Print what each pass did: where rules fired and where they did not, and why
    #[arg(long, conflicts_with = "json")]
    trace_passes: bool,
    /// Check that no pass changes what the model computes
    ///
    /// Runs the program before and after each pass in the reference interpreter, with the checkpoint's weights and inputs that
    /// are drawn. For small models: it takes at most 256 MiB of weights as f32.
    #[arg(long)]
    check_passes: bool,
    /// How the runtime keeps keys and values of earlier tokens (target cpu only)
    ///
    /// int8: 8 bits with a scale per head and token, about a quarter of the memory. bf16: half of it.
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    kv: Kv,
    /// Threads to compile with [default: as many cores as this process may use]; the artifact does not depend on it
    #[arg(long)]
    threads: Option<NonZero<usize>>,
    /// Print a report as JSON
    #[arg(long)]
    json: bool,
}

fn bits_per_weight(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix("bpw").unwrap_or(text).trim().parse::<f64>().ok();
    number.filter(|b| b.is_finite() && *b > 0.0).ok_or_else(|| "must be a number of bits, such as 4.5 or 4.5bpw".into())
}

#[derive(Args)]
struct TargetArgs {
    /// What to compile for; see `vlmc targets`
    #[arg(long, default_value = "cpu")]
    target: String,
    /// Quantization of the weights: none, int8, int4, auto (by --budget, only to compile), or a file of rules
    ///
    /// int8: 8 bits with a scale per row, and activations rounded to 8 bits. int4: a decoder in 4 bits with a scale per 128
    /// columns, head and table of tokens per 32; towers as int8. Norms, biases, positions, convolutions, routers and what reads
    /// the request's pixels stay as they are. A file in TOML names weights by patterns: see the README.
    #[arg(long, default_value = "none", value_name = "POLICY")]
    quant: String,
    /// What ONNX graphs for GPUs compute in [default: f16]
    ///
    /// Norms, softmax and sums are in f32 within their kernels whatever this says, and so are rotary angles, routing, and the inputs
    /// and outputs of graphs. Some towers leave the range of f16 (see `vlmc ranges`): bf16 has that of f32.
    #[arg(long, value_name = "TYPE")]
    dtype: Option<Float>,
    /// Version of the ONNX operators, 17 to 23 (target onnx-tensorrt only) [default: 23]
    ///
    /// Before 23 there is no attention: it is written in products and a softmax.
    #[arg(long, value_name = "N")]
    opset: Option<i64>,
}

/// Types that graphs may compute in.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Float {
    F16,
    Bf16,
    F32,
}

impl From<Float> for DType {
    fn from(float: Float) -> Self {
        match float {
            Float::F16 => Self::F16,
            Float::Bf16 => Self::BF16,
            Float::F32 => Self::F32,
        }
    }
}

impl TargetArgs {
    /// The target as the options configure it.
    fn target(&self) -> Result<Target> {
        Ok(target::configured(&self.target, self.dtype.map(Into::into), self.opset)?)
    }

    /// The policy; an error if there is no such target either.
    fn policy(&self) -> Result<Policy> {
        self.target()?;
        let path = Path::new(&self.quant);
        if path.extension().is_some_and(|e| e == "toml") {
            let text = std::fs::read_to_string(path).with_context(|| format!("--quant {}", self.quant))?;
            return Policy::parse(&text).with_context(|| format!("--quant {}", self.quant));
        }
        if self.quant == AUTO {
            bail!("--quant auto is for `vlmc compile`, with --budget");
        }
        Policy::named(&self.quant).context("--quant (a file of rules ends in .toml)")
    }
}

#[derive(Args)]
struct EngineArgs {
    /// Threads to run with [default: as many cores as this process may use]
    #[arg(long)]
    threads: Option<NonZero<usize>>,
    /// What computes the graphs of an ONNX artifact: cpu, cuda or tensorrt [default: what its target is for]
    ///
    /// cuda and tensorrt need ONNX Runtime for GPUs (ORT_DYLIB_PATH names its library) and take the first GPU of CUDA_VISIBLE_DEVICES.
    /// cpu runs any artifact whose nodes have kernels there: those in f16 do, with f32 in between; those in bf16 do not.
    #[arg(long, value_name = "NAME", value_parser = provider)]
    provider: Option<Provider>,
    /// Directory that keeps the engines that TensorRT builds, which takes minutes [default: tensorrt in VLMC_CACHE or ~/.cache/vlmc]
    #[arg(long, value_name = "DIR")]
    engine_cache: Option<PathBuf>,
    /// Leave the weights of a cpu artifact in the file's memory, which other processes that run it share
    ///
    /// Otherwise they are copied to pages of 2 MiB if a measurement says that this makes tokens so much faster that it pays soon.
    #[arg(long)]
    no_large_pages: bool,
}

impl EngineArgs {
    fn options(&self) -> EngineOptions {
        let progress = |text: &str| drop(writeln!(std::io::stderr(), "{text}"));
        EngineOptions {
            threads: self.threads,
            provider: self.provider,
            engine_cache: self.engine_cache.clone(),
            large_pages: !self.no_large_pages,
            progress,
        }
    }
}

fn provider(name: &str) -> Result<Provider, String> {
    let names = Provider::ALL.map(Provider::name).join(", ");
    Provider::ALL.into_iter().find(|p| p.name() == name).ok_or_else(|| format!("must be one of {names}"))
}

#[derive(Args)]
struct ExecArgs {
    /// Artifact directory
    artifact: PathBuf,
    /// Safetensors file with the inputs
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
    /// Safetensors file to write
    #[arg(long, value_name = "FILE")]
    outputs: PathBuf,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_new_tokens: usize,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Args)]
struct ListArgs {
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct SynthArgs {
    /// Preset, e.g. qwen2-vl-2b
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(synth::presets()))]
    preset: String,
    /// Directory to write
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Another seed gives other weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Leave the weights out: `vlmc inspect DIR/config.json` and `vlmc dump DIR/config.json` need none
    #[arg(long)]
    config_only: bool,
}

/// Runs the command line.
pub(crate) fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Compile(args) => compile_command(&args),
        Command::Run(args) => run::run(&args),
        Command::Embed(args) => embed::embed(&args),
        Command::Exec(args) => exec(&args),
        Command::Verify(args) => verify::verify(&args),
        Command::Eval(args) => eval::eval(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Ranges(args) => ranges::ranges(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Dump(args) => inspect::dump(&args),
        Command::Archs(args) => archs(args.json),
        Command::Targets(args) => targets(args.json),
        Command::Synth(args) => synth_command(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough is no failure.
        Err(e) if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn print(text: &str) -> Result<()> {
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// A spinner on the terminal; nothing elsewhere.
fn spinner() -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn print_json(value: &impl serde::Serialize) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

fn warn(text: &str) {
    let _ = writeln!(std::io::stderr(), "warning: {text}");
}

/// A bar of bytes on the terminal; nothing elsewhere.
fn bytes_bar(what: &str) -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{msg:24} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what.to_string());
    bar
}

/// Directory of a checkpoint: found, or downloaded.
fn checkpoint_dir(model: &str) -> Result<PathBuf> {
    let bar = bytes_bar("downloading");
    let dir = hub::resolve(model, &|name, done, total| {
        bar.set_message(name.to_string());
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Ok(dir?)
}

fn compile_to(model: &compile::Model, target: &Target, policy: &Policy, out: &Path, allow_fallback: bool) -> Result<compile::Report> {
    let bar = bytes_bar("writing weights");
    let report = model.compile(&compile::Options {
        target,
        policy,
        out,
        allow_fallback,
        progress: &|done, total| {
            bar.set_length(total);
            bar.set_position(done);
        },
    });
    bar.finish_and_clear();
    let report = report?;
    report.warnings.iter().for_each(|w| warn(w));
    Ok(report)
}

/// The model and the policy to compile it with, after calibration and the choice of schemes, if these are asked for.
fn quantized(args: &CompileArgs, model: compile::Model) -> Result<(compile::Model, Policy)> {
    let target = &args.target.target()?;
    let data = args.calibrate.as_ref();
    let requests = |d: &PathBuf| calibrate::requests(&model, &samples::read(d, None)?);
    let requests = data.map(|d| requests(d).with_context(|| format!("--calibrate {}", d.display()))).transpose()?;
    let bar = spinner();
    let progress = |weight: &str| bar.set_message(format!("quantizing {weight}"));
    if args.target.quant == AUTO {
        let budget = args.budget.context("--quant auto needs --budget")?;
        let Budgeted { model, policy, bits_per_weight, report } =
            model.within_budget(target, budget, requests.as_deref().unwrap_or_default(), &progress)?;
        bar.finish_and_clear();
        if !args.json {
            print(&budget_text(&policy, bits_per_weight, &report))?;
        }
        return Ok((model, policy));
    }
    if args.budget.is_some() {
        bail!("--budget goes with --quant auto");
    }
    let policy = args.target.policy()?;
    let Some(requests) = requests else { return Ok((model, policy)) };
    let (model, report) = model.calibrate(target, &chosen(&policy), &requests, &progress)?;
    bar.finish_and_clear();
    if report.is_empty() && !target.static_activations {
        bail!("--calibrate finds codes of fewer than 8 bits, but --quant {} has none for this model and target", args.target.quant);
    }
    Ok((model, policy))
}

/// Which weights keep 8 bits, and their errors with fewer.
fn budget_text(policy: &Policy, bits: f64, report: &Report) -> String {
    let scheme = |name: &String| policy.choice(name, Part::Decoder).map(|c| c.scheme);
    let eight: Vec<_> = report.iter().filter(|(name, _)| scheme(name).is_some_and(|s| s.bits == 8)).collect();
    let mut out = format!("{bits:.3} bits per weight; {} of {} weights keep 8 bits\n", eight.len(), report.len());
    for (name, measured) in eight {
        let errors: Vec<String> = measured.iter().map(|m| format!("{} {:.4}", m.scheme, m.error)).collect();
        out += &format!("  {name}: relative error {}\n", errors.join(", "));
    }
    out
}

fn compile_command(args: &CompileArgs) -> Result<()> {
    let target = args.target.target()?;
    let layout = layout::named(&args.layout)?;
    if args.target.quant != AUTO {
        args.target.policy()?;
    }
    let dir = checkpoint_dir(&args.model)?;
    let model = match &args.lora {
        Some(lora) => compile::Model::open_with_lora(&dir, lora)?,
        None => compile::Model::open(&dir)?,
    };
    let model = if args.with_loss { model.with_loss() } else { model }.with_kv(args.kv.into());
    let name = args.model.trim_end_matches('/').rsplit('/').next().unwrap_or("model");
    let suffix = if layout.is_plain() { &args.target.target } else { &args.layout };
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from(format!("{name}-{suffix}")));
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build_global().context("--threads")?;
    }
    let (model, policy) = quantized(args, model)?;
    if args.check_passes {
        let checked = model.check_passes(&target, &policy)?;
        if !args.json {
            print(&checked.iter().map(|c| format!("{c}\n")).collect::<String>())?;
        }
    }
    let report = compile_to(&model.with_layout(layout), &target, &policy, &out, args.allow_fallback)?;
    if args.trace_passes {
        print(&report.passes.iter().map(Trace::to_string).collect::<String>())?;
    }
    if args.json {
        return print_json(&report);
    }
    print(&format!(
        "{}: {} for {}, {} parameters, {} of weights\n",
        report.out.display(),
        report.architecture,
        report.target,
        inspect::count(report.parameters),
        inspect::bytes(report.weight_bytes)
    ))
}

fn exec(args: &ExecArgs) -> Result<()> {
    let artifact = Artifact::open(&args.artifact)?;
    let engine = open_engine(&artifact, &args.engine.options())?;
    let warnings = vlmc::exec::exec(engine, &args.inputs, &args.outputs, args.max_new_tokens)?;
    warnings.iter().for_each(|w| warn(w));
    Ok(())
}

fn archs(json: bool) -> Result<()> {
    if json {
        let all: Vec<_> = ARCHITECTURES
            .iter()
            .map(|a| serde_json::json!({"model_types": a.model_types, "title": a.title, "reference": a.reference}))
            .collect();
        return print_json(&all);
    }
    print(&ARCHITECTURES.iter().map(|a| format!("{:28} {:18} {}\n", a.model_types.join(", "), a.title, a.reference)).collect::<String>())
}

fn targets(json: bool) -> Result<()> {
    if json {
        let all: Vec<_> = target::TARGETS.iter().map(|t| serde_json::json!({"name": t.name, "summary": t.summary})).collect();
        return print_json(&all);
    }
    print(&target::TARGETS.iter().map(|t| format!("{:14} {}\n", t.name, t.summary)).collect::<String>())
}

fn synth_command(args: &SynthArgs) -> Result<()> {
    let bar = bytes_bar("writing weights");
    let result = synth::synth(&args.preset, &args.out, (!args.config_only).then_some(args.seed), &|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    result?;
    let weights = if args.config_only { "without weights" } else { "with random weights" };
    print(&format!("{}: {} {weights}\n", args.out.display(), args.preset))
}

/// Whether a directory holds an artifact rather than a checkpoint.
fn is_artifact(dir: &Path) -> bool {
    dir.join(MANIFEST).is_file()
}

fn read_onnx(path: &Path) -> Result<String> {
    Ok(onnx::to_text(&onnx::read(path)?))
}
