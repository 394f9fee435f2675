//! Weights in the files of `torch.save` and `torch.jit.save`: `pytorch_model.bin`, `ViT-B-32.pt`.
//!
//! Since torch 1.6 such a file is a zip archive without compression: `<name>/data.pkl`, a pickle of the tensors' shapes and
//! types, and each storage as an entry `<name>/data/<key>`, which we read by its offset. Before, it was five pickles one after
//! another (a magic number, a version, facts about the machine, the tensors, the keys of the storages) and then the storages.
//! The pickles are read by [`pickle`], which runs nothing.

mod pickle;

use crate::{
    Error, Result, digest,
    stored::{Stored, check_name, readable},
};
use pickle::{MAX_PICKLE, Pickle, Storage, Tensor, Value};
use std::{collections::HashMap, fs::File, io::BufReader, iter, ops::Range, os::unix::fs::FileExt, path::Path};
use zip::{CompressionMethod, ZipArchive};

/// How a file of torch before 1.6 starts: the pickle of its magic number.
const OLD_MAGIC: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
/// How the first entry of a zip archive starts.
const ZIP_MAGIC: &[u8] = b"PK\x03\x04";
/// Most axes of a tensor in torch.
const MAX_RANK: usize = 64;

/// The tensors of a file, sorted by name, and the digest of its pickle (of its pickles, if it is an old one).
///
/// # Errors
/// It is no such file, truncated, or has compressed data; its pickle refers to anything but parts of tensors; a tensor does not
/// lie within its storage, or with strides that cannot be read.
pub(crate) fn read(path: &Path, file: &File) -> Result<(Vec<(String, Stored)>, String)> {
    let stat = file.metadata().map_err(Error::io(path))?;
    if !stat.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    let mut start = [0; OLD_MAGIC.len()];
    let n = start.len().min(stat.len() as usize);
    file.read_exact_at(&mut start[..n], 0).map_err(Error::io(path))?;
    if start.starts_with(ZIP_MAGIC) {
        read_zip(file, stat.len())
    } else if start == OLD_MAGIC {
        read_old(file, stat.len())
    } else {
        Err("is no PyTorch file: it starts neither as a zip archive nor as the files of torch before 1.6; copy or download it again".into())
    }
    .map_err(|message| Error::file(path, message))
}

fn read_zip(file: &File, file_len: u64) -> Result<(Vec<(String, Stored)>, String), String> {
    let mut archive = ZipArchive::new(BufReader::new(file))
        .map_err(|e| format!("is a zip archive that cannot be read ({e}); perhaps it is truncated: copy or download it again"))?;
    if archive.has_duplicate_names() {
        return Err("is a zip archive with two entries of the same name".into());
    }
    let root = |name: &[u8]| str::from_utf8(name).ok()?.strip_suffix("/data.pkl").filter(|root| !root.contains('/')).map(String::from);
    let roots: Vec<_> = archive.file_names_raw().filter_map(root).collect();
    let [root] = &roots[..] else {
        return Err("is a zip archive, but not of torch.save: it must have one entry <name>/data.pkl".into());
    };
    let mut entry = |name: &str| -> Result<Option<Range<u64>>, String> {
        let name = format!("{root}/{name}");
        let Some(index) = archive.index_for_name_raw(name.as_bytes()) else { return Ok(None) };
        let entry = archive.by_index_raw(index).map_err(|e| format!("entry {name:?}: {e}"))?;
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(format!(
                "entry {name:?} is compressed or encrypted, which torch.save never does; save it again, or extract the archive and zip it with `zip -0`"
            ));
        }
        let start = entry.data_start().ok_or_else(|| format!("entry {name:?} has no data"))?;
        let end = start.checked_add(entry.compressed_size()).filter(|end| *end <= file_len);
        Ok(Some(start..end.ok_or_else(|| format!("entry {name:?} reaches beyond the end of the file: copy or download it again"))?))
    };
    if let Some(order) = entry("byteorder")?
        && load(file, &order)? != b"little"
    {
        return Err("was written on a big-endian machine, which is not supported; convert it to safetensors".into());
    }
    let bytes = load(file, &entry("data.pkl")?.unwrap_or_default())?;
    let pickle = Pickle::read(&bytes)?;
    let mut data = HashMap::new();
    for Storage { key, .. } in &pickle.storages {
        if !data.contains_key(key) {
            let range = entry(&format!("data/{key}"))?.ok_or_else(|| format!("has no entry 'data/{key}', which a tensor needs"))?;
            data.insert(*key, range);
        }
    }
    Ok((lay_out(&pickle, &data)?, digest::sha256(&bytes)))
}

fn read_old(file: &File, file_len: u64) -> Result<(Vec<(String, Stored)>, String), String> {
    let bytes = load(file, &(0..file_len.min(MAX_PICKLE)))?;
    let mut at = OLD_MAGIC.len();
    let mut next = || {
        let pickle = Pickle::read(&bytes[at..])?;
        at += pickle.len;
        Ok::<_, String>(pickle)
    };
    let (version, system, pickle, keys) = (next()?, next()?, next()?, next()?);
    if !matches!(version.root, Value::Int(1001)) {
        return Err("has an unknown version of the format of torch before 1.6".into());
    }
    if !matches!(system.get("little_endian"), Some(Value::Bool(true))) {
        return Err("was written on a big-endian machine, which is not supported; convert it to safetensors".into());
    }
    let sizes: HashMap<_, _> = pickle.storages.iter().map(|s| (s.key, size(s))).collect();
    let (mut data, mut end) = (HashMap::new(), at as u64);
    for key in keys.elements(keys.root).ok_or("has no list of storages")? {
        let Value::Str(key) = *key else { return Err("has a storage whose key is no string".into()) };
        let size = *sizes.get(key).ok_or_else(|| format!("has a storage {key:?} of no tensor"))?;
        let truncated = || format!("is truncated: storage {key:?} reaches beyond its end; copy or download it again");
        let mut len = [0; 8];
        file.read_exact_at(&mut len, end).map_err(|_| truncated())?;
        let start = end + 8;
        let len = u64::from_le_bytes(len).checked_mul(size);
        end = len.and_then(|len| start.checked_add(len)).filter(|end| *end <= file_len).ok_or_else(truncated)?;
        data.insert(key, start..end);
    }
    Ok((lay_out(&pickle, &data)?, digest::sha256(&bytes[..at])))
}

/// The bytes of a range that is in the file.
fn load(file: &File, range: &Range<u64>) -> Result<Vec<u8>, String> {
    let len = range.end - range.start;
    if len > MAX_PICKLE {
        return Err(format!("has a pickle of {len} bytes; at most {MAX_PICKLE} are read"));
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, range.start).map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// Finds each tensor's bytes; `data` is where each storage is.
fn lay_out(pickle: &Pickle<'_>, data: &HashMap<&str, Range<u64>>) -> Result<Vec<(String, Stored)>, String> {
    let mut tensors = pickle.tensors()?;
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(format!("tensor '{}' is listed twice", pair[0].0));
    }
    let place = |(name, tensor): (String, &Tensor)| {
        check_name(&name)?;
        let storage = &pickle.storages[tensor.storage];
        let range = data
            .get(storage.key)
            .ok_or_else(|| format!("tensor '{name}' is in storage {:?}, which the file does not have", storage.key))?;
        let stored = place(tensor, storage, range).map_err(|message| format!("tensor '{name}' {message}"))?;
        Ok((name, stored))
    };
    tensors.into_iter().map(place).collect()
}

fn place(tensor: &Tensor, storage: &Storage<'_>, data: &Range<u64>) -> Result<Stored, String> {
    let Tensor { offset, shape, strides, .. } = tensor;
    let size = size(storage);
    if shape.len() != strides.len() || shape.len() > MAX_RANK {
        return Err(format!("has {} axes and {} strides; they must be as many, and at most {MAX_RANK}", shape.len(), strides.len()));
    }
    let (elements, available) = (storage.len, (data.end - data.start) / size);
    if elements > available {
        return Err(format!("is in a storage of {elements} elements, of which the file has {available}: copy or download it again"));
    }
    let count = shape.iter().try_fold(1, |n: u64, d| n.checked_mul(*d));
    let last = iter::zip(shape, strides).try_fold(*offset, |at, (n, stride)| at.checked_add(n.saturating_sub(1).checked_mul(*stride)?));
    let outside =
        || format!("of shape {shape:?}, strides {strides:?} and offset {offset} does not lie within its storage of {elements} elements");
    let (Some(count), Some(last)) = (count, last) else { return Err(outside()) };
    let dims = shape.iter().map(|n| (*n).try_into().ok()).collect::<Option<Vec<usize>>>().ok_or_else(outside)?;
    if count == 0 {
        return Ok(Stored { dtype: storage.dtype, shape: dims, range: data.start..data.start, strides: None });
    }
    if last >= elements || count > elements {
        return Err(outside());
    }
    let row_major = is_row_major(shape, strides);
    if !row_major && !readable(&dims, strides) {
        return Err(format!(
            "of shape {shape:?} has strides {strides:?}, which are not supported: call .contiguous() on it and save the file again"
        ));
    }
    let range = data.start + offset * size..data.start + (last + 1) * size;
    Ok(Stored { dtype: storage.dtype, shape: dims, range, strides: (!row_major).then(|| strides.clone()) })
}

/// True if the elements follow one another; strides of axes of length 1 do not matter.
fn is_row_major(shape: &[u64], strides: &[u64]) -> bool {
    let mut next = 1;
    iter::zip(shape, strides).rev().all(|(n, stride)| {
        let fits = *n == 1 || *stride == next;
        next *= n;
        fits
    })
}

/// Bytes per element.
fn size(storage: &Storage<'_>) -> u64 {
    storage.dtype.bitsize() as u64 / 8
}
