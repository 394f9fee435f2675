//! Opening an artifact directory: the manifest, and whether the files are those that it speaks of.

use crate::{Error, Result, cpu};
use sha2::{Digest, Sha256};
use std::{
    fs::File,
    io::Read,
    path::{Component, Path, PathBuf},
};
use vlmc_artifact::{DATA_SHA256, FORMAT, FileEntry, MANIFEST, Manifest, is_weights, program::Program};

/// Longest manifest that is read.
const MAX_MANIFEST: u64 = 64 << 20;
/// Files up to this length are hashed whenever an artifact is opened.
const SMALL: u64 = 64 << 20;

/// An artifact whose files are there and belong together.
#[derive(Clone, Debug)]
pub struct Artifact {
    dir: PathBuf,
    manifest: Manifest,
}

impl Artifact {
    /// Opens a directory. Small files are hashed; of a weight file, whose header repeats the digest of its data, only the
    /// header is read, which is enough to notice the weights of another artifact. [`Self::verify`] reads everything.
    ///
    /// # Errors
    /// There is no manifest, or of another format version; a file is missing, has another length or digest, or a name that
    /// leads out of the directory.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self> {
        let dir = dir.into();
        let path = dir.join(MANIFEST);
        if !path.is_file() {
            return Err(Error::file(&dir, format!("is not an artifact: it has no {MANIFEST} (`vlmc compile` makes artifacts)")));
        }
        let json = read_limited(&path, MAX_MANIFEST)?;
        // The format first: a manifest of another version need not have the fields of this one.
        #[derive(serde::Deserialize)]
        struct Format {
            format: u32,
        }
        let invalid = |e: serde_json::Error| Error::file(&path, format!("is not a manifest: {e}"));
        let Format { format } = serde_json::from_slice(&json).map_err(invalid)?;
        if format != FORMAT {
            return Err(Error::file(&path, format!("has format {format}, this version reads {FORMAT}; compile the checkpoint again")));
        }
        let manifest: Manifest = serde_json::from_slice(&json).map_err(invalid)?;
        let artifact = Self { dir, manifest };
        for (name, entry) in &artifact.manifest.files {
            artifact.check(name, entry)?;
        }
        Ok(artifact)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Path of a file that the manifest lists; `None` if it lists no such file.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.manifest.files.contains_key(name).then(|| self.dir.join(name))
    }

    /// Path of a file that must be there.
    ///
    /// # Errors
    /// The manifest does not list it.
    pub fn require(&self, name: &str) -> Result<PathBuf> {
        self.path(name).ok_or_else(|| Error::file(self.dir.join(MANIFEST), format!("lists no file '{name}'")))
    }

    /// The program of an artifact for vlmc's own runtime; `None` for others.
    ///
    /// # Errors
    /// It could not be run safely.
    pub fn program(&self) -> Result<Option<Program>> {
        (self.manifest.target == "cpu").then(|| cpu::program(self)).transpose()
    }

    /// Refuses an artifact that is laid out for another client.
    ///
    /// # Errors
    /// The message names the layout.
    pub fn check_layout(&self) -> Result<()> {
        match &self.manifest.layout {
            None => Ok(()),
            Some(layout) => Err(Error::file(
                &self.dir,
                format!(
                    "has the layout '{layout}', which is for other clients (see its README.md); compile without --layout to run it here"
                ),
            )),
        }
    }

    fn check(&self, name: &str, entry: &FileEntry) -> Result<()> {
        let listed = self.dir.join(MANIFEST);
        if name.is_empty() || !Path::new(name).components().all(|c| matches!(c, Component::Normal(_))) {
            return Err(Error::file(listed, format!("file name '{name}' leads out of the artifact")));
        }
        let path = self.dir.join(name);
        let stat = path.metadata().map_err(Error::io(&path))?;
        if !stat.is_file() {
            return Err(Error::file(path, "is not a file"));
        }
        if stat.len() != entry.bytes {
            return Err(Error::file(
                path,
                format!("has {} bytes, the manifest says {}; compile the checkpoint again", stat.len(), entry.bytes),
            ));
        }
        if let Some(header) = &entry.header_sha256 {
            let file = File::open(&path).map_err(Error::io(&path))?;
            let json = header_json(&path, &file, stat.len())?;
            return same_digest(&path, &hash(json.as_slice(), &path, &mut |_| {})?, header);
        }
        let digest = if is_weights(name) {
            let file = File::open(&path).map_err(Error::io(&path))?;
            safetensors_metadata(&path, &file, stat.len())?.remove(DATA_SHA256).unwrap_or_default()
        } else if stat.len() <= SMALL {
            hash(File::open(&path).map_err(Error::io(&path))?, &path, &mut |_| {})?
        } else {
            return Ok(());
        };
        same_digest(&path, &digest, &entry.sha256)
    }

    /// Reads all files and compares their digests; `progress` gets the bytes read.
    ///
    /// # Errors
    /// A file cannot be read or has another digest.
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> Result<()> {
        for (name, entry) in &self.manifest.files {
            let path = self.dir.join(name);
            let mut file = File::open(&path).map_err(Error::io(&path))?;
            if is_weights(name) {
                let header = header_len(&path, &file, entry.bytes)?;
                std::io::copy(&mut Read::by_ref(&mut file).take(8 + header), &mut std::io::sink()).map_err(Error::io(&path))?;
            }
            same_digest(&path, &hash(file, &path, &mut progress)?, &entry.sha256)?;
        }
        Ok(())
    }
}

fn same_digest(path: &Path, found: &str, listed: &str) -> Result<()> {
    if found == listed {
        return Ok(());
    }
    Err(Error::file(path, "does not belong to this artifact: its digest is not the one in the manifest; compile the checkpoint again"))
}

/// The whole of a file that is at most `limit` bytes long.
pub(crate) fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut bytes = vec![];
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::file(path, format!("is longer than {limit} bytes")));
    }
    Ok(bytes)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of the manifest, which has the digests of all other files. What a comparison found does not change the model.
///
/// # Errors
/// The manifest cannot be written down.
pub(crate) fn identity(manifest: &Manifest) -> Result<[u8; 32]> {
    let manifest = serde_json::to_vec(&Manifest { certificate: None, ..manifest.clone() });
    let manifest = manifest.map_err(|e| Error::Input(format!("the manifest cannot be written: {e}")))?;
    Ok(Sha256::digest(manifest).into())
}

fn hash(mut file: impl Read, path: &Path, progress: &mut impl FnMut(u64)) -> Result<String> {
    let mut sha = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(Error::io(path))?;
        if n == 0 {
            return Ok(hex(&sha.finalize()));
        }
        sha.update(&buffer[..n]);
        progress(n as u64);
    }
}

/// Length of the JSON header of a safetensors file.
fn header_len(path: &Path, file: &File, len: u64) -> Result<u64> {
    use std::os::unix::fs::FileExt;
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 0).map_err(Error::io(path))?;
    let header = u64::from_le_bytes(bytes);
    if header > len.saturating_sub(8).min(100 << 20) {
        return Err(Error::file(path, format!("is not a safetensors file: its header would be {header} bytes long")));
    }
    Ok(header)
}

/// The JSON header of a safetensors file.
fn header_json(path: &Path, file: &File, len: u64) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut json = vec![0; header_len(path, file, len)? as usize];
    file.read_exact_at(&mut json, 8).map_err(Error::io(path))?;
    Ok(json)
}

fn safetensors_metadata(path: &Path, file: &File, len: u64) -> Result<std::collections::HashMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__", default)]
        metadata: std::collections::HashMap<String, String>,
    }
    let json = header_json(path, file, len)?;
    let header: Header = serde_json::from_slice(&json).map_err(|e| Error::file(path, format!("is not a safetensors file: {e}")))?;
    Ok(header.metadata)
}
