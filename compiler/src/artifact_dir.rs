//! Directories that appear complete or not at all.
//!
//! Files go to a hidden directory beside the destination, which is renamed when everything is there and removed when the
//! compiler fails. What a killed compiler left is removed by the next one. (Complete for other processes, that is: nothing is
//! flushed to disk for the case of a power cut.)

use crate::{Error, Result, digest, safetensors_header::Header};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Seek},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};
use vlmc_artifact::{Certificate, DATA_SHA256, FileEntry, MANIFEST, Manifest, is_weights};
use vlmc_runtime::Artifact;

/// An artifact under construction.
#[derive(Debug)]
pub struct ArtifactDir(StagedDir);

impl ArtifactDir {
    /// Begins an artifact that will be at `out`: a new directory, an empty one, or one with an artifact to replace.
    ///
    /// # Errors
    /// Something else is at `out`, another process is writing it, or it cannot be written.
    pub fn create(out: impl AsRef<Path>) -> Result<Self> {
        StagedDir::create(out.as_ref(), "an artifact", is_artifact).map(Self)
    }

    /// Where the files of the artifact go until [`Self::commit`].
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Fills in `manifest.files` from the files in [`Self::path`], writes the manifest and moves everything to the destination.
    ///
    /// # Errors
    /// A file cannot be read, a safetensors file was not finished by a [`WeightsWriter`](crate::weights_writer::WeightsWriter),
    /// or the directory cannot be moved.
    pub fn commit(self, mut manifest: Manifest) -> Result<()> {
        list(self.path(), "", &mut manifest.files)?;
        write_manifest(self.path(), &manifest)?;
        self.0.commit()
    }
}

/// Replaces the manifest of an artifact by one that has `certificate`; a reader sees the old one or the new one.
///
/// # Errors
/// It cannot be written.
pub fn certify(artifact: &Artifact, certificate: Certificate) -> Result<()> {
    write_manifest(artifact.dir(), &Manifest { certificate: Some(certificate), ..artifact.manifest().clone() })
}

fn write_manifest(dir: &Path, manifest: &Manifest) -> Result<()> {
    let (path, part) = (dir.join(MANIFEST), dir.join(format!(".{MANIFEST}.part")));
    let mut json = serde_json::to_string_pretty(manifest).map_err(|e| Error::file(&path, e.to_string()))?;
    json.push('\n');
    fs::write(&part, json).and_then(|()| fs::rename(&part, &path)).map_err(|cause| {
        // Already failing: what cannot be removed either stays.
        let _ = fs::remove_file(&part);
        Error::io(&path)(cause)
    })
}

/// True for a directory whose manifest was written by a vlmc of any version.
fn is_artifact(dir: &Path) -> bool {
    let manifest: Option<Value> = fs::read(dir.join(MANIFEST)).ok().and_then(|json| serde_json::from_slice(&json).ok());
    manifest.is_some_and(|m| m["format"].is_u64() && m["compiler"].as_str().is_some_and(|c| c.starts_with("vlmc ")))
}

/// Adds every file of `dir` and its directories but the manifest, by `prefix` and path.
fn list(dir: &Path, prefix: &str, files: &mut BTreeMap<String, FileEntry>) -> Result<()> {
    for found in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = found.map_err(Error::io(dir))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).ok_or_else(|| Error::file(&path, "has a name that is not UTF-8"))?;
        let name = format!("{prefix}{name}");
        if name == MANIFEST {
            continue;
        }
        if path.is_dir() && !path.is_symlink() {
            list(&path, &format!("{name}/"), files)?;
            continue;
        }
        let file = File::open(&path).map_err(Error::io(&path))?;
        let stat = file.metadata().map_err(Error::io(&path))?;
        if !stat.is_file() {
            return Err(Error::file(&path, "is not a regular file"));
        }
        let (sha256, header_sha256) = if is_weights(&name) {
            let mut header = Header::read(&path, &file)?;
            match header.metadata.remove(DATA_SHA256) {
                Some(sha256) => (sha256, None),
                None => (data_sha256(&file).map_err(Error::io(&path))?, Some(header.sha256)),
            }
        } else {
            (digest::sha256_of(file).map_err(Error::io(&path))?, None)
        };
        files.insert(name, FileEntry { bytes: stat.len(), sha256, header_sha256 });
    }
    Ok(())
}

/// Digest of the data section of a safetensors file.
fn data_sha256(mut file: &File) -> io::Result<String> {
    let mut length = [0; 8];
    file.seek(io::SeekFrom::Start(0))?;
    file.read_exact(&mut length)?;
    file.seek(io::SeekFrom::Start(8 + u64::from_le_bytes(length)))?;
    digest::sha256_of(file)
}

/// A directory that is renamed to its destination when it is complete.
#[derive(Debug)]
pub(crate) struct StagedDir {
    staging: PathBuf,
    dest: PathBuf,
    /// Open and locked as long as we write; the system unlocks it if we die.
    lock: File,
    committed: bool,
}

impl StagedDir {
    /// `what` and `replaceable` tell which directory that is not empty may be replaced.
    pub(crate) fn create(out: &Path, what: &str, replaceable: impl FnOnce(&Path) -> bool) -> Result<Self> {
        let dest = match fs::canonicalize(out) {
            Ok(path) => path,
            Err(e) if e.kind() == io::ErrorKind::NotFound => std::path::absolute(out).map_err(Error::io(out))?,
            Err(e) => return Err(Error::io(out)(e)),
        };
        let (Some(parent), Some(name)) = (dest.parent(), dest.file_name()) else {
            return Err(Error::file(out, "cannot be an output directory"));
        };
        let sibling = |suffix: &str| {
            let mut file = std::ffi::OsString::from(".");
            file.push(name);
            file.push(suffix);
            parent.join(file)
        };
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let staging = sibling(".part");
        let lock = lock(&staging, out)?;
        let staged = Self { staging, lock, committed: false, dest: dest.clone() };
        staged.recover()?;
        if dest.exists() && !is_empty(&dest) && !replaceable(&dest) {
            return Err(Error::file(out, format!("exists and is not {what}; remove it or choose another name")));
        }
        Ok(staged)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.staging
    }

    /// Where the replaced directory goes while it is replaced.
    fn old(&self) -> PathBuf {
        self.staging.with_extension("old")
    }

    /// Finishes what a killed predecessor was doing.
    fn recover(&self) -> Result<()> {
        let old = self.old();
        if old.exists() {
            let result = if self.dest.exists() { fs::remove_dir_all(&old) } else { fs::rename(&old, &self.dest) };
            result.map_err(Error::io(&old))?;
        }
        for entry in fs::read_dir(&self.staging).map_err(Error::io(&self.staging))? {
            let path = entry.map_err(Error::io(&self.staging))?.path();
            let result = if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            result.map_err(Error::io(&path))?;
        }
        Ok(())
    }

    pub(crate) fn commit(mut self) -> Result<()> {
        let (dest, old) = (&self.dest, self.old());
        let replaces = dest.exists() && !is_empty(dest);
        if replaces {
            fs::rename(dest, &old).map_err(Error::io(dest))?;
        }
        if let Err(e) = fs::rename(&self.staging, dest) {
            if replaces {
                fs::rename(&old, dest).map_err(Error::io(&old))?;
            }
            return Err(Error::io(dest)(e));
        }
        self.committed = true;
        if replaces { fs::remove_dir_all(&old).map_err(Error::io(&old)) } else { Ok(()) }
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be done about a failure here; the next run tries again.
            let _ = fs::remove_dir_all(&self.staging);
        }
        let _ = self.lock.unlock();
    }
}

/// Makes the directory and locks it against other processes; `out` is for the message.
fn lock(dir: &Path, out: &Path) -> Result<File> {
    loop {
        match fs::create_dir(dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(Error::io(dir)(e)),
            _ => {}
        }
        let handle = match File::open(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            handle => handle.map_err(Error::io(dir))?,
        };
        match handle.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(Error::file(out, "is being written by another process")),
            Err(fs::TryLockError::Error(e)) => return Err(Error::io(dir)(e)),
        }
        // Its last owner may have renamed or removed it since we opened it.
        let inode = |stat: &fs::Metadata| (stat.dev(), stat.ino());
        match (fs::metadata(dir), handle.metadata()) {
            (Ok(named), Ok(locked)) if inode(&named) == inode(&locked) => return Ok(handle),
            _ => {}
        }
    }
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights_writer::{TensorSpec, WeightsWriter};
    use vlmc_artifact::{DType, Generation, Source, Task};

    fn manifest() -> Manifest {
        Manifest {
            format: vlmc_artifact::FORMAT,
            compiler: "vlmc 0.1.0".into(),
            target: "cpu".into(),
            layout: None,
            architecture: "qwen2_vl".into(),
            parameters: 1,
            source: Source { config_sha256: String::new(), weights: BTreeMap::new() },
            symbols: vec![],
            entries: vec![],
            task: Task::Classify { labels: vec![] },
            processor: None,
            generation: Generation::default(),
            files: BTreeMap::new(),
            certificate: None,
        }
    }

    fn listing(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn write_artifact(out: &Path, text: &str) {
        let dir = ArtifactDir::create(out).unwrap();
        fs::write(dir.path().join("tokenizer.json"), text).unwrap();
        let spec = TensorSpec { name: "w".into(), dtype: DType::U8, shape: vec![3] };
        let w = WeightsWriter::create(dir.path().join("weights.safetensors"), &[spec]).unwrap();
        w.write_at("w", 0, b"abc").unwrap();
        w.finish().unwrap();
        assert!(!out.join(MANIFEST).exists() || fs::read_to_string(out.join("tokenizer.json")).unwrap() != text);
        dir.commit(manifest()).unwrap();
    }

    #[test]
    fn commit_and_replace() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("deep/model.vlmc");
        write_artifact(&out, "one");
        let first = fs::read_to_string(out.join(MANIFEST)).unwrap();
        write_artifact(&out, "two");
        assert_eq!(listing(&out), [MANIFEST, "tokenizer.json", "weights.safetensors"]);
        assert_eq!(listing(out.parent().unwrap()), ["model.vlmc"]);
        let written: Manifest = serde_json::from_slice(&fs::read(out.join(MANIFEST)).unwrap()).unwrap();
        assert_eq!(written.files["tokenizer.json"], FileEntry { bytes: 3, sha256: digest::sha256(b"two"), header_sha256: None });
        assert_eq!(written.files["weights.safetensors"].sha256, digest::sha256(b"abc"));
        write_artifact(&out, "one");
        assert_eq!(fs::read_to_string(out.join(MANIFEST)).unwrap(), first);
    }

    #[test]
    fn only_artifacts_and_empty_directories_are_replaced() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        fs::create_dir(&out).unwrap();
        write_artifact(&out, "one");
        let refused = |dir: &Path| {
            let message = ArtifactDir::create(dir).unwrap_err().to_string();
            assert!(message.ends_with("exists and is not an artifact; remove it or choose another name"), "{message}");
        };
        let web = root.path().join("web");
        fs::create_dir(&web).unwrap();
        fs::write(web.join(MANIFEST), r#"{"name": "a web app"}"#).unwrap();
        refused(&web);
        refused(&web.join(MANIFEST));
        assert!(ArtifactDir::create("/").is_err());
        assert_eq!(listing(root.path()), ["out", "web"]);
        assert_eq!(listing(&web), [MANIFEST]);
    }

    #[test]
    fn nothing_is_left_of_a_failure() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let dir = ArtifactDir::create(&out).unwrap();
        fs::write(dir.path().join("x"), "x").unwrap();
        drop(dir);
        let dir = ArtifactDir::create(&out).unwrap();
        std::os::unix::fs::symlink(root.path(), dir.path().join("link")).unwrap();
        assert!(dir.commit(manifest()).unwrap_err().to_string().ends_with("link: is not a regular file"));
        let panicked = std::panic::catch_unwind(|| {
            let _dir = ArtifactDir::create(&out).unwrap();
            panic!("on purpose");
        });
        assert!(panicked.is_err());
        assert_eq!(listing(root.path()), [""; 0]);
    }

    #[test]
    fn killed_predecessors() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        write_artifact(&out, "one");
        // Killed while it wrote.
        let part = root.path().join(".out.part");
        fs::create_dir_all(part.join("d")).unwrap();
        fs::write(part.join("leftover"), "x").unwrap();
        // Killed between the two renames.
        fs::rename(&out, root.path().join(".out.old")).unwrap();
        let dir = ArtifactDir::create(&out).unwrap();
        assert!(is_empty(dir.path()));
        assert_eq!(listing(root.path()), [".out.part", "out"]);
        // Killed before the old one was removed.
        drop(dir);
        fs::create_dir_all(root.path().join(".out.old/d")).unwrap();
        drop(ArtifactDir::create(&out).unwrap());
        assert_eq!(listing(root.path()), ["out"]);
    }

    #[test]
    fn two_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let first = ArtifactDir::create(&out).unwrap();
        let message = ArtifactDir::create(&out).unwrap_err().to_string();
        assert!(message.ends_with("out: is being written by another process"), "{message}");
        first.commit(manifest()).unwrap();
        drop(ArtifactDir::create(&out).unwrap());
        assert_eq!(listing(&out), [MANIFEST]);
    }

    #[test]
    fn weights_of_others() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let dir = ArtifactDir::create(&out).unwrap();
        let json = br#"{"x":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#;
        fs::write(dir.path().join("w.safetensors"), [&(json.len() as u64).to_le_bytes(), &json[..], b"abc"].concat()).unwrap();
        dir.commit(manifest()).unwrap();
        let artifact = Artifact::open(&out).unwrap();
        let entry = &artifact.manifest().files["w.safetensors"];
        assert_eq!((&entry.sha256, entry.header_sha256.as_ref()), (&digest::sha256(b"abc"), Some(&digest::sha256(json))));
    }
}
