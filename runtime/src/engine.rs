//! What runs the graphs of an artifact.

use crate::{Error, Result, Tensor};
use std::{num::NonZero, path::PathBuf};
use vlmc_artifact::{Manifest, program::Unary};

/// Threads to run with: as given, or as many as this process may use at once, which respects the affinity mask and, on Linux, the CPU
/// limits of control groups.
pub fn threads(given: Option<NonZero<usize>>) -> usize {
    given.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZero::get)
}

/// How to run an artifact.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Threads, as [`threads`] takes it.
    pub threads: Option<NonZero<usize>>,
    /// What computes the graphs of an `onnx-*` artifact, its target's if this is absent. A GPU is the first that CUDA shows
    /// (`CUDA_VISIBLE_DEVICES`).
    pub provider: Option<Provider>,
    /// Directory for the engines that TensorRT builds; [`cache_dir`]'s `tensorrt` if this is absent.
    pub engine_cache: Option<PathBuf>,
    /// Whether a `cpu` artifact's weights may be copied to pages of 2 MiB when it is loaded, if that makes tokens faster soon enough to
    /// pay. Processes that run the same artifact share its file's memory, but not copies.
    pub large_pages: bool,
    /// Is told what takes minutes: engines that are built.
    pub progress: fn(&str),
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { threads: None, provider: None, engine_cache: None, large_pages: true, progress: |_| {} }
    }
}

/// What computes the graphs of an `onnx-*` artifact: an execution provider of ONNX Runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// The processor.
    Cpu,
    /// A GPU of NVIDIA.
    Cuda,
    /// A GPU of NVIDIA, by engines that TensorRT builds of the graphs.
    TensorRt,
}

impl Provider {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Cuda, Self::TensorRt];

    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
        }
    }
}

/// `VLMC_CACHE`, or vlmc's directory in the user's cache.
///
/// # Errors
/// The environment tells neither.
pub fn cache_dir() -> Result<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let dir =
        var("VLMC_CACHE").or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("vlmc"))).or_else(|| var("HOME").map(|d| d.join(".cache/vlmc")));
    dir.ok_or_else(|| Error::Unsupported("there is no place for what is kept between runs: set VLMC_CACHE to a directory".into()))
}

/// A computation with weights, as an engine did it.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The entry it is part of.
    pub entry: String,
    /// The weights among its operands, in order, by their names in the weight file. What was computed from weights alone counts
    /// as these.
    pub weights: Vec<String>,
    /// The other operands, in order, without constants.
    pub operands: Vec<Tensor>,
    /// What came out.
    pub result: Tensor,
    /// A function that was applied to what came out, if there was one.
    pub act: Option<Unary>,
}

/// Is told of every computation with weights.
pub type Observer = Box<dyn FnMut(Observed) -> Result<()>>;

/// Runs the entries of one artifact and keeps their states (the KV cache of one batch of sequences).
pub trait Engine {
    /// The artifact's manifest.
    fn manifest(&self) -> &Manifest;

    /// Runs `entry` on named inputs (all that the manifest lists, in any order) and returns its outputs in the manifest's
    /// order. The states of the entry grow by this call's positions.
    ///
    /// # Errors
    /// An input is missing, unknown or does not fit its declared dtype and shape; an index (token id, position) is out of
    /// range; the states belong to another batch size.
    fn run(&mut self, entry: &str, inputs: &[(&str, &Tensor)]) -> Result<Vec<Tensor>>;

    /// As [`Self::run`], with the results in place of what `outputs` held, and in its memory where that can be.
    ///
    /// # Errors
    /// As [`Self::run`]. What `outputs` holds then is not said.
    fn run_into(&mut self, entry: &str, inputs: &[(&str, &Tensor)], outputs: &mut Vec<Tensor>) -> Result<()> {
        *outputs = self.run(entry, inputs)?;
        Ok(())
    }

    /// Whether, from now on, of each row of what an entry gives only the largest number, and where it is, must be right: an engine may
    /// then read less of the weights. The others are smaller. Off at first.
    fn only_largest(&mut self, _on: bool) {}

    /// Bytes of weights that were copied to pages of 2 MiB when the artifact was loaded, since they are read faster there.
    fn large_page_bytes(&self) -> usize {
        0
    }

    /// Number of positions in the states that grow with the text.
    fn past(&self) -> usize;

    /// Keeps the first `len` positions of the states that grow with the text, and all of others; 0 starts anew, possibly with another batch size.
    ///
    /// # Errors
    /// `len` is more than [`Self::past`].
    fn truncate(&mut self, len: usize) -> Result<()>;
}
