//! Loads vlmc artifacts and runs them.

mod artifact_dir;
pub mod binding;
pub mod boxes;
pub mod chat;
mod cpu;
mod cross;
mod engine;
mod error;
mod features;
mod forward;
mod generate;
pub mod image;
mod lookup;
mod model;
mod needs;
#[cfg(feature = "ort")]
mod ort;
mod pipeline;
pub mod prepare;
pub mod processor;
pub mod prompt;
mod resize;
pub mod sample;
mod tensor;
pub mod tokenizer;
mod vectors;

pub use artifact_dir::Artifact;
pub use cpu::{CpuEngine, Profiler, TimedRun, Work, Working, work};
pub use engine::{Engine, EngineOptions, Observed, Observer, Provider, cache_dir, threads};
pub use error::{Error, Result};
pub use forward::{Tensors, forward};
pub use generate::{Finish, GenerateOptions, Reply};
pub use lookup::LookupReport;
pub use model::{Conversation, Model, Part, open_engine};
pub use needs::{Needs, Request, Run, needs};
pub use pipeline::{Features, Outputs, Pipeline, Scored};
pub use resize::resize;
pub use tensor::{Data, Tensor};
pub use vectors::{Classifier, Label, Loaded, PairScorer};
pub use vlmc_artifact as artifact;
