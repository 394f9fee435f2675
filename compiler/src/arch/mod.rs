//! Architectures. One file each; a new one gets a line in [`ARCHITECTURES`].

/// A preset whose `config` and `files` follow from a size.
macro_rules! preset {
    ($name:literal, $hub:literal, $parameters:literal, $size:expr) => {
        Preset { name: $name, hub: $hub, parameters: $parameters, config: || config($size), files: || files($size) }
    };
}

mod clip;
mod clip_openai;
mod config;
mod decoder;
mod deepseek_vl;
mod deepseek_vl2;
mod images;
mod llava;
mod mllama;
mod nn;
mod qwen2_5_vl;
mod qwen2_vl;
mod qwen3_vl;
mod qwen_vl;
mod sam;
mod siglip;
mod timm;
mod vit;

use crate::{Error, Result};
pub(crate) use clip_openai::inferred_config;
use config::Section;
use serde_json::Value;
use std::{borrow::Cow, ops::RangeInclusive};
use vlmc_artifact::{Processor, Task};
use vlmc_ir::{BuildError, Builder, Graph, Program, Symbol, Weights};

/// What the compiler knows about a family of checkpoints.
pub struct Architecture {
    /// What `model_type` of `config.json` may be.
    pub model_types: &'static [&'static str],
    /// Short name: stands for the first preset.
    pub alias: &'static str,
    /// Family name for people.
    pub title: &'static str,
    /// Paper, or reference implementation.
    pub reference: &'static str,
    /// What of it is supported, for its page in the docs (Markdown).
    pub notes: &'static str,
    /// The name by which the frontend knows checkpoint tensor `name`: undoes the renames between versions of transformers.
    pub canonical_name: fn(&str) -> Cow<'_, str>,
    /// Whether the model may do without the tensor (buffers that follow from the config).
    pub ignored: fn(&str) -> bool,
    /// Published sizes.
    pub presets: &'static [Preset],
    lower: fn(&Section<'_>, &Weights<'_>, &SideFiles) -> Result<Lowered>,
    processor: fn(&Section<'_>, &SideFiles) -> Result<Option<Processor>>,
}

/// A published size of an architecture.
pub struct Preset {
    /// Short name of the model.
    pub name: &'static str,
    /// Where it is published on the hub; empty for sizes that serve tests only.
    pub hub: &'static str,
    /// Number of weights, each counted once.
    pub parameters: u64,
    /// Its `config.json`.
    pub config: fn() -> Value,
    /// Other JSON files of its checkpoint, by name, that a synthetic one should have.
    pub files: fn() -> Vec<(&'static str, Value)>,
}

/// All architectures.
pub static ARCHITECTURES: &[Architecture] = &[
    qwen2_vl::ARCHITECTURE,
    qwen2_5_vl::ARCHITECTURE,
    qwen3_vl::ARCHITECTURE,
    qwen_vl::ARCHITECTURE,
    llava::ARCHITECTURE,
    mllama::ARCHITECTURE,
    deepseek_vl::ARCHITECTURE,
    deepseek_vl2::ARCHITECTURE,
    clip::ARCHITECTURE,
    clip_openai::ARCHITECTURE,
    siglip::SIGLIP,
    siglip::SIGLIP2,
    vit::ARCHITECTURE,
];

/// What a frontend makes of a config and its weights.
pub struct Lowered {
    /// Symbols of the graphs.
    pub symbols: Vec<Symbol>,
    /// The graphs, in the order a request runs them.
    pub graphs: Vec<Graph>,
    /// What the model is for.
    pub task: Task,
}

/// Optional JSON files beside `config.json`, parsed.
#[derive(Default)]
pub struct SideFiles {
    /// `preprocessor_config.json`.
    pub preprocessor: Option<Value>,
    /// `video_preprocessor_config.json`.
    pub video_preprocessor: Option<Value>,
    /// `processor_config.json`.
    pub processor: Option<Value>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Value>,
    /// `tokenizer.json`.
    pub tokenizer: Option<Value>,
    /// `generation_config.json`.
    pub generation: Option<Value>,
}

impl SideFiles {
    /// Content of an added token of the tokenizer.
    pub fn token(&self, id: i64) -> Option<String> {
        let added = self.tokenizer.as_ref()?.get("added_tokens")?.as_array()?;
        added.iter().find(|t| t["id"] == id)?["content"].as_str().map(String::from)
    }

    /// Id of an added token of the tokenizer.
    pub fn token_id(&self, content: &str) -> Option<i64> {
        let added = self.tokenizer.as_ref()?.get("added_tokens")?.as_array()?;
        added.iter().find(|t| t["content"] == content)?["id"].as_i64()
    }
}

impl Architecture {
    /// The architecture of a config.
    ///
    /// # Errors
    /// [`Error::Config`] if `model_type` is missing or unknown.
    pub fn of(config: &Value) -> Result<&'static Self> {
        let model_type: String = Section::root(config)?.require("model_type")?;
        ARCHITECTURES.iter().find(|a| a.model_types.contains(&&*model_type)).ok_or_else(|| {
            let known: Vec<_> = ARCHITECTURES.iter().flat_map(|a| a.model_types).copied().collect();
            Error::config("model_type", format!("architecture '{model_type}' is not supported; supported are: {}", known.join(", ")))
        })
    }

    /// The program of a config over `weights`, and what a client must know to feed it.
    ///
    /// # Errors
    /// A field of the config or a tensor is missing or not supported.
    pub fn lower(&self, config: &Value, weights: Weights<'_>, files: &SideFiles) -> Result<(Program, Task, Vec<String>)> {
        let section = Section::root(config)?;
        let Lowered { symbols, graphs, task } = (self.lower)(&section, &weights, files)?;
        let name: String = section.require("model_type")?;
        Ok((Program { name, symbols, graphs, weights: weights.into_table() }, task, section.unread()))
    }

    /// How pictures become tensors; `None` if the checkpoint does not say.
    ///
    /// # Errors
    /// A setting that is not supported.
    pub fn processor(&self, config: &Value, files: &SideFiles) -> Result<Option<Processor>> {
        (self.processor)(&Section::root(config)?, files)
    }
}

fn graph(name: &str, weights: &Weights<'_>, build: impl for<'g> FnOnce(&'g Builder<'g>)) -> Result<Graph, BuildError> {
    let g = Builder::new(name, Some(weights));
    build(&g);
    g.finish()
}

fn symbol(name: &str, range: RangeInclusive<usize>) -> Symbol {
    Symbol { name: name.into(), min: *range.start() as i64, max: *range.end() as i64 }
}
