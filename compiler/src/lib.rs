//! Ahead-of-time compiler for vision-language models.

pub mod arch;
pub mod artifact_dir;
pub mod back;
pub mod calibrate;
pub mod checkpoint;
pub mod compile;
mod digest;
mod error;
pub mod eval;
pub mod exec;
pub mod hub;
pub mod layout;
mod lora;
mod loss;
mod packed;
mod pytorch;
pub mod ranges;
mod safetensors_header;
pub mod samples;
mod stored;
pub mod synth;
pub mod target;
pub mod tiktoken;
pub mod vectors;
pub mod verify;
pub mod weights_writer;

pub use error::{Error, Result};
