//! `vlmc run`.

use super::{EngineArgs, TargetArgs, checkpoint_dir, compile_to, is_artifact, print, print_json, warn};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::{
    io::{BufRead, IsTerminal, Write},
    path::{Path, PathBuf},
};
use vlmc::compile;
use vlmc_runtime::{
    Artifact, Conversation, GenerateOptions, Loaded, Model, Part, Reply,
    artifact::{Manifest, Task},
    boxes, cache_dir, image,
};

#[derive(Args)]
pub(super) struct RunArgs {
    /// Artifact, checkpoint directory, Hugging Face id or alias
    model: String,
    /// Picture (PNG, JPEG, WebP, GIF) to ask about, to label or to compare; may be repeated
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// Video to ask about: a directory of frames, or an animated GIF; may be repeated
    #[arg(long, value_name = "PATH")]
    video: Vec<PathBuf>,
    /// What to ask
    #[arg(long, value_name = "TEXT", conflicts_with = "text")]
    prompt: Option<String>,
    /// Text to compare with the pictures; may be repeated
    #[arg(long, value_name = "TEXT", conflicts_with = "chat")]
    text: Vec<String>,
    /// Several turns: one line of standard input is one question
    #[arg(long)]
    chat: bool,
    /// Instructions in place of the template's own
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_new_tokens: usize,
    /// Randomness; 0 takes the most probable token [default: the model's]
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Choose among the K most probable tokens; 0 for all [default: the model's]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the tokens that make up this share of probability [default: the model's]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Above 1, tokens that were there before become less probable [default: the model's]
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,
    /// The same seed gives the same answer
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Text that ends an answer; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Run several tokens at once where an answer repeats what was there before; the answer is the same. Needs --temperature 0
    /// where the model's default is more
    #[arg(long)]
    prompt_lookup: bool,
    /// Directory that keeps what the model makes of pictures, so that no picture is run through it twice
    #[arg(long, value_name = "DIR")]
    image_cache: Option<PathBuf>,
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Print the answer and its timings, or all numbers, as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &RunArgs) -> Result<()> {
    let dir = artifact(&args.model, &args.target)?;
    let manifest = Artifact::open(&dir)?.manifest().clone();
    check_arguments(args, &manifest)?;
    if manifest.task.prompt().is_none() {
        return without_prompt(args, &dir);
    }
    // Pictures first: a bad one should not cost the time to load a model.
    let mut parts = vec![];
    for path in &args.image {
        parts.push(Part::Image(image::read(path)?));
    }
    for path in &args.video {
        parts.push(Part::Video(image::read_video(path)?));
    }
    let mut model = Model::open(&dir, &args.engine.options())?;
    if let Some(dir) = &args.image_cache {
        model.cache_images_in(dir)?;
    }
    let options = options(args, model.defaults());
    let mut conversation = model.conversation(args.system.as_deref())?;
    if let Some(prompt) = &args.prompt {
        parts.push(Part::Text(prompt.clone()));
        answer(&mut conversation, &parts, &options, args.json)?;
        parts.clear();
    }
    if !args.chat {
        return Ok(());
    }
    let stdin = std::io::stdin();
    let ask = |first: bool| {
        if stdin.is_terminal() {
            let hint = if first { "(an empty line or Ctrl-D ends the chat)\n> " } else { "> " };
            let _ = write!(std::io::stderr(), "{hint}").and_then(|()| std::io::stderr().flush());
        }
    };
    ask(true);
    for line in stdin.lock().lines() {
        let line = line.context("standard input")?;
        if line.trim().is_empty() {
            break;
        }
        parts.push(Part::Text(line));
        match answer(&mut conversation, &parts, &options, args.json) {
            Ok(()) => parts.clear(),
            // At a terminal the chat goes on, with the pictures for the next question.
            Err(e) if stdin.is_terminal() => {
                parts.pop();
                warn(&format!("{e:#}"));
            }
            Err(e) => return Err(e),
        }
        ask(false);
    }
    Ok(())
}

/// What is given must be what a model of this kind takes.
fn check_arguments(args: &RunArgs, manifest: &Manifest) -> Result<()> {
    let asks = args.prompt.is_some() || args.chat;
    let (needs, given, foreign) = match manifest.task {
        Task::Generate(_) => ("--prompt or --chat", asks, !args.text.is_empty()),
        Task::Contrast(_) => {
            ("--image and --text", !args.image.is_empty() && !args.text.is_empty(), asks || args.system.is_some() || !args.video.is_empty())
        }
        Task::Classify { .. } => {
            ("--image only", !args.image.is_empty(), asks || args.system.is_some() || !args.video.is_empty() || !args.text.is_empty())
        }
    };
    if foreign || !given {
        bail!("the model (of type {}) {}: it needs {needs}", manifest.architecture, manifest.task.purpose());
    }
    Ok(())
}

/// Labels of a picture that are shown.
const TOP: usize = 5;

/// Labels, or how well texts go with pictures.
fn without_prompt(args: &RunArgs, dir: &Path) -> Result<()> {
    let pictures = args.image.iter().map(|path| image::read(path)).collect::<vlmc_runtime::Result<Vec<_>>>()?;
    let mut reports = vec![];
    let mut text = String::new();
    let mut picture = |path: &Path, key: &str, rows: Vec<(String, f32)>, details: Vec<serde_json::Value>| {
        if args.image.len() > 1 {
            text += &format!("{}\n", path.display());
        }
        text.extend(rows.iter().map(|(what, probability)| format!("{:6.2} %  {what}\n", probability * 100.0)));
        reports.push(serde_json::json!({"image": path, key: details}));
    };
    match Loaded::open(dir, &args.engine.options())? {
        Loaded::Answers(_) => bail!("the artifact has changed while it was opened"),
        Loaded::Labels(mut model) => {
            for (path, labels) in args.image.iter().zip(model.classify(&pictures, TOP)?) {
                let details = labels.iter().map(|l| serde_json::json!(l)).collect();
                picture(path, "labels", labels.into_iter().map(|l| (l.label, l.probability)).collect(), details);
            }
        }
        Loaded::Pairs(mut model) => {
            let (images, texts) = (model.embed_images(&pictures)?, model.embed_texts(&args.text)?);
            let scores = model.score(&images, &texts)?;
            for (path, scores) in args.image.iter().zip(scores.f32()?.chunks(args.text.len())) {
                let rows: Vec<(String, f32)> = args.text.iter().cloned().zip(model.probabilities(scores)).collect();
                let detail = |((text, probability), logit): (&(String, f32), &f32)| serde_json::json!({"text": text, "probability": probability, "logit": logit});
                let details = rows.iter().zip(scores).map(detail).collect();
                picture(path, "texts", rows, details);
            }
        }
    }
    if args.json { print_json(&reports) } else { print(&text) }
}

fn options(args: &RunArgs, defaults: GenerateOptions) -> GenerateOptions {
    let mut o =
        GenerateOptions { max_new_tokens: args.max_new_tokens, stop: args.stop.clone(), prompt_lookup: args.prompt_lookup, ..defaults };
    let s = &mut o.sampling;
    // Asking for randomness turns sampling on; temperature 0 turns it off.
    s.do_sample = args.temperature.map_or(s.do_sample || args.top_k.is_some() || args.top_p.is_some(), |t| t > 0.0);
    if let Some(t) = args.temperature.filter(|t| *t > 0.0) {
        s.temperature = t;
    }
    s.top_k = args.top_k.unwrap_or(s.top_k);
    s.top_p = args.top_p.unwrap_or(s.top_p);
    s.repetition_penalty = args.repetition_penalty.unwrap_or(s.repetition_penalty);
    s.seed = args.seed;
    o
}

fn answer(conversation: &mut Conversation<'_>, parts: &[Part], options: &GenerateOptions, json: bool) -> Result<()> {
    let mut failed = None;
    let reply = conversation.send(parts, options, &mut |text| {
        if !json && failed.is_none() {
            failed = std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush()).err();
        }
    })?;
    if let Some(e) = failed {
        return Err(e.into());
    }
    if json { print_json(&report(&reply, &conversation.regions(&reply)?)) } else { print("\n") }
}

fn report(r: &Reply, regions: &[boxes::Region]) -> serde_json::Value {
    let decoded = r.ids.len().saturating_sub(1) as f64;
    let mut report = serde_json::json!({
        "text": r.text,
        "finish": r.finish,
        "prompt_tokens": r.prompt_tokens,
        "cached_tokens": r.cached_tokens,
        "images_encoded": r.images_encoded,
        "generated_tokens": r.ids.len(),
        "first_token_seconds": r.first_token.as_secs_f64(),
        "decode_tokens_per_second": if decoded > 0.0 { Some(decoded / r.decoding.as_secs_f64()) } else { None },
    });
    if let Some(lookup) = &r.lookup {
        report["prompt_lookup"] = serde_json::json!({
            "passes": lookup.passes,
            "proposed": lookup.proposed,
            "accepted": lookup.accepted,
            "acceptance": lookup.acceptance(),
            "tokens_per_pass": lookup.tokens_per_pass(),
        });
    }
    if !regions.is_empty() {
        report["regions"] = serde_json::json!(regions);
    }
    report
}

/// The artifact of a model: itself, or made from a checkpoint and kept in a cache.
pub(super) fn artifact(model: &str, args: &TargetArgs) -> Result<PathBuf> {
    let (policy, target) = (args.policy()?, args.target()?);
    let given = Path::new(model);
    if is_artifact(given) {
        return Ok(given.into());
    }
    let dir = checkpoint_dir(model)?;
    if is_artifact(&dir) {
        return Ok(dir);
    }
    let model = compile::Model::open(&dir)?;
    let mut name = format!("{}-{}", model.fingerprint(&policy)?, target.name);
    if let Some(opset) = target.opset {
        name += &format!("-{}-{opset}", target.float);
    }
    let out = cache_dir()?.join("artifacts").join(name);
    // An artifact that another version made, or that is damaged, is made again.
    let usable = Artifact::open(&out).is_ok_and(|a| a.manifest().compiler == compile::COMPILER);
    if !usable {
        compile_to(&model, &target, &policy, &out, false)?;
    }
    Ok(out)
}
