//! The typed graph IR of vlmc.
//!
//! A [`Program`] is several [`Graph`]s (`vision`, `embed`, `decoder`) over one table of weights. A graph is a list of
//! [`Node`]s in execution order; a node applies an [`Op`] to values and defines new ones. A value is an input, a state
//! (KV cache), a weight, a literal or a node's result, and has a [`Type`]: element type and symbolic shape.
//!
//! - Every op is defined once, in [`ops`]: its type rule and its meaning. A primitive's meaning is `eval`, a composite's is
//!   `decompose` into smaller ops; [`interp`] therefore runs every op, and every target can fall back on primitives.
//! - [`Builder`] makes graphs: model code reads like the model's definition, and the first error is kept until `finish`.
//! - [`verify`] checks a program and returns the [`Verified`] token that backends ask for.
//! - [`text`] prints a program and parses it back; repeated layers are folded.
//! - Weights are recipes over checkpoint tensors ([`weights`]), never bytes.

mod builder;
mod graph;
pub mod interp;
pub mod ops;
pub mod text;
mod types;
mod verify;
pub mod weights;

pub use builder::{BuildError, Builder, Patch, Replacement, Val, W, WeightSource, Weights, inline, patch, rewrite};
pub use graph::{Def, Graph, Node, NodeId, Port, Program, State, ValueId};
pub use ops::Op;
pub use types::{Literal, Type};
pub use verify::{Diagnostic, Verified, verify};
pub use vlmc_artifact::{Bindings, DType, Dim, Scheme, Symbol, quant};
