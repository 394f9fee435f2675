//! `vlmc verify`.

use super::{EngineArgs, checkpoint_dir, inspect, print, print_json, spinner};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::{
    fmt::Write,
    num::NonZero,
    path::{Path, PathBuf},
};
use vlmc::{
    artifact_dir::certify,
    compile::Model,
    samples::{self, Sample},
    verify::{self, Node, Options, Report, Request},
};
use vlmc_runtime::{Artifact, artifact::Manifest, prepare::Preparer};

#[derive(Args)]
pub(super) struct VerifyArgs {
    /// Artifact directory
    artifact: PathBuf,
    /// The checkpoint that it was compiled from: a directory, Hugging Face id or alias
    #[arg(long, value_name = "MODEL")]
    checkpoint: String,
    /// Directory of the LoRA adapters that were merged into it
    #[arg(long, value_name = "DIR")]
    lora: Option<PathBuf>,
    /// Picture to run on
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    image: Option<PathBuf>,
    /// Prompt to run on; of a model of pairs, the text
    #[arg(long, value_name = "TEXT", conflicts_with = "data")]
    prompt: Option<String>,
    /// Pictures and prompts to run on: a directory of files a.png and a.txt, or a list (.jsonl) of {"image": ..., "prompt": ...}
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Most samples of --data
    #[arg(long, value_name = "N", requires = "data")]
    limit: Option<NonZero<usize>>,
    /// Tokens to generate and compare, of models that answer prompts
    #[arg(long, value_name = "N", default_value_t = 8)]
    max_new_tokens: usize,
    /// Show every node, not the worst of each layer
    #[arg(long)]
    all: bool,
    /// Write a report with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Leave the artifact's manifest as it is
    #[arg(long)]
    no_certificate: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

pub(super) fn verify(args: &VerifyArgs) -> Result<()> {
    let artifact = Artifact::open(&args.artifact)?;
    let dir = checkpoint_dir(&args.checkpoint)?;
    let model = match &args.lora {
        Some(lora) => Model::open_with_lora(&dir, lora)?,
        None => Model::open(&dir)?,
    };
    let requests = requests(args, &artifact)?;
    let bar = spinner();
    let options =
        Options { engine: args.engine.options(), new_tokens: args.max_new_tokens, progress: &|what| bar.set_message(what.to_string()) };
    let report = verify::verify(&artifact, model, &requests, &options);
    bar.finish_and_clear();
    let report = report?;
    if !args.no_certificate {
        certify(&artifact, report.certificate())?;
    }
    if let Some(path) = &args.html {
        std::fs::write(path, verify::html(&report, &artifact)?).with_context(|| path.display().to_string())?;
    }
    if args.json {
        print_json(&report)?;
    } else {
        print(&text(&report, args.all))?;
    }
    if let Some(node) = report.first_wrong() {
        let (layer, weights) = (node.layer(), node.weights.join(", "));
        let error = node.local.map_or(0.0, |e| e.relative);
        bail!(
            "the artifact differs from its checkpoint, first in {layer}: {} with {weights} has a relative error of {error:.2e}, where the \
             storage of its weights explains {:.2e}",
            node.op,
            node.tolerance
        );
    }
    if let Some((request, output)) = report.wrong_output() {
        let error = request.outputs[output].relative;
        bail!(
            "the artifact differs from its checkpoint: {}: '{output}' has a relative error of {error:.2e}, though no layer is wrong alone",
            request.name
        );
    }
    Ok(())
}

fn requests(args: &VerifyArgs, artifact: &Artifact) -> Result<Vec<Request>> {
    let Manifest { task, processor, .. } = artifact.manifest().clone();
    let preparer = Preparer::new(task, processor, |name| artifact.path(name))?;
    let samples = match &args.data {
        Some(data) => samples::read(data, args.limit.map(NonZero::get))?,
        None if args.image.is_none() && args.prompt.is_none() => {
            return Ok(vec![Request { name: "synthetic".into(), tensors: preparer.synthetic()? }]);
        }
        None => {
            let name = args.image.as_deref().map_or("prompt".to_string(), |p: &Path| p.display().to_string());
            vec![Sample { name, image: args.image.clone(), prompt: args.prompt.clone(), answer: None }]
        }
    };
    samples.iter().map(|s| Ok(Request { name: s.name.clone(), tensors: s.tensors(&preparer)? })).collect()
}

/// A table of the layers, or of all nodes, and what is to be said of the outputs.
fn text(r: &Report, all: bool) -> String {
    let mut out = format!("{} for {}\n\n", r.architecture, r.target);
    let rows: Vec<(String, &Node)> = if all {
        r.nodes.iter().map(|n| (n.scope.clone(), n)).collect()
    } else {
        r.layers().into_iter().map(|(layer, nodes)| (layer, verify::worst(&nodes))).collect()
    };
    let width = rows.iter().map(|(layer, _)| layer.len()).max().unwrap_or(0).clamp(5, 40);
    let _ =
        writeln!(out, "{:width$}  {:>10} {:>10} {:>10} {:>10} {:>10}   of", "layer", "error", "allowed", "with all", "cosine", "largest");
    for (layer, n) in rows {
        let number = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.2e}"));
        let _ = writeln!(
            out,
            "{layer:width$}  {:>10} {:>10} {:>10} {:>10} {:>10}   {} {}{}",
            number(n.local.map(|e| e.relative)),
            number(Some(n.tolerance)),
            number(n.propagated.map(|e| e.relative)),
            n.propagated.map_or("-".into(), |e| format!("{:.6}", e.cosine)),
            number(n.propagated.map(|e| e.largest)),
            n.op,
            n.weights.join(", "),
            if n.is_wrong() { "   WRONG" } else { "" },
        );
    }
    let _ =
        writeln!(out, "\nerror: of the node alone, relative; with all: with the errors of all before it, as cosine and largest (absolute)");
    let skipped = r.nodes.iter().filter(|n| n.local.is_none()).count();
    if skipped > 0 {
        let _ = writeln!(out, "{} of {} nodes are computed together with others and were not compared alone", skipped, r.nodes.len());
    }
    for request in &r.requests {
        let _ = writeln!(out, "\n{}", request.name);
        for (name, e) in &request.outputs {
            let _ = writeln!(out, "  {name:24} relative error {:.2e}, cosine {:.6}, largest {:.2e}", e.relative, e.cosine, e.largest);
        }
        if let Some(l) = &request.logits {
            let mean = l.kl.iter().sum::<f64>() / l.kl.len().max(1) as f64;
            let max = l.kl.iter().copied().fold(0.0, f64::max);
            let greedy = l.greedy.map_or(String::new(), |[same, n]| format!("; greedy tokens {same} of {n}"));
            let _ = writeln!(out, "  KL divergence {mean:.2e} mean, {max:.2e} largest; top-1 agrees on {:.1} %{greedy}", l.top1 * 100.0);
        }
    }
    let verdict = if r.is_right() { "agrees with" } else { "differs from" };
    let _ = writeln!(out, "\nThe artifact {verdict} its checkpoint ({} nodes compared).", inspect::count((r.nodes.len() - skipped) as u64));
    out
}
