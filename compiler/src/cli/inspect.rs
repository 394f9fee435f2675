//! `vlmc inspect` and `vlmc dump`.

use super::{TargetArgs, bytes_bar, is_artifact, print, print_json, read_onnx};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use petgraph::dot::{Config, Dot};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fmt::Write,
    num::NonZero,
    path::{Path, PathBuf},
};
use vlmc::compile::Model;
use vlmc_ir::{Graph, Program};
use vlmc_passes::quantize::Policy;
use vlmc_runtime::{
    Artifact, Request, Run,
    artifact::{Certificate, Dim, Entry, PROGRAM},
    needs, threads,
};

#[derive(Args)]
pub(super) struct InspectArgs {
    /// Artifact, checkpoint directory or config.json
    path: PathBuf,
    /// Read all files of an artifact and compare their digests
    #[arg(long)]
    verify: bool,
    /// Tell how much memory a request with a picture of this size takes; may be repeated
    #[arg(long, value_name = "WxH", value_parser = size)]
    image: Vec<[usize; 2]>,
    /// Tell how much memory a request takes whose prompt, pictures included, and answer are of so many tokens [default with
    /// --image: 4096, or the model's longest]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Tokens of the answer, which are part of the context
    #[arg(long, value_name = "N", default_value_t = 1)]
    max_new_tokens: usize,
    /// Threads to run with [default: as many cores as this process may use]
    #[arg(long)]
    threads: Option<NonZero<usize>>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct DumpArgs {
    /// Artifact, checkpoint directory or config.json
    path: PathBuf,
    /// Print a checkpoint's program after this pass of the target's pipeline [default: as the frontend writes it]
    #[arg(long, value_name = "PASS")]
    after: Option<String>,
    /// Print this graph only, e.g. vision
    #[arg(long)]
    graph: Option<String>,
    /// Text, or a drawing for Graphviz
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    #[command(flatten)]
    target: TargetArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// The IR's text form, or a listing of an artifact's graphs
    Text,
    /// Graphviz
    Dot,
}

/// `2.21 B`, `221.3 k`.
pub(super) fn count(n: u64) -> String {
    let n = n as f64;
    match n {
        n if n >= 1e9 => format!("{:.2} B", n / 1e9),
        n if n >= 1e6 => format!("{:.1} M", n / 1e6),
        n if n >= 1e3 => format!("{:.1} k", n / 1e3),
        n => n.to_string(),
    }
}

/// `4.42 GB`, in powers of 1000.
pub(super) fn bytes(n: u64) -> String {
    let n = n as f64;
    match n {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        n if n >= 1e3 => format!("{:.1} kB", n / 1e3),
        n => format!("{n} B"),
    }
}

fn open(path: &Path) -> Result<Model> {
    Ok(if path.is_file() { Model::from_config(path)? } else { Model::open(path)? })
}

pub(super) fn inspect(args: &InspectArgs) -> Result<()> {
    let mut report = if is_artifact(&args.path) {
        let artifact = Artifact::open(&args.path)?;
        if args.verify {
            let bar = bytes_bar("reading");
            bar.set_length(artifact.manifest().files.values().map(|f| f.bytes).sum());
            let result = artifact.verify(|n| bar.inc(n));
            bar.finish_and_clear();
            result?;
        }
        of_artifact(&artifact)
    } else if args.verify {
        bail!("--verify is for artifacts; {} is none", args.path.display());
    } else {
        of_checkpoint(&open(&args.path)?)?
    };
    let asked = !args.image.is_empty() || args.context.is_some();
    if asked {
        report["request"] = of_request(args)?;
    }
    if args.json {
        return print_json(&report);
    }
    print(&if asked { request(&report["request"]) } else { text(&report) })
}

/// `1344x1344` as width and height.
pub(super) fn size(text: &str) -> Result<[usize; 2]> {
    let (width, height) = text.split_once('x').context("a size is a width and a height, such as 1344x1344")?;
    Ok([width.parse()?, height.parse()?])
}

/// How much memory a request takes.
fn of_request(args: &InspectArgs) -> Result<Value> {
    let (manifest, program, weights) = if is_artifact(&args.path) {
        let artifact = Artifact::open(&args.path)?;
        let weights = artifact.manifest().files.iter().filter(|(name, _)| name.ends_with(".safetensors")).map(|(_, f)| f.bytes).sum();
        (artifact.manifest().clone(), artifact.program()?, weights)
    } else {
        let (manifest, program, weights) = open(&args.path)?.outline(&Policy::named("none")?)?;
        (manifest, Some(program), weights)
    };
    let threads = threads(args.threads);
    let longest = manifest.task.prompt().map_or(0, |rules| rules.max_positions);
    let request = Request {
        pictures: args.image.clone(),
        context: args.context.unwrap_or(longest.min(4096)),
        new_tokens: args.max_new_tokens,
        threads,
    };
    let needs = needs(&manifest, program.as_ref(), &request)?;
    let run = |run: &Run| {
        json!({
            "entry": run.entry,
            "symbols": run.symbols.iter().map(|(n, v)| (n.to_string(), json!(v))).collect::<serde_json::Map<_, _>>(),
            "arena_bytes": run.working.map(|w| w.arena),
            "largest_live_bytes": run.working.map(|w| w.largest_live),
            "scratch_bytes": run.working.map(|w| w.scratch),
        })
    };
    let total = |arena: usize| weights + (arena + needs.cache + needs.tensors) as u64;
    Ok(json!({
        "target": manifest.target,
        "images": args.image.iter().map(|[w, h]| format!("{w}x{h}")).collect::<Vec<_>>(),
        "context": request.context,
        "max_new_tokens": request.new_tokens,
        "threads": threads,
        "runs": needs.runs.iter().map(run).collect::<Vec<_>>(),
        "arena_bytes": needs.arena(),
        "cache_bytes": needs.cache,
        "tensor_bytes": needs.tensors,
        "weight_bytes": weights,
        "total_bytes": needs.arena().map(total),
    }))
}

fn request(r: &Value) -> String {
    let number = |v: &Value| bytes(v.as_u64().unwrap_or(0));
    let images = r["images"].as_array().into_iter().flatten().filter_map(Value::as_str).map(|i| format!(", a picture of {i}"));
    let threads = r["threads"].as_u64().unwrap_or(1);
    let mut out = format!("memory of a request: {} tokens{}, {threads} threads\n", r["context"], images.collect::<String>());
    for run in r["runs"].as_array().into_iter().flatten().filter(|r| !r["arena_bytes"].is_null()) {
        let symbols = run["symbols"].as_object().into_iter().flatten().map(|(n, v)| format!(" {n} {v}")).collect::<String>();
        let entry = run["entry"].as_str().unwrap_or_default();
        let scratch = number(&run["scratch_bytes"]);
        let _ = writeln!(out, "  {entry:8} {:>10}  of which kernels work with {scratch};{symbols}", number(&run["arena_bytes"]));
    }
    let mut line = |what: &str, bytes: &str, note: &str| _ = writeln!(out, "{what:10} {bytes:>10}  {note}");
    if r["arena_bytes"].is_null() {
        line("arena", "?", "ONNX Runtime plans it, and what requests take besides: only the rest is known");
    } else {
        line("arena", &number(&r["arena_bytes"]), "one for all, as large as the largest");
    }
    line("KV cache", &number(&r["cache_bytes"]), "");
    line("tensors", &number(&r["tensor_bytes"]), "pictures, pixels, features, embeddings, logits: the most at once");
    line("weights", &number(&r["weight_bytes"]), "a mapped file: those that are read");
    if !r["total_bytes"].is_null() {
        line("total", &number(&r["total_bytes"]), "besides the program itself and its tokenizer");
    }
    out
}

fn of_checkpoint(model: &Model) -> Result<Value> {
    let lowered = model.lower()?;
    let program = &lowered.program;
    // Parts are named by the first component of the weights' names.
    let mut parts: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for (name, w) in &program.weights {
        let (n, b) = parts.entry(name.split('.').next().unwrap_or(name)).or_default();
        *n += w.elements();
        *b += w.elements() * w.dtype.size() as u64;
    }
    let graphs: Vec<Value> = program
        .graphs
        .iter()
        .map(|g| {
            let port = |p: &vlmc_ir::Port| json!(format!("{}: {}", p.name, g.ty(p.value)));
            json!({
                "name": g.name,
                "nodes": g.nodes().len(),
                "inputs": g.inputs.iter().map(port).collect::<Vec<_>>(),
                "outputs": g.outputs.iter().map(port).collect::<Vec<_>>(),
                "states": g.states.len(),
            })
        })
        .collect();
    Ok(json!({
        "kind": "checkpoint",
        "architecture": model.checkpoint().config()["model_type"],
        "parameters": program.weights.values().map(vlmc_ir::weights::WeightDef::elements).sum::<u64>(),
        "parts": parts.iter().map(|(n, (p, b))| (n.to_string(), json!({"parameters": p, "bytes": b}))).collect::<serde_json::Map<_, _>>(),
        "graphs": graphs,
        "unused_tensors": lowered.unused,
    }))
}

fn of_artifact(artifact: &Artifact) -> Value {
    let m = artifact.manifest();
    let ty = |name: &str, dtype: String, shape: &[Dim]| {
        format!("{name}: {dtype}[{}]", shape.iter().map(Dim::to_string).collect::<Vec<_>>().join(", "))
    };
    let graph = |e: &Entry| {
        let ports =
            |ports: &[vlmc_runtime::artifact::Port]| ports.iter().map(|p| ty(&p.name, p.dtype.to_string(), &p.shape)).collect::<Vec<_>>();
        json!({
            "name": e.name,
            "file": e.file,
            "inputs": ports(&e.inputs),
            "outputs": ports(&e.outputs),
            "states": e.states.len(),
            "state": e.states.first().map(|s| ty(&s.past, s.dtype.to_string(), &s.shape)),
            "memory_plan_bytes": e.arena.as_ref().map(Dim::to_string),
        })
    };
    json!({
        "kind": "artifact",
        "architecture": m.architecture,
        "target": m.target,
        "layout": m.layout,
        "compiler": m.compiler,
        "parameters": m.parameters,
        "symbols": m.symbols.iter().map(|s| format!("{}: {}..={}", s.name, s.min, s.max)).collect::<Vec<_>>(),
        "graphs": m.entries.iter().map(graph).collect::<Vec<_>>(),
        "files": m.files.iter().map(|(n, f)| (n.clone(), json!(f.bytes))).collect::<serde_json::Map<_, _>>(),
        "pictures": m.processor.is_some(),
        "certificate": m.certificate,
    })
}

fn text(r: &Value) -> String {
    let mut out = String::new();
    let s = |v: &Value| v.as_str().unwrap_or_default().to_string();
    let [target, layout] = [("target", " for "), ("layout", ", laid out for ")]
        .map(|(name, before)| r[name].as_str().map_or(String::new(), |t| format!("{before}{t}")));
    let _ = writeln!(out, "{} {}{target}{layout}", s(&r["architecture"]), s(&r["kind"]));
    let _ = writeln!(out, "parameters   {}", count(r["parameters"].as_u64().unwrap_or(0)));
    for (name, p) in r["parts"].as_object().into_iter().flatten() {
        let _ = writeln!(
            out,
            "  {name:10} {:>10} {:>10}",
            count(p["parameters"].as_u64().unwrap_or(0)),
            bytes(p["bytes"].as_u64().unwrap_or(0))
        );
    }
    for (name, n) in r["files"].as_object().into_iter().flatten() {
        let _ = writeln!(out, "  {name:22} {:>10}", bytes(n.as_u64().unwrap_or(0)));
    }
    let list = |out: &mut String, kind: &str, v: &Value| {
        for p in v.as_array().into_iter().flatten() {
            let _ = writeln!(out, "  {kind:7} {}", s(p));
        }
    };
    for g in r["graphs"].as_array().into_iter().flatten() {
        let nodes = g["nodes"].as_u64().map_or(String::new(), |n| format!(" ({n} nodes)"));
        let _ = writeln!(out, "\ngraph {}{nodes}", s(&g["name"]));
        list(&mut out, "input", &g["inputs"]);
        list(&mut out, "output", &g["outputs"]);
        if let Some(n) = g["states"].as_u64().filter(|n| *n > 0) {
            let _ = writeln!(out, "  states  {n}{}", g["state"].as_str().map_or(String::new(), |t| format!(", such as {t}")));
        }
        if let Some(plan) = g["memory_plan_bytes"].as_str() {
            let _ = writeln!(out, "  memory  {plan} bytes");
        }
    }
    if let Some(symbols) = r["symbols"].as_array() {
        let _ = writeln!(out, "\nsymbols {}", symbols.iter().map(s).collect::<Vec<_>>().join(", "));
    }
    if let Ok(c) = serde_json::from_value::<Certificate>(r["certificate"].clone()) {
        out += &certificate(&c);
    }
    if let Some(unused) = r["unused_tensors"].as_array().filter(|u| !u.is_empty()) {
        let _ = writeln!(out, "\nnot used: {}", unused.iter().map(s).collect::<Vec<_>>().join(", "));
    }
    out
}

fn certificate(c: &Certificate) -> String {
    let verdict = if c.right { "agrees with its checkpoint" } else { "DIFFERS from its checkpoint" };
    let number = |v: Option<f64>| v.map_or("none".to_string(), |v| format!("{v:.2e}"));
    let mut out = format!("\ncertificate: {verdict}, says {}, on {} request(s)\n", c.compiler, c.requests.len());
    let _ = writeln!(out, "  nodes compared {}, not compared {}", c.nodes, c.nodes_not_compared);
    let worst = c.worst_scope.iter().chain(&c.worst_weights).map(String::as_str).collect::<Vec<_>>().join(", ");
    let _ = writeln!(out, "  worst node     relative error {} in {worst}", number(c.worst_relative_error));
    let _ = writeln!(out, "  outputs        relative error {}", number(c.output_relative_error));
    if let Some(mean) = c.logit_kl_mean {
        let top1 = c.top1_agreement.unwrap_or(0.0) * 100.0;
        let _ = writeln!(out, "  logits         KL {mean:.2e} mean, {} largest; top-1 agrees on {top1:.1} %", number(c.logit_kl_max));
    }
    out
}

pub(super) fn dump(args: &DumpArgs) -> Result<()> {
    let policy = args.target.policy()?;
    if is_artifact(&args.path) {
        return dump_artifact(args);
    }
    let model = open(&args.path)?;
    let mut program = (*model.lower()?.program).clone();
    if let Some(wanted) = &args.after {
        let target = args.target.target()?;
        let passes: Vec<&str> = target.passes.iter().map(|p| p.name).collect();
        if !passes.contains(&wanted.as_str()) {
            bail!("--after: target '{}' has no pass '{wanted}'; its passes are {}", target.name, passes.join(", "));
        }
        model.lower_for(&target, &policy, |trace, after| {
            if trace.pass == wanted {
                program = (**after).clone();
            }
        })?;
    }
    if let Some(name) = &args.graph {
        select(&mut program, name)?;
    }
    match args.format {
        Format::Text => print(&program.to_string()),
        Format::Dot => print(&program.graphs.iter().map(dot).collect::<String>()),
    }
}

/// Leaves one graph of a program, and its weights.
fn select(program: &mut Program, name: &str) -> Result<()> {
    if !program.graphs.iter().any(|g| g.name == name) {
        let names: Vec<_> = program.graphs.iter().map(|g| g.name.as_str()).collect();
        bail!("--graph: there is no graph '{name}'; graphs are {}", names.join(", "));
    }
    program.graphs.retain(|g| g.name == name);
    let used = |w: &str| program.graphs.iter().any(|g| g.values().any(|(_, _, d)| matches!(d, vlmc_ir::Def::Weight(n) if n == w)));
    let keep: Vec<String> = program.weights.keys().filter(|w| used(w)).cloned().collect();
    program.weights.retain(|w, _| keep.contains(w));
    Ok(())
}

fn dot(g: &Graph) -> String {
    let label = |_: &Graph, (_, n): (vlmc_ir::NodeId, &vlmc_ir::Node)| {
        let ty = n.outs.first().map(|o| g.ty(*o).to_string()).unwrap_or_default();
        format!("shape=box label=\"{}\\n{}\\n{ty}\"", n.op.name(), n.scope)
    };
    let edge = |_: &Graph, _: _| String::new();
    let config = [Config::NodeNoLabel, Config::EdgeNoLabel];
    format!("// {}\n{:?}", g.name, Dot::with_attr_getters(g, &config, &|g, e| edge(g, e), &|g, n| label(g, n)))
}

fn dump_artifact(args: &DumpArgs) -> Result<()> {
    if args.after.is_some() || args.format == Format::Dot {
        bail!("--after and --format dot are for checkpoints: an artifact holds compiled graphs only");
    }
    let artifact = Artifact::open(&args.path)?;
    let wanted = |name: &str| args.graph.as_ref().is_none_or(|g| g == name);
    let mut out = String::new();
    for e in artifact.manifest().entries.iter().filter(|e| wanted(&e.name)) {
        if e.file.ends_with(".onnx") {
            out += &read_onnx(&artifact.require(&e.file)?)?;
            out.push('\n');
        }
    }
    if artifact.path(PROGRAM).is_some() {
        let path = artifact.require(PROGRAM)?;
        let program: vlmc_runtime::artifact::program::Program = serde_json::from_slice(&std::fs::read(&path)?)?;
        for f in program.functions.iter().filter(|f| wanted(&f.name)) {
            out += &listing(&program, f);
        }
    }
    print(&out)
}

/// A function of a compiled program: one step per line.
fn listing(p: &vlmc_runtime::artifact::program::Program, f: &vlmc_runtime::artifact::program::Function) -> String {
    use vlmc_runtime::artifact::program::Place;
    let mut out = String::new();
    let _ = writeln!(out, "function {}", f.name);
    let value = |i: u32| {
        let Some(v) = f.values.get(i as usize) else { return "?".to_string() };
        let place = match &v.place {
            Place::Input(i) => f.inputs.get(*i as usize).map_or("?".into(), |p| p.name.clone()),
            Place::Slot(i) => format!("slot{i}"),
            Place::Weight(i) => p.weights.get(*i as usize).map_or("?".into(), |w| format!("@{}", w.name)),
            Place::Literal(data) => format!("{data:?}"),
            Place::State(i) => f.states.get(*i as usize).map_or("?".into(), |s| s.name.clone()),
        };
        format!("{place}: {}[{}]", v.dtype, v.shape.iter().map(Dim::to_string).collect::<Vec<_>>().join(", "))
    };
    let mut scope = "";
    for s in &f.steps {
        if s.scope != scope {
            scope = &s.scope;
            let _ = writeln!(out, "  [{scope}]");
        }
        let args: Vec<String> = s.args.iter().map(|a| value(*a)).collect();
        let outs: Vec<String> = s.outs.iter().map(|o| value(*o)).collect();
        let _ = writeln!(out, "  {} = {:?}({})", outs.join(", "), s.kernel, args.join(", "));
    }
    out
}
