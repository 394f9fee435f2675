//! What a vlmc artifact is made of, shared by the compiler that writes it and the runtime that loads it.
//!
//! An artifact is a directory: [`manifest.json`](Manifest) (what is in it, how to feed it), the graphs (`*.onnx`, or one
//! [`program.json`](program::Program) for the CPU runtime), weights in safetensors, and the tokenizer files as published.
//! [`Dim`], [`Symbol`] and [`DType`] are defined here because the IR and the runtime must agree on them.

mod dim;
mod dtype;
mod manifest;
pub mod program;
pub mod quant;

pub use dim::{Bindings, Dim, DimError, DimFunction, Symbol};
pub use dtype::DType;
pub use manifest::*;
pub use quant::Scheme;
