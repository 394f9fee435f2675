//! Layouts: the files of an ONNX artifact, and the inputs and outputs of its graphs, as a client wants them. One file per client;
//! what they share of adapting graphs is in `interface.rs`. Nothing else in the compiler knows of them.

mod genai;
mod interface;
mod transformers_js;
mod triton;

use crate::{Error, Result, compile::Model};
use serde_json::Value;
use vlmc_artifact::{Manifest, Task};
use vlmc_ir::{BuildError, Graph, Program};

/// How an artifact is laid out.
pub struct Layout {
    /// Name, as `--layout` takes it.
    pub name: &'static str,
    /// For whom it is, in a line.
    pub summary: &'static str,
    /// `model_type`s that the client runs; none if all.
    pub architectures: &'static [&'static str],
    /// Targets whose graphs the client runs; none if all.
    pub targets: &'static [&'static str],
    /// Names of axes, by the names of symbols that they have elsewhere.
    pub(crate) symbols: &'static [(&'static str, &'static str)],
    /// The graphs as the client calls them, with its names.
    pub(crate) adapt: fn(Program, &Task) -> Result<Program, BuildError>,
    /// Where a graph of the program and its weights lie in the artifact.
    pub(crate) place: fn(&Graph) -> Place,
    /// The other files, by path, but for those that come from the checkpoint as they are.
    pub(crate) files: fn(&Model, &Manifest) -> Result<Files>,
}

/// Contents of files by path.
pub(crate) type Files = Vec<(String, Vec<u8>)>;

/// Paths in an artifact.
pub(crate) struct Place {
    pub(crate) onnx: String,
    /// Beside the graph. Graphs with the same path share a file.
    pub(crate) weights: String,
}

/// All layouts, the default first.
pub static LAYOUTS: &[&Layout] = &[&PLAIN, &genai::LAYOUT, &transformers_js::LAYOUT, &triton::LAYOUT];

/// File names of vlmc's own runtime.
pub static PLAIN: Layout = Layout {
    name: "plain",
    summary: "vlmc's own runtime, and callers of ONNX Runtime",
    architectures: &[],
    targets: &[],
    symbols: &[],
    adapt: |program, _| Ok(program),
    place: |g| flat(&g.name),
    files: |_, _| Ok(vec![]),
};

/// All graphs and their weights in one directory.
fn flat(name: &str) -> Place {
    Place { onnx: format!("{name}.onnx"), weights: crate::compile::WEIGHTS.into() }
}

impl Layout {
    /// Whether it is vlmc's own.
    pub fn is_plain(&self) -> bool {
        self.name == PLAIN.name
    }

    /// Refuses what the client does not run.
    ///
    /// # Errors
    /// [`Error::Layout`] names the layout, what does not go with it, and what does.
    pub fn check(&self, architecture: &str, target: &str) -> Result<()> {
        let refuse = |what: &str, given: &str, supported: String| {
            Err(Error::Layout { layout: self.name, what: format!("{what} '{given}'"), supported })
        };
        if !self.is_plain() && target == "cpu" {
            return refuse("target", target, "onnx-*".into());
        }
        if !self.targets.is_empty() && !self.targets.contains(&target) {
            return refuse("target", target, self.targets.join(", "));
        }
        if !self.architectures.is_empty() && !self.architectures.contains(&architecture) {
            return refuse("architecture", architecture, self.architectures.join(", "));
        }
        Ok(())
    }
}

/// The layout of that name.
///
/// # Errors
/// [`Error::Layout`] lists the layouts there are.
pub fn named(name: &str) -> Result<&'static Layout> {
    LAYOUTS.iter().find(|l| l.name == name).copied().ok_or_else(|| {
        let names: Vec<_> = LAYOUTS.iter().map(|l| l.name).collect();
        Error::UnknownLayout { name: name.into(), known: names.join(", ") }
    })
}

fn pretty(json: &Value) -> Vec<u8> {
    format!("{json:#}\n").into_bytes()
}

/// With the digits of the checkpoint's files, rather than those of the nearest `f64`.
fn decimals(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|n| n.to_string().parse().unwrap_or(f64::from(*n))).collect()
}

/// `tokenizer_config.json` of the checkpoint with the chat template inside, where clients look for it.
fn tokenizer_config(model: &Model, manifest: &Manifest) -> Result<Value> {
    let checkpoint = model.checkpoint();
    let mut config =
        checkpoint.json("tokenizer_config.json")?.filter(Value::is_object).unwrap_or_else(|| Value::Object(Default::default()));
    let path = checkpoint.dir().join("chat_template.jinja");
    let template = if path.is_file() {
        Some(Value::from(std::fs::read_to_string(&path).map_err(Error::io(&path))?))
    } else if let Some(file) = checkpoint.json("chat_template.json")? {
        file.get("chat_template").cloned()
    } else if config.get("chat_template").is_none_or(Value::is_null) {
        manifest.task.prompt().and_then(|rules| rules.template.as_deref()).map(Value::from)
    } else {
        None
    };
    if let Some(template) = template {
        config["chat_template"] = template;
    }
    Ok(config)
}

/// The part of `config.json` that describes the decoder.
fn text_config(config: &Value) -> &Value {
    ["text_config", "language_config"].iter().find_map(|part| config.get(part)).unwrap_or(config)
}

/// Number of layers, of heads of keys and values, and width of a key, as the states of `decoder` have them.
struct Cache {
    layers: usize,
    heads: i64,
    width: i64,
}

impl Cache {
    /// `decoder` is the entry that has the states.
    fn of(manifest: &Manifest, decoder: &str) -> Option<Self> {
        let states = &manifest.entries.iter().find(|e| e.name == decoder)?.states;
        let dim = |axis: usize| states.first()?.shape.get(axis)?.as_const();
        Some(Self { layers: states.len() / 2, heads: dim(1)?, width: dim(3)? })
    }
}
