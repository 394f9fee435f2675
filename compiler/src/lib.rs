//! Ahead-of-time compiler for vision-language models.

pub mod arch;
mod error;

pub use error::{Error, Result};
