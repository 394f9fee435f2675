//! A Hugging Face checkpoint directory: `config.json`, weights in safetensors or PyTorch files, optional side files.
//!
//! Opening it reads headers only; [`Checkpoint::read_rows`] reads what is asked for, from any thread.

use crate::{
    Error, Result, digest,
    lora::{self, Adapter},
    packed::PackedLayers,
    pytorch,
    safetensors_header::Header,
    stored::Stored,
};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read},
    ops::Range,
    path::{Path, PathBuf},
};
use vlmc_artifact::{DType, Source};
use vlmc_ir::WeightSource;

/// File name of the configuration.
pub const CONFIG: &str = "config.json";
/// File name of unsharded weights.
pub const WEIGHTS: &str = "model.safetensors";
/// File name of the table that says which shard has which tensor.
pub const INDEX: &str = "model.safetensors.index.json";
/// File name of unsharded weights as `torch.save` writes them.
pub const PYTORCH_WEIGHTS: &str = "pytorch_model.bin";
/// File name of the table that says which shard of those has which tensor.
pub const PYTORCH_INDEX: &str = "pytorch_model.bin.index.json";

/// File name of open_clip's configuration.
pub const OPEN_CLIP_CONFIG: &str = "open_clip_config.json";

/// Names of unsharded weights and of their index, in the order of preference; the last are open_clip's.
pub(crate) const LAYOUTS: [(&str, &str); 4] = [
    (WEIGHTS, INDEX),
    (PYTORCH_WEIGHTS, PYTORCH_INDEX),
    ("open_clip_model.safetensors", "open_clip_model.safetensors.index.json"),
    ("open_clip_pytorch_model.bin", "open_clip_pytorch_model.bin.index.json"),
];

/// Longest JSON file that is read: twice the index of the largest models.
const MAX_JSON: u64 = 16 << 20;
/// Names longer than this are not compared with a missing one (the comparison takes quadratic time).
const MAX_COMPARED_NAME: usize = 256;

/// An opened checkpoint, with or without weights.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Value,
    config_sha256: String,
    weights: Weights,
    /// What is added to weights while they are read, by tensor.
    adapters: BTreeMap<String, Adapter>,
    /// Tensors that calibration has found.
    found: Weights,
    /// Layers that come quantized.
    packed: PackedLayers,
}

#[derive(Debug)]
pub(crate) enum Weights {
    /// Only the configuration is known; the type is the one that it names.
    Assumed(DType),
    Files {
        shards: Vec<Shard>,
        tensors: BTreeMap<String, Tensor>,
    },
}

#[derive(Debug)]
pub(crate) struct Shard {
    name: String,
    path: PathBuf,
    file: File,
    header_sha256: String,
}

#[derive(Debug)]
pub(crate) struct Tensor {
    shard: usize,
    stored: Stored,
}

impl Checkpoint {
    /// Opens a directory with `config.json` and weights: `model.safetensors`, or `model.safetensors.index.json` and the shards
    /// that it names, or `pytorch_model.bin`, or `pytorch_model.bin.index.json` and its shards, or one other PyTorch file. The
    /// first of these wins, as in `from_pretrained`. No code in a PyTorch file is ever run. Without `config.json`, OpenAI's layout
    /// of CLIP tells the configuration by its tensors, and `open_clip_config.json` completes it.
    ///
    /// # Errors
    /// A file is missing, malformed or truncated; shards contradict one another or the index; a PyTorch file has more in it
    /// than tensors.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self> {
        let dir = dir.into();
        if !dir.is_dir() {
            return Err(Error::file(dir, "is not a directory"));
        }
        let config = dir.join(CONFIG);
        let other_library =
            || dir.join(OPEN_CLIP_CONFIG).exists() && !read_config(&config).is_ok_and(|(c, _)| c.get("model_type").is_some());
        if !config.exists() && has_weights(&dir) || other_library() {
            // Only the layout of OpenAI has no such file; timm's says nothing of the pair.
            let weights = Weights::find(&dir, true)?;
            let (config, config_sha256) = weights.inferred_config(&dir)?.map_or_else(|| read_config(&config), Ok)?;
            return Ok(Self {
                dir,
                config,
                config_sha256,
                weights,
                adapters: BTreeMap::new(),
                packed: PackedLayers::default(),
                found: Weights::default(),
            });
        }
        let (config, config_sha256) = read_config(&config)?;
        let weights = Weights::find(&dir, false)?;
        Ok(Self {
            dir,
            config,
            config_sha256,
            weights,
            adapters: BTreeMap::new(),
            packed: PackedLayers::default(),
            found: Weights::default(),
        })
    }

    /// The structure without the weights: every tensor is taken to exist, in the type that `torch_dtype` (or `dtype`) names.
    ///
    /// # Errors
    /// `path` is missing or malformed, or names an unknown type.
    pub fn from_config(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (config, config_sha256) = read_config(path)?;
        let dtype = config_dtype(&config)?;
        let dir = path.parent().unwrap_or(Path::new("")).to_owned();
        Ok(Self {
            dir,
            config,
            config_sha256,
            weights: Weights::Assumed(dtype),
            adapters: BTreeMap::new(),
            packed: PackedLayers::default(),
            found: Weights::default(),
        })
    }

    /// Renames every tensor, e.g. `model.visual.x` to `visual.x`: from here on only the new names are known.
    ///
    /// # Errors
    /// Two tensors get the same name.
    pub fn with_names(mut self, canonical: impl Fn(&str) -> Cow<'_, str>) -> Result<Self> {
        if let Weights::Files { tensors, .. } = &mut self.weights {
            let mut origin = BTreeMap::new();
            let mut renamed = BTreeMap::new();
            for (name, tensor) in std::mem::take(tensors) {
                let new = canonical(&name).into_owned();
                if let Some(other) = origin.insert(new.clone(), name.clone()) {
                    return Err(Error::file(
                        &self.dir,
                        format!("tensors '{other}' and '{name}' are both '{new}': two layouts in one checkpoint"),
                    ));
                }
                renamed.insert(new, tensor);
            }
            *tensors = renamed;
        }
        Ok(self)
    }

    /// Understands layers that come quantized, if the configuration says that there are some: see [`crate::packed`].
    ///
    /// # Errors
    /// A method that is not supported, or tensors that do not fit it.
    pub(crate) fn with_packed(mut self) -> Result<Self> {
        if let Weights::Files { .. } = self.weights {
            self.packed = PackedLayers::find(&self.config, &self.weights)?;
        }
        Ok(self)
    }

    /// The layers that come quantized.
    pub(crate) fn packed(&self) -> &PackedLayers {
        &self.packed
    }

    /// Merges the LoRA adapters in `dir` into the weights as they are read. `canonical` renames their targets as
    /// [`Self::with_names`] renamed the tensors.
    ///
    /// # Errors
    /// They are not adapters that vlmc knows, or do not fit the checkpoint.
    pub fn with_lora(mut self, dir: &Path, canonical: impl Fn(&str) -> Cow<'_, str>) -> Result<Self> {
        for (name, adapter) in lora::open(dir)? {
            let name = canonical(&name).into_owned();
            self.resolve(&name, &adapter.shape()).map_err(|why| Error::file(dir, format!("does not fit the checkpoint: {why}")))?;
            self.adapters.insert(name, adapter);
        }
        Ok(self)
    }

    /// Adds tensors of a file that is no part of the checkpoint, and not of its [`Self::source`].
    pub(crate) fn with_found(self, file: File, tensors: BTreeMap<String, Stored>) -> Self {
        let shard = Shard { name: String::new(), path: std::env::temp_dir(), file, header_sha256: String::new() };
        let tensors = tensors.into_iter().map(|(name, stored)| (name, Tensor { shard: 0, stored })).collect();
        Self { found: Weights::Files { shards: vec![shard], tensors }, ..self }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json`, always an object.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Digests of the configuration and of the shards' headers (their JSON text, or their pickles).
    pub fn source(&self) -> Source {
        let weights = match &self.weights {
            Weights::Assumed(_) => BTreeMap::new(),
            Weights::Files { shards, .. } => shards.iter().map(|s| (s.name.clone(), s.header_sha256.clone())).collect(),
        };
        Source { config_sha256: self.config_sha256.clone(), weights }
    }

    /// Reads an optional side file such as `generation_config.json`; `None` if it is not there.
    ///
    /// # Errors
    /// It cannot be read, is not JSON, or is too long for what it should be.
    pub fn json(&self, file: &str) -> Result<Option<Value>> {
        let path = self.dir.join(file);
        read_small(&path)?.map(|bytes| parse(&path, &bytes)).transpose()
    }

    /// Element type and shape of a tensor; `None` if there is no such tensor, or of a type that vlmc does not know.
    pub fn tensor(&self, name: &str) -> Option<(DType, &[usize])> {
        let found = self.packed.tensor(name).or_else(|| self.weights.tensor(name));
        found.or_else(|| self.found.tensor(name))
    }

    /// Where a tensor's bytes lie as they are read: the name and the path of a safetensors file, and their range in it. `None` if they
    /// lie nowhere so: adapters change them, or they come from a file of another kind.
    pub(crate) fn place(&self, name: &str) -> Option<(&str, &Path, Range<u64>)> {
        let Weights::Files { shards, tensors } = &self.weights else { return None };
        let Tensor { shard, stored } = tensors.get(name).filter(|_| !self.adapters.contains_key(name) && !self.packed.owns(name))?;
        let shard = shards.get(*shard).filter(|s| s.name.ends_with(".safetensors") && stored.strides.is_none())?;
        Some((&shard.name, &shard.path, stored.range.clone()))
    }

    /// Replaces `buf` with the bytes (little endian, row major) of some indices of the tensor's first axis. A scalar is one
    /// row. May be called from several threads at once.
    ///
    /// # Errors
    /// The tensor or the rows do not exist, the checkpoint was opened without weights, or the file cannot be read.
    pub fn read_rows(&self, name: &str, rows: Range<usize>, buf: &mut Vec<u8>) -> Result<()> {
        let first = rows.start;
        let has = |weights: &Weights| weights.tensor(name).is_some();
        match self.packed.read_rows(name, rows.clone(), &self.weights) {
            Some(bytes) => *buf = bytes?,
            None if has(&self.found) && !has(&self.weights) => self.found.read_rows(name, rows, buf)?,
            None => self.weights.read_rows(name, rows, buf)?,
        }
        if let (Some(adapter), Some((dtype, _))) = (self.adapters.get(name), self.tensor(name)) {
            adapter.add(first, dtype, buf);
        }
        Ok(())
    }

    /// A whole tensor of floats, row major, with what adapters add to it; or of bytes, as numbers.
    ///
    /// # Errors
    /// As [`Self::read_rows`], or it is of another type.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>> {
        const TILE: usize = 16 << 20;
        let (dtype, shape) = self.tensor(name).ok_or_else(|| Error::tensor(name, "is missing, or of a type that is not supported"))?;
        let (rows, row) = (shape.first().copied().unwrap_or(1), shape.iter().skip(1).product::<usize>());
        let step = (TILE / (row * dtype.size()).max(1)).max(1);
        let (mut out, mut bytes) = (vec![], vec![]);
        for start in (0..rows).step_by(step) {
            self.read_rows(name, start..rows.min(start + step), &mut bytes)?;
            match dtype {
                DType::U8 => out.extend(bytes.iter().map(|b| f32::from(*b))),
                dtype => widen(name, dtype, &bytes, &mut out)?,
            }
        }
        Ok(out)
    }

    /// Tensors that are not in `used`, sorted.
    pub fn unused<'a>(&self, used: impl IntoIterator<Item = &'a str>) -> Vec<String> {
        let Weights::Files { tensors, .. } = &self.weights else { return vec![] };
        let used: BTreeSet<_> = used.into_iter().collect();
        tensors.keys().filter(|n| !used.contains(n.as_str()) && !self.packed.owns(n)).cloned().collect()
    }
}

/// Appends the floats that `bytes` of tensor `name` are.
fn widen(name: &str, dtype: DType, bytes: &[u8], out: &mut Vec<f32>) -> Result<()> {
    match dtype {
        DType::F32 => out.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
        DType::F16 => out.extend(bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32())),
        DType::BF16 => out.extend(bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32())),
        other => return Err(Error::tensor(name, format!("has type {other}, floats are needed"))),
    }
    Ok(())
}

impl Default for Weights {
    fn default() -> Self {
        Self::Files { shards: vec![], tensors: BTreeMap::new() }
    }
}

impl WeightSource for Checkpoint {
    fn contains(&self, name: &str) -> Option<bool> {
        match &self.weights {
            Weights::Assumed(_) => None,
            Weights::Files { tensors, .. } => Some(tensors.contains_key(name) || self.packed.tensor(name).is_some()),
        }
    }

    fn resolve(&self, name: &str, shape: &[usize]) -> Result<DType, String> {
        let tensors = match &self.weights {
            Weights::Assumed(dtype) => return Ok(*dtype),
            Weights::Files { tensors, .. } => tensors,
        };
        let unfit = |given: &[usize]| format!("tensor '{name}' has shape {given:?}, expected {shape:?}");
        if let Some((dtype, given)) = self.packed.tensor(name) {
            return if given == shape { Ok(dtype) } else { Err(unfit(given)) };
        }
        let Some(Tensor { stored, .. }) = tensors.get(name) else {
            if let Some(prefix) = foreign_prefix(name, tensors.keys()) {
                return Err(format!(
                    "tensor '{name}' is missing, but there is '{prefix}{name}': the names seem to have the prefix '{prefix}', as in a \
                     model that was wrapped for training; save the model inside, or rename the tensors"
                ));
            }
            let near: Vec<_> = nearest(name, tensors.keys()).iter().map(|n| format!("'{n}'")).collect();
            return Err(match near.len() {
                0 => format!("tensor '{name}' is missing; the checkpoint has no tensors"),
                1 => format!("tensor '{name}' is missing; the nearest name is {}", near[0]),
                _ => format!("tensor '{name}' is missing; the nearest names are {}", near.join(", ")),
            });
        };
        if stored.shape != shape {
            return Err(unfit(&stored.shape));
        }
        known_dtype(stored.dtype).ok_or_else(|| format!("tensor '{name}' has type {}, which is not supported", stored.dtype))
    }
}

impl Weights {
    fn tensor(&self, name: &str) -> Option<(DType, &[usize])> {
        let Self::Files { tensors, .. } = self else { return None };
        let Tensor { stored, .. } = tensors.get(name)?;
        Some((known_dtype(stored.dtype)?, &stored.shape))
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, buf: &mut Vec<u8>) -> Result<()> {
        let Self::Files { shards, tensors } = self else {
            return Err(Error::tensor(name, "has no data: only the configuration was given"));
        };
        let Tensor { shard, stored } = tensors.get(name).ok_or_else(|| Error::tensor(name, "is missing"))?;
        let count = stored.shape.first().copied().unwrap_or(1);
        if rows.start > rows.end || rows.end > count {
            return Err(Error::tensor(name, format!("has {count} rows; {rows:?} were asked for")));
        }
        let Shard { path, file, .. } = &shards[*shard];
        stored.read_rows(file, rows, buf).map_err(Error::io(path))
    }

    /// Names of all tensors, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        if let Self::Files { tensors, .. } = self { tensors.keys().cloned().collect() } else { vec![] }
    }

    /// Shape of a tensor of any type.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        let Self::Files { tensors, .. } = self else { return None };
        Some(&tensors.get(name)?.stored.shape)
    }

    /// All bytes of a tensor of any type.
    ///
    /// # Errors
    /// It does not exist, or cannot be read.
    pub(crate) fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let rows = self.shape(name).and_then(<[usize]>::first).copied().unwrap_or(1);
        let mut bytes = vec![];
        self.read_rows(name, 0..rows, &mut bytes).map(|()| bytes)
    }

    /// A whole tensor of floats, and its shape.
    ///
    /// # Errors
    /// It does not exist, or is of another type.
    pub(crate) fn floats(&self, name: &str) -> Result<(Vec<f32>, Vec<usize>)> {
        let (dtype, shape) = self.tensor(name).ok_or_else(|| Error::tensor(name, "is missing"))?;
        let mut bytes = vec![];
        self.read_rows(name, 0..shape.first().copied().unwrap_or(1), &mut bytes)?;
        let mut floats = vec![];
        widen(name, dtype, &bytes, &mut floats)?;
        Ok((floats, shape.to_vec()))
    }

    /// Opens the weights in a directory, those of open_clip first or last; needs no configuration.
    fn find(dir: &Path, open_clip: bool) -> Result<Self> {
        let mut layouts = LAYOUTS;
        layouts.rotate_left(if open_clip { LAYOUTS.len() / 2 } else { 0 });
        for (file, index) in layouts {
            if dir.join(file).exists() {
                return Self::open(dir, &BTreeSet::from([file.to_owned()]));
            }
            let index = dir.join(index);
            if let Some(bytes) = read_small(&index)? {
                let shards = shards_of_index(&bytes).map_err(|message| Error::file(&index, message))?;
                return Self::open(dir, &shards.values().cloned().collect())?.agreeing_with(&index, &shards);
            }
        }
        Self::open(dir, &BTreeSet::from([sole_pytorch_file(dir)?]))
    }

    /// The configuration that names and shapes tell, with the digest of its text; `None` if they tell nothing.
    fn inferred_config(&self, dir: &Path) -> Result<Option<(Value, String)>> {
        let Self::Files { tensors, .. } = self else { return Ok(None) };
        let shapes = tensors.iter().map(|(n, t)| (n.as_str(), t.stored.shape.as_slice())).collect();
        let path = dir.join(OPEN_CLIP_CONFIG);
        let open_clip = read_small(&path)?.map(|bytes| parse(&path, &bytes)).transpose()?;
        let config = crate::arch::inferred_config(&shapes, open_clip.as_ref())?;
        Ok(config.map(|config| (digest::sha256(config.to_string().as_bytes()), config)).map(|(sha256, config)| (config, sha256)))
    }

    /// Opens the files of these names.
    pub(crate) fn open(dir: &Path, names: &BTreeSet<String>) -> Result<Self> {
        let (mut shards, mut tensors) = (Vec::<Shard>::with_capacity(names.len()), BTreeMap::<String, Tensor>::new());
        for name in names {
            let path = dir.join(name);
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    return Err(Error::file(path, "is missing; copy or download the checkpoint again"));
                }
                Err(e) => return Err(Error::io(path)(e)),
            };
            let (tensors_here, header_sha256) = if name.ends_with(".safetensors") {
                let header = Header::read(&path, &file)?;
                (header.tensors, header.sha256)
            } else {
                pytorch::read(&path, &file)?
            };
            let shard = shards.len();
            for (tensor, stored) in tensors_here {
                if let Some(other) = tensors.get(&tensor) {
                    return Err(Error::file(path, format!("tensor '{tensor}' is also in {}", shards[other.shard].name)));
                }
                tensors.insert(tensor, Tensor { shard, stored });
            }
            shards.push(Shard { name: name.clone(), path, file, header_sha256 });
        }
        Ok(Self::Files { shards, tensors })
    }

    /// Checks that every tensor is where the index says.
    fn agreeing_with(self, index: &Path, weight_map: &BTreeMap<String, String>) -> Result<Self> {
        let Self::Files { shards, tensors } = &self else { return Ok(self) };
        for (tensor, shard) in weight_map {
            if tensors.get(tensor).is_none_or(|t| shards[t.shard].name != *shard) {
                return Err(Error::file(index, format!("places tensor '{tensor}' in {shard}, which does not have it")));
            }
        }
        Ok(self)
    }
}

/// What stands before `name` in a name that ends with it as a whole.
fn foreign_prefix<'a>(name: &str, mut names: impl Iterator<Item = &'a String>) -> Option<&'a str> {
    names.find_map(|n| n.strip_suffix(name).filter(|prefix| prefix.ends_with('.')))
}

/// The `weight_map` of an index: tensor to shard.
///
/// # Errors
/// Not an index, or a shard's name is more than a file name.
pub(crate) fn shards_of_index(json: &[u8]) -> Result<BTreeMap<String, String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Index { weight_map } = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    if weight_map.is_empty() {
        return Err("names no tensors".into());
    }
    match weight_map.values().find(|shard| !is_file_name(shard)) {
        Some(shard) => Err(format!("shard {shard:?} is not the name of a file in this directory")),
        None => Ok(weight_map),
    }
}

/// True if joining it to a directory names an entry of that directory.
pub(crate) fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains(['/', '\\']) && !name.chars().any(char::is_control)
}

/// Whether a directory has a file that may hold weights.
fn has_weights(dir: &Path) -> bool {
    let names = fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    names.into_iter().any(|n| [".safetensors", ".bin", ".pt", ".pth"].iter().any(|e| n.ends_with(e)))
}

/// The only file in a directory without usual names that can be PyTorch weights, e.g. `ViT-B-32.pt`.
fn sole_pytorch_file(dir: &Path) -> Result<String> {
    /// What trainers write next to weights.
    const OTHERS: [&str; 5] = ["training_args", "optimizer", "scheduler", "scaler", "rng_state"];
    let mut names: Vec<_> = fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    let is_pytorch = |n: &&String| [".bin", ".pt", ".pth"].iter().any(|e| n.ends_with(e)) && !OTHERS.iter().any(|o| n.starts_with(o));
    let (shards, whole): (Vec<_>, Vec<_>) = names.iter().filter(is_pytorch).partition(|n| n.contains("-of-"));
    Err(Error::file(
        dir,
        if let [name] = whole[..] {
            return Ok(name.clone());
        } else if whole.len() > 1 {
            let list: Vec<_> = whole.iter().map(|n| n.as_str()).collect();
            format!("has several PyTorch files ({}); give a directory with one of them, or name it {PYTORCH_WEIGHTS}", list.join(", "))
        } else if let Some(name) = shards.first() {
            format!("has {name} but no {PYTORCH_INDEX}; copy or download the checkpoint again")
        } else if let Some(name) = names.iter().find(|n| n.ends_with(".safetensors")) {
            format!("has {name} but no {INDEX}; copy or download the checkpoint again")
        } else {
            format!("has no weights: no {WEIGHTS}, {INDEX}, {PYTORCH_WEIGHTS}, {PYTORCH_INDEX}, nor another *.bin, *.pt or *.pth file")
        },
    ))
}

fn read_config(path: &Path) -> Result<(Value, String)> {
    let bytes = read_small(path)?.ok_or_else(|| Error::file(path, "is missing: not a Hugging Face checkpoint"))?;
    let config: Value = parse(path, &bytes)?;
    if !config.is_object() {
        return Err(Error::file(path, "is not a JSON object"));
    }
    Ok((config, digest::sha256(&bytes)))
}

/// A JSON object.
///
/// # Errors
/// The file is missing or malformed.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let bytes = read_small(path)?.ok_or_else(|| Error::file(path, "is missing"))?;
    parse(path, &bytes)
}

fn config_dtype(config: &Value) -> Result<DType> {
    let named = |field| Some((field, config.get(field).filter(|v| !v.is_null())?));
    let Some((field, value)) = named("torch_dtype").or_else(|| named("dtype")) else { return Ok(DType::F32) };
    match value.as_str() {
        Some("float32") => Ok(DType::F32),
        Some("float16") => Ok(DType::F16),
        Some("bfloat16") => Ok(DType::BF16),
        _ => Err(Error::config(field, format!("is {value}; float32, float16 and bfloat16 are supported"))),
    }
}

/// Bytes of a JSON file; `None` if there is none.
fn read_small(path: &Path) -> Result<Option<Vec<u8>>> {
    let stat = match fs::metadata(path) {
        Ok(stat) => stat,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path)(e)),
    };
    if !stat.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    let mut bytes = vec![];
    let file = File::open(path).map_err(Error::io(path))?;
    file.take(MAX_JSON + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_JSON {
        return Err(Error::file(path, format!("is {} bytes long; at most {MAX_JSON} are read", stat.len())));
    }
    Ok(Some(bytes))
}

fn parse(path: &Path, json: &[u8]) -> Result<Value> {
    serde_json::from_slice(json).map_err(|e| Error::file(path, e.to_string()))
}

pub(crate) fn known_dtype(dtype: Dtype) -> Option<DType> {
    dtype.to_string().parse().ok()
}

/// At most three names, the most similar first.
fn nearest<'a>(name: &str, all: impl Iterator<Item = &'a String>) -> Vec<&'a str> {
    let mut ranked: Vec<_> = all.filter(|n| n.len() <= MAX_COMPARED_NAME).map(|n| (strsim::levenshtein(name, n), n.as_str())).collect();
    ranked.sort_unstable();
    ranked.into_iter().take(3).map(|(_, n)| n).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    /// A safetensors file of f32 tensors counting up from 0 over the file.
    fn write_shard(path: impl AsRef<Path>, tensors: &[(&str, &[usize])]) {
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in tensors {
            let bytes = 4 * shape.iter().product::<usize>();
            header.insert((*name).into(), json!({"dtype": "F32", "shape": shape, "data_offsets": [end, end + bytes]}));
            end += bytes;
        }
        let header = serde_json::to_vec(&header).unwrap();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend((0..end / 4).flat_map(|i| (i as f32).to_le_bytes()));
        fs::write(path, bytes).unwrap();
    }

    fn dir(config: &str) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG), config).unwrap();
        dir
    }

    fn sharded() -> TempDir {
        let d = dir("{}");
        write_shard(d.path().join("one.safetensors"), &[("a", &[4, 2]), ("b", &[])]);
        write_shard(d.path().join("two.safetensors"), &[("c", &[3])]);
        index(&d, json!({"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}));
        d
    }

    fn index(d: &TempDir, weight_map: Value) {
        fs::write(d.path().join(INDEX), json!({"metadata": {"total_size": 1}, "weight_map": weight_map}).to_string()).unwrap();
    }

    fn floats(c: &Checkpoint, name: &str, rows: Range<usize>) -> Vec<f32> {
        let mut buf = vec![1, 2, 3];
        c.read_rows(name, rows, &mut buf).unwrap();
        buf.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn error(d: &TempDir) -> String {
        Checkpoint::open(d.path()).unwrap_err().to_string()
    }

    #[test]
    fn shards() {
        let d = sharded();
        let c = Checkpoint::open(d.path()).unwrap();
        assert_eq!(floats(&c, "a", 1..3), [2.0, 3.0, 4.0, 5.0]);
        assert_eq!(floats(&c, "b", 0..1), [8.0]);
        assert_eq!(floats(&c, "c", 0..3), [0.0, 1.0, 2.0]);
        assert_eq!(floats(&c, "c", 3..3), [0.0; 0]);
        assert_eq!((c.contains("a"), c.contains("d")), (Some(true), Some(false)));
        assert_eq!(c.resolve("a", &[4, 2]), Ok(DType::F32));
        assert_eq!(c.resolve("b", &[]), Ok(DType::F32));
        assert_eq!(c.resolve("a", &[2, 4]).unwrap_err(), "tensor 'a' has shape [4, 2], expected [2, 4]");
        assert_eq!(c.resolve("cc", &[3]).unwrap_err(), "tensor 'cc' is missing; the nearest names are 'c', 'a', 'b'");
        assert_eq!(c.unused(["a", "c", "x"]), ["b"]);
        assert_eq!(c.source().weights.keys().collect::<Vec<_>>(), ["one.safetensors", "two.safetensors"]);
        assert_eq!(c.source().config_sha256, digest::sha256(b"{}"));
        for (name, rows, message) in [("a", 2..5, "tensor 'a': has 4 rows; 2..5 were asked for"), ("x", 0..1, "tensor 'x': is missing")] {
            assert_eq!(c.read_rows(name, rows, &mut vec![]).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn symlinked_like_the_hub_cache() {
        let blobs = tempfile::tempdir().unwrap();
        write_shard(blobs.path().join("blob"), &[("a", &[2])]);
        let d = dir("{}");
        symlink(blobs.path().join("blob"), d.path().join(WEIGHTS)).unwrap();
        assert_eq!(floats(&Checkpoint::open(d.path()).unwrap(), "a", 1..2), [1.0]);
    }

    #[test]
    fn fixture() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/qwen2-vl");
        let c = Checkpoint::open(&dir).unwrap();
        assert_eq!(c.config()["model_type"], "qwen2_vl");
        let rows = c.config()["vocab_size"].as_u64().unwrap() as usize;
        assert_eq!(c.resolve("model.embed_tokens.weight", &[rows, 64]), Ok(DType::BF16));
        let bytes = fs::read(dir.join(WEIGHTS)).unwrap();
        let reference = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in reference.tensors() {
            let mut buf = vec![];
            c.read_rows(&name, 0..view.shape()[0], &mut buf).unwrap();
            assert_eq!(buf, view.data(), "{name}");
        }
        assert_eq!(c.json("generation_config.json").unwrap().unwrap()["top_k"], 1);
        assert_eq!(c.json("no_such_file.json").unwrap(), None);
    }

    #[test]
    fn renaming() {
        fn strip(name: &str) -> Cow<'_, str> {
            name.strip_prefix("model.").unwrap_or(name).into()
        }
        let d = dir("{}");
        write_shard(d.path().join(WEIGHTS), &[("model.a", &[1]), ("b", &[1])]);
        let c = Checkpoint::open(d.path()).unwrap().with_names(strip).unwrap();
        assert_eq!((c.contains("a"), c.contains("model.a")), (Some(true), Some(false)));
        assert_eq!(floats(&c, "b", 0..1), [1.0]);
        write_shard(d.path().join(WEIGHTS), &[("model.a", &[1]), ("a", &[1])]);
        let message = Checkpoint::open(d.path()).unwrap().with_names(strip).unwrap_err().to_string();
        assert!(message.ends_with("tensors 'a' and 'model.a' are both 'a': two layouts in one checkpoint"), "{message}");
    }

    #[test]
    fn config_only() {
        let open = |config: &str| Checkpoint::from_config(dir(config).path().join(CONFIG));
        for (config, dtype) in [
            (r#"{"torch_dtype": "bfloat16"}"#, DType::BF16),
            (r#"{"dtype": "float16"}"#, DType::F16),
            (r#"{"torch_dtype": null, "dtype": "float16"}"#, DType::F16),
            (r#"{"torch_dtype": null}"#, DType::F32),
            ("{}", DType::F32),
        ] {
            let c = open(config).unwrap();
            assert_eq!((c.contains("a"), c.resolve("a", &[1, 2])), (None, Ok(dtype)));
            assert_eq!(
                c.read_rows("a", 0..1, &mut vec![]).unwrap_err().to_string(),
                "tensor 'a': has no data: only the configuration was given"
            );
            assert_eq!((c.unused([]), c.source().weights.len()), (vec![], 0));
        }
        let message = open(r#"{"dtype": "float8"}"#).unwrap_err().to_string();
        assert_eq!(message, r#"config.json: `dtype`: is "float8"; float32, float16 and bfloat16 are supported"#);
    }

    #[test]
    fn integer_and_unknown_types() {
        let d = dir("{}");
        let header = br#"{"i":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},"f":{"dtype":"F64","shape":[1],"data_offsets":[8,16]},"e":{"dtype":"F32","shape":[0,5],"data_offsets":[16,16]}}"#;
        fs::write(d.path().join(WEIGHTS), [&(header.len() as u64).to_le_bytes()[..], header, &[0; 16]].concat()).unwrap();
        let c = Checkpoint::open(d.path()).unwrap();
        assert_eq!(c.resolve("i", &[1]), Ok(DType::I64));
        assert_eq!(c.resolve("f", &[1]).unwrap_err(), "tensor 'f' has type F64, which is not supported");
        assert_eq!(floats(&c, "e", 0..0), [0.0; 0]);
    }

    #[test]
    fn bad_directories() {
        let d = tempfile::tempdir().unwrap();
        assert!(error(&d).ends_with("config.json: is missing: not a Hugging Face checkpoint"));
        assert!(Checkpoint::open(d.path().join("no")).unwrap_err().to_string().ends_with("no: is not a directory"));
        let d = dir("{\n \"a\": }");
        assert!(error(&d).ends_with("config.json: expected value at line 2 column 7"), "{}", error(&d));
        assert!(error(&dir("[]")).ends_with("config.json: is not a JSON object"));
        let d = dir("{}");
        assert!(error(&d).ends_with(
            "has no weights: no model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json, \
             nor another *.bin, *.pt or *.pth file"
        ));
        write_shard(d.path().join("model-00001-of-00002.safetensors"), &[]);
        assert!(error(&d).contains("has model-00001-of-00002.safetensors but no model.safetensors.index.json"));
        fs::write(d.path().join("pytorch_model-00001-of-00002.bin"), "").unwrap();
        fs::write(d.path().join("optimizer.pt"), "").unwrap();
        assert!(error(&d).contains("has pytorch_model-00001-of-00002.bin but no pytorch_model.bin.index.json"), "{}", error(&d));
        fs::write(d.path().join("b.pt"), "").unwrap();
        assert!(error(&d).contains("b.pt: is no PyTorch file"), "{}", error(&d));
        fs::write(d.path().join("a.bin"), "").unwrap();
        assert!(error(&d).contains("has several PyTorch files (a.bin, b.pt); give a directory with one of them"), "{}", error(&d));
        let huge = File::create(d.path().join(CONFIG)).unwrap();
        huge.set_len(MAX_JSON + 1).unwrap();
        assert!(error(&d).contains("config.json: is 16777217 bytes long"), "{}", error(&d));
    }

    #[test]
    fn bad_shards() {
        let d = sharded();
        let two = d.path().join("two.safetensors");
        let len = fs::metadata(&two).unwrap().len();
        File::options().write(true).open(&two).unwrap().set_len(len - 5).unwrap();
        let expected =
            format!("two.safetensors: is truncated: it is {} bytes long, its header says {len}; copy or download it again", len - 5);
        assert!(error(&d).ends_with(&expected), "{}", error(&d));
        fs::remove_file(&two).unwrap();
        assert!(error(&d).contains("two.safetensors: is missing"));
        write_shard(&two, &[("c", &[3]), ("a", &[1])]);
        assert!(error(&d).ends_with("two.safetensors: tensor 'a' is also in one.safetensors"), "{}", error(&d));
        write_shard(&two, &[("d", &[3])]);
        assert!(error(&d).ends_with("places tensor 'c' in two.safetensors, which does not have it"), "{}", error(&d));
        for name in ["../two.safetensors", "/etc/passwd", "", "..", "a\\b"] {
            index(&d, json!({"a": name}));
            assert!(error(&d).contains("is not the name of a file in this directory"), "{}", error(&d));
        }
        index(&d, json!({}));
        assert!(error(&d).ends_with("index.json: names no tensors"));
        index(&d, json!(3));
        assert!(error(&d).contains("index.json: invalid type"), "{}", error(&d));
    }
}
