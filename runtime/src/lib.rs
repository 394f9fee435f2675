//! Loads vlmc artifacts and runs them.

mod engine;
mod error;
mod tensor;

pub use engine::Engine;
pub use error::{Error, Result};
pub use tensor::{Data, Tensor};
pub use vlmc_artifact as artifact;
