//! Writes a safetensors file of any size, in any order, with little memory.
//!
//! All tensors are declared first, which fixes the header and every offset; their bytes may then come in any order and from
//! any thread. Every tensor starts at a multiple of [`ALIGNMENT`] of the *file* (so that it can be used where it lies in a
//! mapped file): the header is padded with spaces, and since the format allows no holes, gaps between tensors are `u8` tensors
//! named `_pad.N`, full of zeros. The digest of the data follows the writers, as far as the file is complete from its start.

use crate::{Error, Result, digest, safetensors_header::MAX_HEADER};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};
use vlmc_artifact::{DATA_SHA256, DType, FileEntry};

/// Bytes: a cache line, and the widest SIMD register.
pub const ALIGNMENT: u64 = 64;
/// Prefix of the names of filling tensors.
pub const PAD: &str = "_pad.";
/// Hex digits of a SHA-256.
const DIGEST_LEN: usize = 64;

/// Name, type and shape of a tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Length in bytes; `None` if that overflows.
    pub fn bytes(&self) -> Option<u64> {
        self.shape.iter().try_fold(self.dtype.size() as u64, |n, d| n.checked_mul(*d as u64))
    }
}

/// A safetensors file under construction.
#[derive(Debug)]
pub struct WeightsWriter {
    path: PathBuf,
    file: File,
    tensors: Vec<Slot>,
    by_name: HashMap<String, usize>,
    data_start: u64,
    digest_at: u64,
    digested: Mutex<Digested>,
}

#[derive(Debug)]
struct Slot {
    name: String,
    offset: u64,
    len: u64,
    /// What some thread has begun to write.
    begun: Mutex<Ranges>,
    /// What is in the file.
    written: Mutex<Ranges>,
}

/// Disjoint ranges that are not adjacent: start to end.
#[derive(Debug, Default)]
struct Ranges(BTreeMap<u64, u64>);

/// The digest of the data up to some place.
#[derive(Debug, Default)]
struct Digested {
    hash: Sha256,
    /// Bytes of the data.
    end: u64,
    /// The first tensor that is not wholly among them.
    tensor: usize,
    /// For reading.
    tile: Vec<u8>,
}

impl WeightsWriter {
    /// Creates (or truncates) the file and writes its header. The tensors lie in the order of their declaration.
    ///
    /// # Errors
    /// A name occurs twice or begins with [`PAD`], a size overflows, the header gets longer than readers accept, or the file
    /// cannot be written.
    pub fn create(path: impl Into<PathBuf>, specs: &[TensorSpec]) -> Result<Self> {
        let path = path.into();
        let mut by_name = HashMap::with_capacity(specs.len());
        let (mut tensors, mut header, mut end, mut pads) = (Vec::with_capacity(specs.len()), String::new(), 0u64, 0);
        let mut list = |name: &str, dtype: DType, shape: &[usize], from: u64, to: u64| {
            let entry = json!({"dtype": dtype.to_string().to_uppercase(), "shape": shape, "data_offsets": [from, to]});
            header.push_str(&format!(",{}:{entry}", json!(name)));
        };
        for spec in specs {
            let TensorSpec { name, dtype, shape } = spec;
            let too_large = || Error::tensor(name, format!("of shape {shape:?} does not fit into a file"));
            if name.starts_with(PAD) || name == "__metadata__" {
                return Err(Error::tensor(name, "has a reserved name"));
            }
            if by_name.insert(name.clone(), tensors.len()).is_some() {
                return Err(Error::tensor(name, "is declared twice"));
            }
            let offset = end.checked_next_multiple_of(ALIGNMENT).ok_or_else(too_large)?;
            if offset > end {
                list(&format!("{PAD}{pads}"), DType::U8, &[(offset - end) as usize], end, offset);
                pads += 1;
            }
            let len = spec.bytes().ok_or_else(too_large)?;
            // File offsets are signed.
            end = offset.checked_add(len).filter(|end| *end < i64::MAX as u64 - MAX_HEADER).ok_or_else(too_large)?;
            list(name, *dtype, shape, offset, end);
            tensors.push(Slot { name: name.clone(), offset, len, begun: Mutex::default(), written: Mutex::default() });
        }

        // The digest is only known at the end: its place is kept by zeros.
        let before = format!(r#"{{"__metadata__":{{"{DATA_SHA256}":""#);
        let mut json = format!(r#"{before}{:0DIGEST_LEN$}","format":"pt"}}{header}}}"#, 0);
        let data_start = (8 + json.len() as u64).next_multiple_of(ALIGNMENT);
        json.extend(std::iter::repeat_n(' ', data_start as usize - 8 - json.len()));
        if json.len() as u64 > MAX_HEADER {
            return Err(Error::file(path, format!("the header of {} tensors is longer than safetensors allows", specs.len())));
        }
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).map_err(Error::io(&path))?;
        let io = |result: std::io::Result<()>| result.map_err(Error::io(&path));
        io(file.set_len(data_start + end))?;
        io(file.write_all_at(&(json.len() as u64).to_le_bytes(), 0))?;
        io(file.write_all_at(json.as_bytes(), 8))?;
        let digest_at = 8 + before.len() as u64;
        Ok(Self { path, file, tensors, by_name, data_start, digest_at, digested: Mutex::default() })
    }

    /// Where the tensor starts in the file.
    ///
    /// # Errors
    /// It was not declared.
    pub fn offset_of(&self, tensor: &str) -> Result<u64> {
        Ok(self.data_start + self.slot(tensor)?.offset)
    }

    /// Length of the tensor in bytes.
    ///
    /// # Errors
    /// It was not declared.
    pub fn len_of(&self, tensor: &str) -> Result<u64> {
        Ok(self.slot(tensor)?.len)
    }

    /// Length of the whole file.
    pub fn file_len(&self) -> u64 {
        self.data_start + self.tensors.last().map_or(0, |t| t.offset + t.len)
    }

    /// Writes part of a tensor, starting at `offset` bytes of it. May be called from several threads at once.
    ///
    /// # Errors
    /// The tensor was not declared, the bytes lie outside it or were written before, or the file cannot be written.
    pub fn write_at(&self, tensor: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let slot = self.slot(tensor)?;
        let end = offset
            .checked_add(bytes.len() as u64)
            .filter(|end| *end <= slot.len)
            .ok_or_else(|| Error::tensor(tensor, format!("has {} bytes; {} were written at {offset}", slot.len, bytes.len())))?;
        if bytes.is_empty() {
            return Ok(());
        }
        if !locked(&slot.begun).add(offset, end) {
            return Err(Error::tensor(&slot.name, format!("bytes {offset}..{end} were partly written before")));
        }
        self.file.write_all_at(bytes, self.data_start + slot.offset + offset).map_err(Error::io(&self.path))?;
        locked(&slot.written).add(offset, end);
        // If another thread is at it, it or a later one goes on with this.
        match self.digested.try_lock() {
            Ok(mut digested) => self.digest(&mut digested, digest::TILE),
            Err(_) => Ok(()),
        }
    }

    /// Goes on with the digest as far as the file is complete, in tiles of at least so many bytes.
    fn digest(&self, digested: &mut Digested, least: usize) -> Result<()> {
        let mut complete = self.file_len() - self.data_start;
        while let Some(slot) = self.tensors.get(digested.tensor) {
            let written = locked(&slot.written).first_gap();
            if written < slot.len {
                complete = slot.offset + written;
                break;
            }
            digested.tensor += 1;
        }
        while let Some(len) = complete.checked_sub(digested.end).map(|n| n.min(digest::TILE as u64) as usize)
            && len >= least.max(1)
        {
            digested.tile.resize(len, 0);
            self.file.read_exact_at(&mut digested.tile, self.data_start + digested.end).map_err(Error::io(&self.path))?;
            digested.hash.update(&digested.tile);
            digested.end += len as u64;
        }
        Ok(())
    }

    /// Completes the header with the digest of the data section, and returns it with the length of the file.
    ///
    /// # Errors
    /// A tensor is incomplete, or the file cannot be read back and written.
    pub fn finish(self) -> Result<FileEntry> {
        for slot in &self.tensors {
            slot.check_complete()?;
        }
        let mut digested = std::mem::take(&mut *locked(&self.digested));
        self.digest(&mut digested, 1)?;
        let sha256 = digest::hex(&digested.hash.finalize());
        self.file.write_all_at(sha256.as_bytes(), self.digest_at).map_err(Error::io(&self.path))?;
        Ok(FileEntry { bytes: self.file_len(), sha256, header_sha256: None })
    }

    fn slot(&self, tensor: &str) -> Result<&Slot> {
        let index = self.by_name.get(tensor).ok_or_else(|| Error::tensor(tensor, "was not declared"))?;
        Ok(&self.tensors[*index])
    }
}

impl Slot {
    fn check_complete(&self) -> Result<()> {
        let first_gap = locked(&self.written).first_gap();
        if first_gap < self.len {
            return Err(Error::tensor(&self.name, format!("is incomplete: byte {first_gap} of {} was not written", self.len)));
        }
        Ok(())
    }
}

impl Ranges {
    /// Adds `start..end`; false if a part of it was there.
    fn add(&mut self, start: u64, end: u64) -> bool {
        let before = self.0.range(..=start).next_back().map(|(s, e)| (*s, *e));
        let after = self.0.range(start..).next().map(|(s, e)| (*s, *e));
        if before.is_some_and(|(_, e)| e > start) || after.is_some_and(|(s, _)| s < end) {
            return false;
        }
        let start = before.filter(|(_, e)| *e == start).map_or(start, |(s, _)| s);
        let end = match after {
            Some((s, e)) if s == end => {
                self.0.remove(&s);
                e
            }
            _ => end,
        };
        self.0.insert(start, end);
        true
    }

    /// The first number from 0 that is in none.
    fn first_gap(&self) -> u64 {
        self.0.get(&0).copied().unwrap_or(0)
    }
}

/// What the mutex guards is whole at any time.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors_header::Header;
    use proptest::prelude::*;
    use std::{fs, path::Path};

    fn spec(name: &str, dtype: DType, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.into() }
    }

    fn content(spec: &TensorSpec) -> Vec<u8> {
        (0..spec.bytes().unwrap()).map(|i| (i * 7 + spec.name.len() as u64) as u8).collect()
    }

    /// Writes every tensor in tiles of `tile` bytes, the last tensor first.
    fn write(path: &Path, specs: &[TensorSpec], tile: usize) -> FileEntry {
        let w = WeightsWriter::create(path, specs).unwrap();
        for s in specs.iter().rev() {
            for (i, bytes) in content(s).chunks(tile).enumerate().rev() {
                w.write_at(&s.name, (i * tile) as u64, bytes).unwrap();
            }
        }
        w.finish().unwrap()
    }

    #[test]
    fn reference_reader_agrees() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        let specs = [
            spec("scalar", DType::F32, &[]),
            spec("a \"quoted\" name", DType::BF16, &[3, 5]),
            spec("empty", DType::F32, &[0, 4]),
            spec("flags", DType::Bool, &[64]),
            spec("ids", DType::I64, &[3]),
        ];
        let entry = write(&path, &specs, 11);
        let bytes = fs::read(&path).unwrap();
        assert_eq!(entry.bytes, bytes.len() as u64);
        let (header_len, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let data = &bytes[8 + header_len..];
        assert_eq!(entry.sha256, digest::sha256(data));
        assert_eq!(metadata.metadata().as_ref().unwrap()[DATA_SHA256], entry.sha256);
        let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let offsets = WeightsWriter::create(dir.path().join("again"), &specs).unwrap();
        for s in &specs {
            let view = all.tensor(&s.name).unwrap();
            assert_eq!((view.shape(), view.data()), (&s.shape[..], &content(s)[..]));
            let at = offsets.offset_of(&s.name).unwrap() as usize;
            assert_eq!(at % 64, 0);
            assert_eq!(&bytes[at..at + view.data().len()], view.data());
        }
        let pads = all.iter().filter(|(n, _)| n.starts_with(PAD)).map(|(_, v)| v.data().iter().all(|b| *b == 0)).collect::<Vec<_>>();
        assert_eq!(pads, [true, true]);
        assert_eq!(Header::read(&path, &File::open(&path).unwrap()).unwrap().tensors.len(), 7);
    }

    #[test]
    fn order_and_tiles_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let specs = [spec("x", DType::F16, &[7, 9]), spec("y", DType::U8, &[1000])];
        let (one, two) = (dir.path().join("1"), dir.path().join("2"));
        assert_eq!(write(&one, &specs, 1), write(&two, &specs, 64));
        assert_eq!(fs::read(one).unwrap(), fs::read(two).unwrap());
        let none = dir.path().join("none");
        write(&none, &[], 1);
        safetensors::SafeTensors::deserialize(&fs::read(none).unwrap()).unwrap();
    }

    #[test]
    fn misuse() {
        let dir = tempfile::tempdir().unwrap();
        let create = |specs: &[TensorSpec]| WeightsWriter::create(dir.path().join("w"), specs);
        let message = |r: Result<()>| r.unwrap_err().to_string();
        let failed = |specs: &[TensorSpec]| create(specs).unwrap_err().to_string();
        assert_eq!(failed(&[spec("a", DType::U8, &[1]), spec("a", DType::U8, &[1])]), "tensor 'a': is declared twice");
        assert_eq!(failed(&[spec("_pad.3", DType::U8, &[1])]), "tensor '_pad.3': has a reserved name");
        assert_eq!(failed(&[spec("a", DType::F32, &[1 << 62])]), "tensor 'a': of shape [4611686018427387904] does not fit into a file");

        let w = create(&[spec("a", DType::U8, &[10])]).unwrap();
        w.write_at("a", 2, &[0; 3]).unwrap();
        w.write_at("a", 0, &[]).unwrap();
        assert_eq!(message(w.write_at("b", 0, &[0])), "tensor 'b': was not declared");
        assert_eq!(message(w.write_at("a", 8, &[0; 3])), "tensor 'a': has 10 bytes; 3 were written at 8");
        assert_eq!(message(w.write_at("a", u64::MAX, &[0; 3])), "tensor 'a': has 10 bytes; 3 were written at 18446744073709551615");
        for (at, len) in [(1, 2), (2, 1), (3, 1), (4, 4), (0, 10)] {
            assert_eq!(
                message(w.write_at("a", at, &vec![0; len])),
                format!("tensor 'a': bytes {at}..{} were partly written before", at + len as u64)
            );
        }
        w.write_at("a", 0, &[0; 2]).unwrap();
        w.write_at("a", 6, &[0; 4]).unwrap();
        assert_eq!(message(w.finish().map(|_| ())), "tensor 'a': is incomplete: byte 5 of 10 was not written");
    }

    proptest! {
        /// Overlaps and gaps are told exactly, against a bit per byte.
        #[test]
        fn coverage(ranges in prop::collection::vec((0u64..24, 1u64..9), 0..20)) {
            let mut known = Ranges::default();
            let mut bits = [false; 24];
            for (start, len) in ranges {
                let end = (start + len).min(24);
                let bits = &mut bits[start as usize..end as usize];
                prop_assert_eq!(known.add(start, end), bits.iter().all(|b| !b));
                if bits.iter().all(|b| !b) {
                    bits.fill(true);
                }
            }
            prop_assert_eq!(known.first_gap(), bits.iter().take_while(|b| **b).count() as u64);
        }
    }
}
