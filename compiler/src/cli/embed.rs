//! `vlmc embed`.

use super::{EngineArgs, TargetArgs, print, print_json, run};
use anyhow::{Context, Result, bail};
use clap::{ArgGroup, Args};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use std::{
    fs,
    io::IsTerminal,
    num::NonZero,
    path::{Path, PathBuf},
};
use vlmc::vectors;
use vlmc_runtime::{Loaded, Tensor, artifact::Task, image};

#[derive(Args)]
#[command(group = ArgGroup::new("what").required(true))]
pub(super) struct EmbedArgs {
    /// Artifact, checkpoint directory, Hugging Face id or alias
    model: String,
    /// Pictures, and directories of pictures (PNG, JPEG, WebP, GIF; not of those below them), in the order of their names
    #[arg(long, value_name = "PATH", num_args = 1.., group = "what")]
    images: Vec<PathBuf>,
    /// Texts; may be repeated
    #[arg(long, value_name = "TEXT", num_args = 1.., group = "what")]
    text: Vec<String>,
    /// File to write: .npy, or .safetensors, which also says what each vector is of
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Pictures or texts that are run at once
    #[arg(long, value_name = "N", default_value = "8")]
    batch: NonZero<usize>,
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Print what was written as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn embed(args: &EmbedArgs) -> Result<()> {
    vectors::check_name(&args.out)?;
    let files = files(&args.images)?;
    let dir = run::artifact(&args.model, &args.target)?;
    let mut model = Loaded::open(&dir, &args.engine.options())?;
    let names: Vec<String> = if args.text.is_empty() { files.iter().map(|f| f.display().to_string()).collect() } else { args.text.clone() };
    let bar = count_bar("embedding", names.len());
    let mut made: Vec<f32> = vec![];
    for start in (0..names.len()).step_by(args.batch.get()) {
        let range = start..names.len().min(start + args.batch.get());
        let rows = if args.text.is_empty() {
            of_images(&mut model, &files[range.clone()])?
        } else {
            of_texts(&mut model, &args.text[range.clone()])?
        };
        made.extend_from_slice(rows.f32()?);
        bar.inc(range.len() as u64);
    }
    bar.finish_and_clear();
    let width = made.len() / names.len();
    let name = if args.text.is_empty() { "image_embeds" } else { "text_embeds" };
    vectors::write(&args.out, name, &made, width, &names)?;
    if args.json {
        return print_json(&serde_json::json!({"out": args.out, "count": names.len(), "width": width, "names": names}));
    }
    print(&format!("{}: {} vectors of {width}\n", args.out.display(), names.len()))
}

fn of_images(model: &mut Loaded, files: &[PathBuf]) -> Result<Tensor> {
    let pictures = files.par_iter().map(|f| image::read(f)).collect::<vlmc_runtime::Result<Vec<_>>>()?;
    Ok(match model {
        Loaded::Pairs(m) => m.embed_images(&pictures)?,
        Loaded::Labels(m) => m.embed_images(&pictures)?,
        Loaded::Answers(m) => bail!("{}", makes_none(&m.manifest().architecture, &m.manifest().task, "vectors")),
    })
}

fn of_texts(model: &mut Loaded, texts: &[String]) -> Result<Tensor> {
    Ok(match model {
        Loaded::Pairs(m) => m.embed_texts(texts)?,
        Loaded::Labels(m) => bail!("{}", makes_none(&m.manifest().architecture, &m.manifest().task, "vectors of texts")),
        Loaded::Answers(m) => bail!("{}", makes_none(&m.manifest().architecture, &m.manifest().task, "vectors")),
    })
}

fn makes_none(architecture: &str, task: &Task, what: &str) -> String {
    format!("the model (of type {architecture}) {}; it makes no {what}", task.purpose())
}

/// The pictures of a list of files and directories.
fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let entries = fs::read_dir(path).and_then(|d| d.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>());
        let mut found: Vec<PathBuf> = entries.with_context(|| path.display().to_string())?.into_iter().filter(|f| is_picture(f)).collect();
        if found.is_empty() {
            bail!("{}: has no pictures (.png, .jpg, .jpeg, .webp, .gif)", path.display());
        }
        found.sort();
        files.extend(found);
    }
    Ok(files)
}

fn is_picture(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    path.is_file() && extension.is_some_and(|e| ["png", "jpg", "jpeg", "webp", "gif"].contains(&e.as_str()))
}

/// A bar of things done on the terminal; nothing elsewhere.
fn count_bar(what: &'static str, count: usize) -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(count as u64) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{msg:12} {wide_bar} {pos}/{len} {per_sec} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what);
    bar
}
