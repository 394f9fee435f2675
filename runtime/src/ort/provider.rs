//! Execution providers: the sessions that compute on them, and what to do where one cannot be used.

use crate::{
    EngineOptions, Error, Provider, Result,
    artifact_dir::{hex, identity},
    engine::cache_dir,
};
use ort::{
    environment::Environment,
    ep::ArbitrarilyConfigurableExecutionProvider as _,
    ep::{CUDA, ExecutionProvider, TensorRT},
    error::ErrorCode,
    memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType},
    session::{
        Session,
        builder::{GraphOptimizationLevel, SessionBuilder},
    },
};
use std::{
    error::Error as _,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Instant,
};
use vlmc_artifact::{Entry, Manifest};

/// Environment variable that names the library.
const LIBRARY: &str = "ORT_DYLIB_PATH";
/// What provides GPUs.
const GPU_PACKAGE: &str = "install the Python package onnxruntime-gpu, or download a release for GPUs";

/// What ONNX Runtime loads for providers, from beside its own library.
const SHARED_LIBRARY: &str = "libonnxruntime_providers_shared.so";
const TENSORRT_LIBRARY: &str = "libonnxruntime_providers_tensorrt.so";
const CUDA_LIBRARY: &str = "libonnxruntime_providers_cuda.so";

/// Options that an artifact may set. Others of TensorRT's load libraries that they name.
const OPTIONS: [&str; 3] = ["trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"];

/// Where graphs are computed.
pub(super) struct Device {
    environment: &'static Environment,
    provider: Provider,
    threads: usize,
    target: String,
    /// Memory of the results that stay there.
    pub(super) memory: MemoryInfo<'static>,
    /// Of the engines that TensorRT builds.
    engines: Option<Engines>,
    progress: fn(&str),
}

/// Directories of TensorRT.
struct Engines {
    /// Engines of this artifact: ONNX Runtime names them by graphs without their weights.
    own: PathBuf,
    /// Times of kernels, which are the same for all artifacts.
    timing: PathBuf,
}

impl Device {
    /// The provider that the options ask for, else the target's.
    ///
    /// # Errors
    /// The library is not there or too old, or has no such provider.
    pub(super) fn open(manifest: &Manifest, options: &EngineOptions) -> Result<Self> {
        let (environment, library) = environment()?;
        let provider = options.provider.unwrap_or(match manifest.target.as_str() {
            "onnx-cuda" => Provider::Cuda,
            "onnx-tensorrt" => Provider::TensorRt,
            _ => Provider::Cpu,
        });
        let kind = if provider == Provider::Cpu { AllocationDevice::CPU } else { AllocationDevice::CUDA };
        let memory = MemoryInfo::new(kind, 0, AllocatorType::Device, MemoryType::Default);
        let mut device = Self {
            environment,
            provider,
            threads: crate::threads(options.threads),
            target: manifest.target.clone(),
            memory: memory.map_err(super::failed("memory"))?,
            engines: None,
            progress: options.progress,
        };
        device.check(&library)?;
        if provider == Provider::TensorRt {
            device.engines = Some(Engines::open(options, manifest)?);
        }
        Ok(device)
    }

    /// Whether the provider can be used at all.
    fn check(&self, library: &Path) -> Result<()> {
        let available = match self.provider {
            Provider::Cpu => return Ok(()),
            Provider::Cuda => CUDA::is_available(),
            Provider::TensorRt => TensorRT::is_available().and_then(|t| Ok(t && CUDA::is_available()?)),
        };
        let (name, at) = (self.provider.name(), library.display());
        let instead = "or run it on the CPU (--provider cpu)";
        if !available.map_err(super::failed(name))? {
            return Err(Error::Unsupported(format!(
                "an artifact for '{}' is to run on the provider '{name}', which {at} was built without: {GPU_PACKAGE}, and let {LIBRARY} name its \
                 libonnxruntime.so (in the package: onnxruntime/capi), {instead}",
                self.target
            )));
        }
        let usable = || {
            let mut builder = self.builder(None)?;
            if self.provider == Provider::TensorRt { TensorRT::default().register(&mut builder) } else { Ok(()) }
        };
        usable().map_err(|e| {
            // ONNX Runtime only logs what the loader said; so it is asked again.
            let dir = library.parent().unwrap_or(Path::new("."));
            let needs = if self.provider == Provider::TensorRt { "TensorRT, CUDA and cuDNN" } else { "CUDA and cuDNN" };
            let libraries = [SHARED_LIBRARY, TENSORRT_LIBRARY, CUDA_LIBRARY];
            let mut libraries = libraries.iter().filter(|file| self.provider == Provider::TensorRt || **file != TENSORRT_LIBRARY);
            let unloadable = libraries.find_map(|file| ort::util::preload_dylib(dir.join(file)).err());
            let why = unloadable.map_or_else(|| e.to_string(), |e| e.source().map_or_else(|| e.to_string(), ToString::to_string));
            let paths = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
            let paths = if paths.is_empty() { "which is not set".into() } else { format!("which is {paths}") };
            Error::Unsupported(format!(
                "the provider '{name}' of {at} cannot be used: {why}. Its libraries are looked for in {}, in LD_LIBRARY_PATH, {paths}, and \
                 where the system has libraries. It needs a driver, and {needs} in the versions that their names have: install them \
                 (CUDA and cuDNN: pip install 'onnxruntime-gpu[cuda,cudnn]') and let LD_LIBRARY_PATH name their directories, {instead}",
                dir.display(),
            ))
        })
    }

    /// Of sessions. That of an entry runs on the provider; others run beside it, on the CPU or on CUDA.
    pub(super) fn builder(&self, entry: Option<&Entry>) -> ort::Result<SessionBuilder> {
        let mut builder =
            Session::builder(self.environment)?.with_optimization_level(GraphOptimizationLevel::All)?.with_intra_threads(self.threads)?;
        if let (Some(dirs), Some(entry)) = (&self.engines, entry) {
            let text = |path: &Path| path.to_string_lossy().into_owned();
            let mut tensorrt = TensorRT::default()
                .with_engine_cache(true)
                .with_engine_cache_path(text(&dirs.own))
                .with_timing_cache(true)
                .with_timing_cache_path(text(&dirs.timing))
                // Protobuf, by which graphs are handed to TensorRT, holds 2 GB.
                .with_arbitrary_config("trt_load_user_initializer", "1");
            for (key, value) in &entry.provider_options {
                tensorrt = tensorrt.with_arbitrary_config(key, value);
            }
            tensorrt.register(&mut builder)?;
        }
        if self.provider != Provider::Cpu {
            // Also beside TensorRT, for what it does not take. What a graph computes in f32 needs more bits than TF32 has.
            CUDA::default().with_tf32(false).register(&mut builder)?;
        }
        Ok(builder)
    }

    /// Loads the graph of an entry.
    ///
    /// # Errors
    /// Its options are not those of a graph, or ONNX Runtime refuses it.
    pub(super) fn session(&self, entry: &Entry, path: &Path) -> Result<Session> {
        let foreign = entry.provider_options.iter().find(|(key, value)| !OPTIONS.contains(&key.as_str()) || value.contains('\0'));
        if let Some((key, value)) = foreign {
            return Err(Error::file(
                path,
                format!("the manifest has '{key}' = {value:?} among its provider_options, which can only be {}", OPTIONS.join(", ")),
            ));
        }
        if let Some(engines) = &self.engines {
            let dir = engines.own.display();
            (self.progress)(&format!("{}: TensorRT builds engines, which takes minutes the first time (kept in {dir})", entry.file));
        }
        let start = Instant::now();
        let session = self.builder(Some(entry)).and_then(|mut b| b.commit_from_file(path)).map_err(|e| {
            let advice = if e.code() == ErrorCode::NotImplemented && self.provider == Provider::Cpu && self.target != "onnx-cpu" {
                format!(
                    "; the artifact is for target '{}', and the CPU has no kernel for that node: run it on a GPU, or compile with --dtype f16 \
                     or f32, or for onnx-cpu",
                    self.target
                )
            } else {
                String::new()
            };
            Error::file(path, format!("ONNX Runtime refuses it: {e}{advice}"))
        })?;
        if self.engines.is_some() {
            (self.progress)(&format!("{}: ready after {:.1} s", entry.file, start.elapsed().as_secs_f64()));
        }
        Ok(session)
    }
}

impl Engines {
    fn open(options: &EngineOptions, manifest: &Manifest) -> Result<Self> {
        let timing = options.engine_cache.clone().map_or_else(|| Ok(cache_dir()?.join("tensorrt")), Ok)?;
        let own = timing.join(&hex(&identity(manifest)?)[..16]);
        fs::create_dir_all(&own).map_err(Error::io(&own))?;
        Ok(Self { own, timing })
    }
}

/// ONNX Runtime's environment, of which a process can have one only, and the library that it is from.
fn environment() -> Result<(&'static Environment, PathBuf)> {
    static ENVIRONMENT: Mutex<Option<(&'static Environment, PathBuf)>> = Mutex::new(None);
    let mut environment = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(environment) = &*environment {
        return Ok(environment.clone());
    }
    let how = "install the Python package onnxruntime, or download a release, and let it name libonnxruntime.so (in the package: onnxruntime/capi)";
    let library = std::env::var_os(LIBRARY).map(PathBuf::from).ok_or_else(|| {
        Error::Unsupported(format!("this artifact runs on ONNX Runtime, but the environment variable {LIBRARY} is not set; {how}"))
    })?;
    if !library.is_file() {
        return Err(Error::Unsupported(format!("{LIBRARY} names {}, which is not a file; {how}", library.display())));
    }
    let unusable = |e: &dyn std::fmt::Display| Error::Unsupported(format!("{}: cannot be used as ONNX Runtime: {e}", library.display()));
    let made = ort::init_from(&library).map_err(|e| unusable(&e))?.with_name("vlmc").build().map_err(|e| unusable(&e))?;
    // It lives as long as the process.
    Ok(environment.insert((Box::leak(Box::new(made)), library)).clone())
}
