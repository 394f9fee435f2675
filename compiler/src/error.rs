//! What can go wrong when a checkpoint is read and an artifact is written.

use std::{io, path::PathBuf};

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every variant's message says what is wrong, where, and, if it is not obvious, what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
    /// A file or directory is not what it should be.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A field of `config.json` is missing, or has a value that cannot be compiled.
    #[error("config.json: `{field}`: {message}")]
    Config {
        /// Path of the field, e.g. `vision_config.depth`.
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// A model's name leads to no checkpoint.
    #[error("model '{model}': {message}")]
    Model {
        /// As the user wrote it.
        model: String,
        /// What was looked for, where, and what to do.
        message: String,
    },
    /// A model does not take a request, or does not run it.
    #[error("{name}: {message}")]
    Request {
        /// What the request is called.
        name: String,
        /// What is wrong.
        message: String,
    },
    /// A tensor's bytes cannot be read or written as asked.
    #[error("tensor '{name}': {message}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong.
        message: String,
    },
    /// `--target` names no target.
    #[error("target '{0}' is not supported; supported: {list}", list = crate::target::TARGETS.iter().map(|t| t.name).collect::<Vec<_>>().join(", "))]
    Target(String),
    /// `--layout` names no layout.
    #[error("layout '{name}' is not supported; supported: {known}")]
    UnknownLayout {
        /// As the user wrote it.
        name: String,
        /// All that there are.
        known: String,
    },
    /// The client of a layout does not run what is to be compiled.
    #[error("layout '{layout}' does not support {what}; supported: {supported}")]
    Layout {
        /// Its name.
        layout: &'static str,
        /// What it does not support.
        what: String,
        /// What it does.
        supported: String,
    },
    /// The provider of a target has no kernels for some nodes.
    #[error(
        "target '{target}' does not run {} nodes (--allow-fallback leaves them to another provider):{}",
        .nodes.len(), .nodes.iter().map(|n| format!("\n  {n}")).collect::<String>()
    )]
    Uncovered {
        /// Target name.
        target: &'static str,
        /// The nodes.
        nodes: Vec<crate::back::onnx::Uncovered>,
    },
    /// An option that the target does not have.
    #[error("{0}")]
    TargetOption(String),
    /// `--budget` is less than what the fewest bits take.
    #[error("a budget of {budget} bits per weight is too small: the least is {least:.3}")]
    Budget {
        /// As the user wrote it.
        budget: f64,
        /// With the fewest bits for all weights.
        least: f64,
    },
    /// A policy's method needs data.
    #[error("weight '{0}' is to be quantized by a method that needs calibration data: give --calibrate")]
    Uncalibrated(String),
    /// A policy of quantization is not one.
    #[error(transparent)]
    Policy(#[from] vlmc_passes::quantize::PolicyError),
    /// A pass refused the program.
    #[error(transparent)]
    Pass(#[from] vlmc_passes::PassError),
    /// A pass broke its contract, or could not be checked.
    #[error(transparent)]
    Check(#[from] vlmc_passes::CheckError),
    /// An artifact cannot be loaded or run.
    #[error(transparent)]
    Runtime(#[from] vlmc_runtime::Error),
    /// A frontend made a program that does not verify: a bug of vlmc.
    #[error("the frontend made an invalid program; please report this:{0}")]
    Invalid(String),
    /// A backend met what its target's table should have kept from it: a bug of vlmc.
    #[error("cannot write the program down: {0}; please report this")]
    Backend(String),
    /// A model could not be lowered: a tensor is missing or does not fit.
    #[error(transparent)]
    Build(#[from] vlmc_ir::BuildError),
}

impl Error {
    /// For `map_err` on operations on `path`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |cause| Self::Io { path, cause }
    }

    /// `message` about the content of `path`.
    pub fn file(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::File { path: path.into(), message: message.into() }
    }

    /// `message` about a field of `config.json`.
    pub fn config(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Config { field: field.into(), message: message.into() }
    }

    /// `message` about the tensor `name`.
    pub fn tensor(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), message: message.into() }
    }
}
