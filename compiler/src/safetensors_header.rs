//! The header of a safetensors file: `u64` length, that many bytes of JSON, then the tensors' data without holes.
//!
//! Read here and not by the `safetensors` crate because that wants the whole file in memory, and because its errors do not
//! name the tensor. The rules are the same ones.

use crate::{
    Error, Result, digest,
    stored::{Stored, check_name},
};
use safetensors::Dtype;
use serde::{Deserialize, Deserializer, de};
use std::{collections::BTreeMap, fmt, fs::File, os::unix::fs::FileExt, path::Path};

/// Longest header that the reference implementation accepts.
pub(crate) const MAX_HEADER: u64 = 100_000_000;

/// A validated header.
#[derive(Debug)]
pub(crate) struct Header {
    /// Tensors in the order of their data; their ranges tile the data section.
    pub(crate) tensors: Vec<(String, Stored)>,
    /// `__metadata__`.
    pub(crate) metadata: BTreeMap<String, String>,
    /// Digest of the JSON.
    pub(crate) sha256: String,
}

impl Header {
    /// Reads the header of `file` and checks it against the length of the file. `path` is for errors.
    pub(crate) fn read(path: &Path, file: &File) -> Result<Self> {
        let stat = file.metadata().map_err(Error::io(path))?;
        if !stat.is_file() {
            return Err(Error::file(path, "is not a regular file"));
        }
        let file_len = stat.len();
        let mut prefix = [0; 8];
        if file_len < 8 {
            return Err(Error::file(path, format!("is {file_len} bytes long, too short for a safetensors file")));
        }
        file.read_exact_at(&mut prefix, 0).map_err(Error::io(path))?;
        let header_len = u64::from_le_bytes(prefix);
        if header_len > MAX_HEADER {
            return Err(Error::file(path, format!("is not a safetensors file: header length {header_len} exceeds {MAX_HEADER}")));
        }
        if header_len > file_len - 8 {
            return Err(Error::file(
                path,
                format!("is truncated: it is {file_len} bytes long, its header alone ends at {}", header_len + 8),
            ));
        }
        let mut json = vec![0; header_len as usize];
        file.read_exact_at(&mut json, 8).map_err(Error::io(path))?;
        let raw = RawHeader::parse(&json).map_err(|e| Error::file(path, format!("bad safetensors header: {e}")))?;
        let (tensors, end) = raw.lay_out(8 + header_len).map_err(|e| Error::file(path, format!("bad safetensors header: {e}")))?;
        if file_len < end {
            return Err(Error::file(
                path,
                format!("is truncated: it is {file_len} bytes long, its header says {end}; copy or download it again"),
            ));
        }
        if file_len > end {
            return Err(Error::file(path, format!("is {file_len} bytes long, but its last tensor ends at {end}")));
        }
        Ok(Self { tensors, metadata: raw.metadata, sha256: digest::sha256(&json) })
    }
}

/// The JSON as written.
#[derive(Debug, Default)]
struct RawHeader {
    tensors: BTreeMap<String, RawTensor>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(expecting = "an object of dtype, shape and data_offsets")]
struct RawTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl RawHeader {
    fn parse(json: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(json).map_err(|e| e.to_string())
    }

    /// Tensors in the order of their data, and where the last one ends. The ranges must follow one another from `start` on.
    fn lay_out(&self, start: u64) -> Result<(Vec<(String, Stored)>, u64), String> {
        let mut order: Vec<_> = self.tensors.iter().collect();
        order.sort_by_key(|(_, t)| t.data_offsets);
        let (mut end, mut tensors) = (0, Vec::with_capacity(order.len()));
        for (name, RawTensor { dtype, shape, data_offsets: [from, to] }) in order {
            if *from != end || to < from {
                return Err(format!("tensor '{name}' lies at [{from}, {to}], but the data before it ends at {end}"));
            }
            let bits = shape.iter().try_fold(dtype.bitsize(), |n, d| n.checked_mul(*d));
            if bits.is_none_or(|bits| bits % 8 != 0 || (bits / 8) as u64 != to - from) {
                return Err(format!("tensor '{name}' of type {dtype} and shape {shape:?} cannot take {} bytes", to - from));
            }
            end = *to;
            let range = start.checked_add(*from).zip(start.checked_add(*to));
            let (from, to) = range.ok_or_else(|| format!("tensor '{name}' ends at {to}"))?;
            tensors.push((name.clone(), Stored { dtype: *dtype, shape: shape.clone(), range: from..to, strides: None }));
        }
        Ok((tensors, start + end))
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            // By hand because a derived map keeps the last of two entries with the same name.
            fn visit_map<M: de::MapAccess<'de>>(self, mut map: M) -> Result<RawHeader, M::Error> {
                let mut header = RawHeader::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                        continue;
                    }
                    check_name(&name).map_err(de::Error::custom)?;
                    let tensor = map.next_value().map_err(|e| de::Error::custom(format!("tensor '{name}': {e}")))?;
                    if header.tensors.contains_key(&name) {
                        return Err(de::Error::custom(format!("tensor '{name}' is listed twice")));
                    }
                    header.tensors.insert(name, tensor);
                }
                Ok(header)
            }
        }
        json.deserialize_map(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn read(bytes: &[u8]) -> Result<Header, String> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Header::read(Path::new("x.safetensors"), &file).map_err(|e| e.to_string())
    }

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;

    #[test]
    fn good() {
        let header = read(&file(GOOD, 16)).unwrap();
        let start = 8 + GOOD.len() as u64;
        let listed: Vec<_> = header.tensors.iter().map(|(n, t)| (n.as_str(), t.dtype, t.shape.as_slice(), t.range.clone())).collect();
        assert_eq!(listed, [("a", Dtype::F32, &[][..], start..start + 4), ("b", Dtype::BF16, &[2, 3][..], start + 4..start + 16)]);
        assert_eq!(header.metadata["format"], "pt");
        assert_eq!(header.sha256, digest::sha256(GOOD.as_bytes()));
        assert!(read(&file("{}", 0)).unwrap().tensors.is_empty());
    }

    #[test]
    fn bad() {
        let one = |entry: &str| format!(r#"{{"t":{entry}}}"#);
        let huge = u64::MAX;
        for (bytes, expected) in [
            (vec![1; 7], "7 bytes long, too short"),
            (file(GOOD, 15), "is truncated: it is 164 bytes long, its header says 165"),
            (file(GOOD, 17), "is 166 bytes long, but its last tensor ends at 165"),
            (u64::MAX.to_le_bytes().to_vec(), "header length 18446744073709551615 exceeds 100000000"),
            (99u64.to_le_bytes().to_vec(), "its header alone ends at 107"),
            (file("{", 0), "bad safetensors header: EOF"),
            (file("[]", 0), "an object of tensors"),
            (file("\u{0}", 0), "bad safetensors header"),
            (
                file(&one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#), 4),
                "tensor 't' of type F32 and shape [2] cannot take 4 bytes",
            ),
            (
                file(&one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#), 8),
                "tensor 't' lies at [4, 8], but the data before it ends at 0",
            ),
            (file(&one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#), 8), "tensor 't' lies at [4, 0]"),
            (file(&one(r#"{"dtype":"Q7","shape":[1],"data_offsets":[0,4]}"#), 4), "tensor 't': unknown variant `Q7`"),
            (file(&one(r#"{"dtype":"F4","shape":[1],"data_offsets":[0,1]}"#), 1), "tensor 't' of type F4"),
            (file(&one(r#"{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}"#), 1), "tensor 't': invalid value: integer `-1`"),
            (file(&one(r#"{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}"#), 0), "cannot take 0 bytes"),
            (file(&one(&format!(r#"{{"dtype":"U8","shape":[{}],"data_offsets":[0,{huge}]}}"#, huge / 8)), 0), "cannot take"),
            (
                file(r#"{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#, 0),
                "tensor 't' is listed twice",
            ),
            (
                file(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#, 6),
                "tensor 'b' lies at [2, 6], but the data before it ends at 4",
            ),
            (file(&format!(r#"{{"{}":{{}}}}"#, "n".repeat(2000)), 0), "is too long or has control characters"),
            (file(r#"{"\u001b[2J":{}}"#, 0), "is too long or has control characters"),
        ] {
            let message = read(&bytes).unwrap_err();
            assert!(message.starts_with("x.safetensors: "), "{message}");
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
    }

    proptest! {
        /// Whatever happens to the bytes: an error, or a header whose ranges lie in the file; and no other verdict than the
        /// reference implementation's, but for names that we refuse.
        #[test]
        fn mutated(edits in prop::collection::vec((0usize..165, any::<u8>()), 1..6), cut in prop::option::weighted(0.1, 0usize..165)) {
            let mut bytes = file(GOOD, 16);
            for (at, byte) in edits {
                bytes[at] = byte;
            }
            bytes.truncate(cut.unwrap_or(165));
            let reference = safetensors::SafeTensors::deserialize(&bytes);
            match read(&bytes) {
                Ok(header) => {
                    prop_assert!(reference.is_ok(), "{:?}", reference.err());
                    prop_assert!(header.tensors.iter().all(|(_, t)| t.range.start <= t.range.end && t.range.end <= bytes.len() as u64));
                }
                Err(message) if reference.is_ok() => prop_assert!(message.contains("control characters") || message.contains("twice"), "{message}"),
                Err(_) => {}
            }
        }
    }
}
