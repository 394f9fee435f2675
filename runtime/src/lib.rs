//! Loads vlmc artifacts and runs them.

mod artifact_dir;
mod binding;
mod cpu;
mod engine;
mod error;
mod pipeline;
pub mod prompt;
mod tensor;

pub use artifact_dir::Artifact;
pub use cpu::CpuEngine;
pub use engine::Engine;
pub use error::{Error, Result};
pub use pipeline::{Features, ModelInputs, Pipeline, Scored};
pub use tensor::{Data, Tensor};
pub use vlmc_artifact as artifact;
