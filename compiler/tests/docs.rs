//! Generated documentation: the README's table of architectures and a page for each. `UPDATE_DOCS=1` writes them anew.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};
use vlmc::{
    arch::{ARCHITECTURES, Architecture},
    compile::Model,
};
use vlmc_ir::Graph;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// `2.21 B`, `86.6 M`.
fn count(n: u64) -> String {
    match n {
        1_000_000_000.. => format!("{:.2} B", n as f64 / 1e9),
        _ => format!("{:.1} M", n as f64 / 1e6),
    }
}

fn table() -> String {
    let mut out = "| architecture | `model_type` | sizes | reference |\n|---|---|---|---|\n".to_string();
    for a in ARCHITECTURES {
        let types = a.model_types.iter().map(|t| format!("`{t}`")).collect::<Vec<_>>().join(", ");
        let sizes = published(a).map(|p| format!("`{}`", p.name)).collect::<Vec<_>>().join(" ");
        writeln!(out, "| [{}](docs/architectures/{}.md) | {types} | {sizes} | {} |", a.title, a.alias, a.reference).unwrap();
    }
    out
}

fn published(a: &'static Architecture) -> impl Iterator<Item = &'static vlmc::arch::Preset> {
    a.presets.iter().filter(|p| !p.hub.is_empty())
}

/// The scopes that a graph runs through, in order, layers of one kind as one.
fn stages(g: &Graph) -> Vec<(String, usize)> {
    let mut seen: Vec<(String, Vec<String>)> = vec![];
    for (_, node) in g.nodes().filter(|(_, n)| !n.scope.is_empty()) {
        let folded: Vec<&str> = node.scope.split('.').map(|part| if part.parse::<usize>().is_ok() { "i" } else { part }).collect();
        let folded = folded.join(".");
        match seen.iter_mut().find(|(name, _)| *name == folded) {
            Some((_, scopes)) if scopes.contains(&node.scope) => {}
            Some((_, scopes)) => scopes.push(node.scope.clone()),
            None => seen.push((folded, vec![node.scope.clone()])),
        }
    }
    seen.into_iter().map(|(name, scopes)| (name, scopes.len())).collect()
}

/// Inputs, stages and outputs of every graph as a Mermaid diagram; what one graph gives another is one box.
fn diagram(graphs: &[Graph]) -> String {
    let mut out = "```mermaid\nflowchart TD\n".to_string();
    let mut ports: BTreeMap<&str, String> = BTreeMap::new();
    for (i, g) in graphs.iter().enumerate() {
        for p in g.inputs.iter().chain(&g.outputs) {
            if !ports.contains_key(p.name.as_str()) {
                let id = format!("p{}", ports.len());
                writeln!(out, "  {id}([\"{}: {}\"])", p.name, g.ty(p.value)).unwrap();
                ports.insert(&p.name, id);
            }
        }
        writeln!(out, "  subgraph {}", g.name).unwrap();
        let mut stages = stages(g);
        if stages.is_empty() {
            stages.push((g.name.clone(), 1));
        }
        for (j, (name, n)) in stages.iter().enumerate() {
            let times = if *n > 1 { format!(" × {n}") } else { String::new() };
            writeln!(out, "    g{i}s{j}[\"{name}{times}\"]").unwrap();
        }
        (1..stages.len()).for_each(|j| writeln!(out, "    g{i}s{} --> g{i}s{j}", j - 1).unwrap());
        writeln!(out, "  end").unwrap();
        g.inputs.iter().for_each(|p| writeln!(out, "  {} --> g{i}s0", ports[p.name.as_str()]).unwrap());
        g.outputs.iter().for_each(|p| writeln!(out, "  g{i}s{} --> {}", stages.len() - 1, ports[p.name.as_str()]).unwrap());
    }
    out + "```\n"
}

fn page(a: &'static Architecture) -> String {
    let mut out = format!("# {}\n\nReference: {}. `model_type`: {}.\n\n", a.title, a.reference, a.model_types.join(", "));
    writeln!(out, "{}\n", a.notes.trim()).unwrap();
    out += "| size | on the hub | parameters |\n|---|---|---|\n";
    for p in published(a) {
        writeln!(out, "| `{}` | {} | {} |", p.name, p.hub, count(p.parameters)).unwrap();
    }
    let preset = &a.presets[0];
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    fs::write(&config, serde_json::to_vec(&(preset.config)()).unwrap()).unwrap();
    let lowered = Model::from_config(&config).unwrap().lower().unwrap();
    writeln!(out, "\n## Graphs\n\nOf `{}`; the whole of it: `vlmc dump`.\n", preset.name).unwrap();
    out + &diagram(&lowered.program.graphs)
}

#[test]
fn generated_documents_are_up_to_date() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (start, end) = ("<!-- architectures -->\n", "<!-- /architectures -->");
    let (before, rest) = readme.split_once(start).unwrap();
    let (_, after) = rest.split_once(end).unwrap();
    let mut files = vec![("README.md".to_string(), format!("{before}{start}{}{end}{after}", table()))];
    files.extend(ARCHITECTURES.iter().map(|a| (format!("docs/architectures/{}.md", a.alias), page(a))));
    for (name, text) in files {
        let path = root().join(&name);
        if std::env::var_os("UPDATE_DOCS").is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
        } else {
            assert!(
                fs::read_to_string(&path).is_ok_and(|t| t == text),
                "{name} is out of date: UPDATE_DOCS=1 cargo test -p vlmc --test docs"
            );
        }
    }
}
