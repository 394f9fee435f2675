//! Features of pictures that were seen before, by what the pictures are: in memory, and in a directory if there is one.

use crate::{
    Data, Error, Result, Tensor,
    artifact_dir::{hex, identity, read_limited},
    forward::Tensors,
    pipeline::{Outputs, Pipeline},
    processor::Pixels,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use sha2::{Digest as _, Sha256};
use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};
use vlmc_artifact::Manifest;

/// SHA-256.
pub(crate) type Digest = [u8; 32];

/// Bytes of features that are kept in memory unless others are asked for: some twenty pictures of 1344x1344 for Qwen2-VL-2B.
const LIMIT: usize = 256 << 20;
/// Longest header of a file.
const MAX_HEADER: u64 = 64 << 10;
/// Key of a file's `__metadata__` that holds the digest of its name and its tensors.
const CONTENT: &str = "content_sha256";

/// Of all that a picture or video is to a model: the tensors that its processor made, and where its tokens stand.
pub(crate) fn digest(pixels: &Pixels) -> Digest {
    let mut sha = Sha256::new();
    add(&mut sha, pixels.inputs.iter().map(|(n, t)| (n.as_str(), t)));
    let clip = pixels.clip;
    clip.grid.iter().for_each(|n| sha.update(n.to_le_bytes()));
    sha.update(clip.seconds_per_grid.to_le_bytes());
    sha.finalize().into()
}

fn add<'t>(sha: &mut Sha256, tensors: impl Iterator<Item = (&'t str, &'t Tensor)>) {
    for (name, t) in tensors {
        // Lengths first, so that no two lists of tensors are the same bytes.
        sha.update((name.len() as u64).to_le_bytes());
        sha.update(name);
        sha.update((t.shape().len() as u64).to_le_bytes());
        t.shape().iter().for_each(|d| sha.update((*d as u64).to_le_bytes()));
        sha.update(t.dtype().to_string());
        match t.data() {
            Data::F32(v) => sha.update(bytemuck::cast_slice::<_, u8>(v)),
            Data::I64(v) => sha.update(bytemuck::cast_slice::<_, u8>(v)),
            Data::Bool(v) => sha.update(bytemuck::cast_slice::<_, u8>(v)),
        }
    }
}

/// Of a file's content.
fn content(key: &str, outputs: &Outputs) -> String {
    let mut sha = Sha256::new().chain_update(key);
    add(&mut sha, outputs.iter().map(|(n, t)| (n.as_str(), t)));
    hex(&sha.finalize())
}

fn bytes(outputs: &Outputs) -> usize {
    outputs.iter().map(|(_, t)| t.data().len() * t.dtype().size()).sum()
}

/// Features by the digest of their pictures.
pub(crate) struct FeatureCache {
    limit: usize,
    /// The one that was not used for the longest time first.
    kept: Vec<(Digest, Outputs)>,
    files: Option<Files>,
    /// Pictures that were run through the model, because their features were nowhere.
    pub(crate) made: usize,
}

impl Default for FeatureCache {
    fn default() -> Self {
        Self { limit: LIMIT, kept: vec![], files: None, made: 0 }
    }
}

impl FeatureCache {
    /// Keeps at most `limit` bytes in memory from now on.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
        self.shrink();
    }

    /// Keeps features in the directory `dir` too, which is made if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub(crate) fn set_dir(&mut self, dir: &Path, manifest: &Manifest) -> Result<()> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        self.files = Some(Files::new(dir, manifest)?);
        Ok(())
    }

    /// The features of the picture whose tensors are `inputs` and whose digest is `digest`.
    ///
    /// # Errors
    /// As [`Pipeline::features`].
    pub(crate) fn get(&mut self, digest: Digest, pipeline: &mut Pipeline, inputs: &Tensors) -> Result<Option<Outputs>> {
        if let Some(i) = self.kept.iter().position(|(d, _)| *d == digest) {
            let found = self.kept.remove(i);
            self.kept.push(found.clone());
            return Ok(Some(found.1));
        }
        if let Some(files) = &self.files
            && let Some(outputs) = files.read(digest, &pipeline.feature_shapes(inputs)?)
        {
            self.keep(digest, &outputs);
            return Ok(Some(outputs));
        }
        let Some(outputs) = pipeline.features(inputs)?.image else { return Ok(None) };
        self.made += 1;
        if let Some(files) = &self.files {
            // A full disk is no reason not to answer; the next request tries again.
            let _ = files.write(digest, &outputs);
        }
        self.keep(digest, &outputs);
        Ok(Some(outputs))
    }

    fn keep(&mut self, digest: Digest, outputs: &Outputs) {
        self.kept.push((digest, outputs.clone()));
        self.shrink();
    }

    fn shrink(&mut self) {
        let mut total: usize = self.kept.iter().map(|(_, o)| bytes(o)).sum();
        let stale = self.kept.iter().take_while(|(_, o)| {
            let over = total > self.limit;
            total -= if over { bytes(o) } else { 0 };
            over
        });
        self.kept.drain(..stale.count());
    }
}

/// A directory with a safetensors file for each picture.
struct Files {
    dir: PathBuf,
    /// Of the manifest, which has the digests of the artifact's program and weights.
    artifact: Digest,
}

impl Files {
    fn new(dir: &Path, manifest: &Manifest) -> Result<Self> {
        Ok(Self { dir: dir.into(), artifact: identity(manifest)? })
    }

    fn key(&self, picture: Digest) -> String {
        // Another version of the runtime may compute a little differently.
        let version = env!("CARGO_PKG_VERSION").as_bytes();
        hex(&Sha256::new().chain_update(self.artifact).chain_update(picture).chain_update(version).finalize())
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.safetensors"))
    }

    /// What the file of a picture holds, if it is whole and has tensors of these shapes. Whatever else is there is as if it were not.
    fn read(&self, picture: Digest, shapes: &[(String, Vec<usize>)]) -> Option<Outputs> {
        let key = self.key(picture);
        let size = |shape: &[usize]| shape.iter().try_fold(size_of::<f32>() as u64, |n, d| n.checked_mul(*d as u64));
        let data = shapes.iter().try_fold(0u64, |n, (_, shape)| n.checked_add(size(shape)?))?;
        let file = read_limited(&self.path(&key), data.checked_add(MAX_HEADER)?).ok()?;
        let (_, header) = SafeTensors::read_metadata(&file).ok()?;
        let metadata = header.metadata().as_ref()?;
        let tensors = SafeTensors::deserialize(&file).ok()?;
        let outputs = shapes
            .iter()
            .map(|(name, shape)| {
                let t = tensors.tensor(name).ok()?;
                let right = t.dtype() == Dtype::F32 && t.shape() == shape;
                let data: Vec<f32> = right.then(|| t.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())?;
                Some((name.clone(), Tensor::new(shape.clone(), data).ok()?))
            })
            .collect::<Option<Outputs>>()?;
        (metadata.get(CONTENT) == Some(&content(&key, &outputs))).then_some(outputs)
    }

    /// Writes the file of a picture, which is there as a whole or not at all.
    fn write(&self, picture: Digest, outputs: &Outputs) -> io::Result<()> {
        let key = self.key(picture);
        let mut views = vec![];
        for (name, t) in outputs {
            let Data::F32(data) = t.data() else { return Err(io::Error::other("features are not f32")) };
            views.push((name, TensorView::new(Dtype::F32, t.shape().to_vec(), bytemuck::cast_slice(data)).map_err(io::Error::other)?));
        }
        let metadata = HashMap::from([(CONTENT.to_string(), content(&key, outputs))]);
        let file = safetensors::serialize(views, Some(metadata)).map_err(io::Error::other)?;
        let mut new = tempfile::NamedTempFile::new_in(&self.dir)?;
        io::Write::write_all(&mut new, &file)?;
        new.persist(self.path(&key))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outputs(rows: usize, value: f32) -> Outputs {
        vec![("image_features".into(), Tensor::new([rows, 2], vec![value; 2 * rows]).unwrap())]
    }

    #[test]
    fn what_was_used_last_stays() {
        let mut cache = FeatureCache { limit: 100, ..FeatureCache::default() };
        for i in 0..4 {
            cache.keep([i; 32], &outputs(4, 0.0));
        }
        let kept = |c: &FeatureCache| c.kept.iter().map(|(d, _)| d[0]).collect::<Vec<_>>();
        assert_eq!(kept(&cache), [1, 2, 3], "three of 32 bytes fit");
        cache.set_limit(40);
        assert_eq!(kept(&cache), [3]);
        cache.keep([9; 32], &outputs(6, 0.0));
        assert_eq!(kept(&cache), [0u8; 0], "what is larger than the limit is not kept");
    }

    #[test]
    fn digests_tell_pictures_apart() {
        let pixels = |name: &str, shape: [usize; 2], value: f32| Pixels {
            inputs: Tensors::from([(name.into(), Tensor::new(shape, vec![value; 4]).unwrap())]),
            tokens: 1,
            clip: crate::prompt::Clip::picture([1, 2, 2]),
        };
        let base = digest(&pixels("pixel_values", [2, 2], 0.5));
        assert_eq!(base, digest(&pixels("pixel_values", [2, 2], 0.5)));
        assert_ne!(base, digest(&pixels("pixel_value", [2, 2], 0.5)));
        assert_ne!(base, digest(&pixels("pixel_values", [1, 4], 0.5)));
        assert_ne!(base, digest(&pixels("pixel_values", [2, 2], 0.25)));
        let mut other = pixels("pixel_values", [2, 2], 0.5);
        other.clip.seconds_per_grid = 1.0;
        assert_ne!(base, digest(&other));
    }

    #[test]
    fn only_whole_files_are_believed() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files { dir: dir.path().into(), artifact: [7; 32] };
        let (picture, made) = ([1; 32], outputs(3, 0.5));
        let shapes = [("image_features".to_string(), vec![3, 2])];
        assert_eq!(files.read(picture, &shapes), None);
        files.write(picture, &made).unwrap();
        assert_eq!(files.read(picture, &shapes), Some(made.clone()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");

        // Of another picture, another artifact, another shape or name.
        assert_eq!(files.read([2; 32], &shapes), None);
        assert_eq!(Files { dir: dir.path().into(), artifact: [8; 32] }.read(picture, &shapes), None);
        assert_eq!(files.read(picture, &[("image_features".to_string(), vec![2, 3])]), None);
        assert_eq!(files.read(picture, &[("other".to_string(), vec![3, 2])]), None);
        assert_eq!(files.read(picture, &[("image_features".to_string(), vec![usize::MAX, 2])]), None);
        let path = files.path(&files.key(picture));
        fs::copy(&path, files.path(&files.key([2; 32]))).unwrap();
        assert_eq!(files.read([2; 32], &shapes), None, "a file under another name");

        // No byte may change, and none may be missing.
        let good = fs::read(&path).unwrap();
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 1;
            fs::write(&path, &bad).unwrap();
            let read = files.read(picture, &shapes);
            assert!(read.is_none() || read.as_ref() == Some(&made), "byte {i}");
            fs::write(&path, &good[..i]).unwrap();
            assert_eq!(files.read(picture, &shapes), None, "cut to {i} bytes");
        }
        files.write(picture, &made).unwrap();
        assert_eq!(files.read(picture, &shapes), Some(made));
    }
}
