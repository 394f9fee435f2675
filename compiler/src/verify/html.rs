//! The report as one HTML file with drawings.

use super::{
    Report, plot,
    plot::{Chart, escape},
    worst,
};
use crate::{Error, Result};
use std::{collections::BTreeMap, fmt::Write};
use vlmc_artifact::{
    Bindings,
    program::{Function, Place, Program, Value},
};
use vlmc_runtime::{Artifact, artifact::PROGRAM};

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}\
h1{font-size:1.4em}h2{font-size:1.1em;margin-top:2em}table{border-collapse:collapse;font-size:13px}\
td,th{padding:2px 10px 2px 0;text-align:right;white-space:nowrap}td:first-child,th:first-child,td:last-child,th:last-child{text-align:left}\
tr.wrong{background:#fbdcd3}svg{width:100%;height:auto;margin:.6em 0}.title{font:600 14px system-ui}\
.tick{font:11px system-ui;fill:#444}.end{text-anchor:end}.middle{text-anchor:middle}.grid{stroke:#ddd}\
.right{color:#2b7a3b}.differs{color:#b8360f}";

/// The report as a page that needs no other file.
///
/// # Errors
/// The artifact's program cannot be read.
pub fn html(report: &Report, artifact: &Artifact) -> Result<String> {
    let (class, verdict) = if report.is_right() { ("right", "agrees with") } else { ("differs", "differs from") };
    let title = format!("{} for {}", escape(&report.architecture), escape(&report.target));
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style>\n<h1>{title}: \
         <span class=\"{class}\">{verdict} its checkpoint</span></h1>\n"
    );
    if let Some(node) = report.first_wrong() {
        let (layer, weights) = (escape(&node.layer()), escape(&node.weights.join(", ")));
        let _ = writeln!(out, "<p class=\"differs\">First in <b>{layer}</b>: {} with {weights}.</p>", escape(&node.op));
    }
    out += "<h2>Outputs</h2>\n<table><tr><th>request<th>output<th>relative error<th>cosine<th>largest<th></tr>\n";
    for r in &report.requests {
        for (name, e) in &r.outputs {
            let [request, name] = [&r.name, name].map(|s| escape(s));
            let _ = writeln!(out, "<tr><td>{request}<td>{name}<td>{:.2e}<td>{:.6}<td>{:.2e}<td></tr>", e.relative, e.cosine, e.largest);
        }
    }
    out += "</table>\n";
    out += &divergence(report);
    out += "<h2>Layers</h2>\n";
    out += &layers(report);
    out += &memory(report, artifact)?;
    Ok(out)
}

/// Table and chart of the worst node of each layer.
fn layers(report: &Report) -> String {
    let layers = report.layers();
    let most = |f: fn(&super::Node) -> Option<f64>| {
        layers.iter().map(|(_, nodes)| nodes.iter().filter_map(|n| f(n)).reduce(f64::max)).collect::<Vec<_>>()
    };
    let chart = Chart {
        title: "Relative error, worst of each layer",
        x: "layer, in execution order",
        y: "relative error",
        logarithmic: true,
        positions: layers.iter().map(|(name, _)| tail(name)).collect(),
        lines: vec![
            ("of the layer alone".into(), most(|n| n.local.map(|e| e.relative))),
            ("with all before it".into(), most(|n| n.propagated.map(|e| e.relative))),
            ("explained by storage".into(), most(|n| Some(n.tolerance))),
        ],
    };
    let mut out = chart.svg();
    out += "<table><tr><th>layer<th>error alone<th>allowed<th>with all<th>cosine<th>largest<th>worst node</tr>\n";
    let number = |v: Option<f64>| v.map_or("".into(), |v| format!("{v:.2e}"));
    for (layer, nodes) in &layers {
        let n = worst(nodes);
        let class = if nodes.iter().any(|n| n.is_wrong()) { " class=\"wrong\"" } else { "" };
        let _ = writeln!(
            out,
            "<tr{class}><td>{}<td>{}<td>{:.2e}<td>{}<td>{}<td>{}<td>{} {}</tr>",
            escape(layer),
            number(n.local.map(|e| e.relative)),
            n.tolerance,
            number(n.propagated.map(|e| e.relative)),
            n.propagated.map_or(String::new(), |e| format!("{:.6}", e.cosine)),
            number(n.propagated.map(|e| e.largest)),
            escape(&n.op),
            escape(&n.weights.join(", ")),
        );
    }
    out + "</table>\n"
}

/// The end of a layer's name, as there is room.
fn tail(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    parts[parts.len().saturating_sub(2)..].join(".")
}

/// Charts of the logits' divergence, a line per request.
fn divergence(report: &Report) -> String {
    const LINES: usize = 5;
    let of = |r: &super::Compared| Some((r.name.clone(), r.logits.as_ref()?.kl.iter().map(|v| Some(*v)).collect()));
    let lines: Vec<(String, Vec<Option<f64>>)> = report.requests.iter().filter_map(of).take(LINES).collect();
    if lines.is_empty() {
        return String::new();
    }
    let chart = Chart {
        title: "KL divergence of the logits from the reference's, in nats",
        x: "position",
        y: "nats",
        logarithmic: true,
        positions: vec![],
        lines,
    };
    format!("<h2>Logits</h2>\n{}", chart.svg())
}

/// Charts of the bytes in use while an entry runs, of artifacts that say so.
fn memory(report: &Report, artifact: &Artifact) -> Result<String> {
    if artifact.path(PROGRAM).is_none() {
        return Ok(String::new());
    }
    let path = artifact.require(PROGRAM)?;
    let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
    let program: Program = serde_json::from_slice(&bytes).map_err(|e| Error::file(&path, e.to_string()))?;
    let mut out = String::new();
    for f in &program.functions {
        let Some(symbols) = report.symbols.get(&f.name) else { continue };
        let live = live_bytes(f, symbols);
        let shown = symbols.iter().map(|(n, v)| format!("{n} = {v}")).collect::<Vec<_>>().join(", ");
        let peak = live.iter().max().copied().unwrap_or(0);
        let title = format!("{}: peak {}B", f.name, plot::short(peak as f64));
        let lines = vec![("live results".to_string(), live.into_iter().map(|v| Some(v as f64)).collect())];
        let x = format!("step ({shown})");
        out += &Chart { title: &title, x: &x, y: "bytes", logarithmic: false, positions: vec![], lines }.svg();
    }
    Ok(if out.is_empty() { out } else { format!("<h2>Memory over time</h2>\n{out}") })
}

/// Bytes of results that are in use at each step: from the step that writes them to the last that reads them.
fn live_bytes(f: &Function, symbols: &BTreeMap<String, i64>) -> Vec<u64> {
    let symbols: Bindings = symbols.iter().map(|(n, v)| (n.as_str(), *v)).collect();
    let slot = |v: &Value| if let Place::Slot(i) = v.place { Some(i) } else { None };
    let bytes = |v: &Value| {
        let elements = v.shape.iter().try_fold(1u64, |n, d| n.checked_mul(u64::try_from(d.eval(&symbols).ok()?).ok()?));
        elements.and_then(|n| n.checked_mul(v.dtype.size() as u64)).unwrap_or(0)
    };
    let value = |i: &u32| f.values.get(*i as usize);
    // What a slot holds: since which step, how many bytes, and which step was the last to use it.
    let mut held: BTreeMap<u32, (usize, u64, usize)> = BTreeMap::new();
    let mut live = vec![0u64; f.steps.len()];
    let mut release = |(from, size, to): (usize, u64, usize)| live[from..=to].iter_mut().for_each(|l| *l = l.saturating_add(size));
    for (now, step) in f.steps.iter().enumerate() {
        for i in step.args.iter().filter_map(value).filter_map(slot) {
            held.entry(i).and_modify(|h| h.2 = now);
        }
        for (i, size) in step.outs.iter().filter_map(value).filter_map(|v| Some((slot(v)?, bytes(v)))) {
            if let Some((from, size, to)) = held.insert(i, (now, size, now)) {
                // What is overwritten in place lives on as what overwrites it.
                release((from, size, to.min(now.saturating_sub(1)).max(from)));
            }
        }
    }
    for i in f.outputs.iter().filter_map(|o| slot(value(&o.value)?)) {
        held.entry(i).and_modify(|h| h.2 = f.steps.len() - 1);
    }
    held.into_values().for_each(release);
    live
}
