//! What the end-to-end tests share: fixtures, goldens, comparisons.

use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};
use safetensors::{Dtype, SafeTensors};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use vlmc::compile::{Model, Options};
use vlmc_ir::interp::Array;

/// A directory of `fixtures/`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

/// All tensors of a safetensors file; floats as `f32`, other numbers as `i64`.
pub fn load(path: &Path) -> BTreeMap<String, Array> {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    fn map<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks::<N>().0.iter().map(|b| f(*b)).collect()
    }
    let array = |t: &safetensors::tensor::TensorView<'_>| {
        let shape = IxDyn(t.shape());
        let floats = |v: Vec<f32>| Array::F32(ArrayD::from_shape_vec(shape.clone(), v).expect("the file's shape"));
        let ints = |v: Vec<i64>| Array::I64(ArrayD::from_shape_vec(shape.clone(), v).expect("the file's shape"));
        match t.dtype() {
            Dtype::F32 => floats(map(t.data(), f32::from_le_bytes)),
            Dtype::F16 => floats(map(t.data(), |b| f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => floats(map(t.data(), |b| bf16::from_le_bytes(b).to_f32())),
            Dtype::I64 => ints(map(t.data(), i64::from_le_bytes)),
            Dtype::U8 | Dtype::BOOL => ints(map(t.data(), |[b]| i64::from(b))),
            other => panic!("{}: tensors of {other:?} are not expected", path.display()),
        }
    };
    file.tensors().iter().map(|(n, t)| (n.clone(), array(t))).collect()
}

/// Writes the tensors `case/*` of a fixture's goldens that are inputs of the model, as `vlmc exec` reads them.
pub fn write_inputs(fixture_dir: &Path, case: &str, out: &Path) {
    let path = fixture_dir.join("golden.safetensors");
    let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let inputs = ["input_ids", "attention_mask", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"];
    let tensors: Vec<_> = inputs.iter().filter_map(|n| Some((*n, file.tensor(&format!("{case}/{n}")).ok()?))).collect();
    fs::write(out, safetensors::serialize(tensors, None).expect("tensors of a file")).expect("a temporary file");
}

/// Compiles a fixture.
pub fn compile(fixture_dir: &Path, target: &str, out: &Path) {
    let model = Model::open(fixture_dir).unwrap_or_else(|e| panic!("{e}"));
    model.compile(&Options { target, out, progress: &|_, _| {} }).unwrap_or_else(|e| panic!("{e}"));
}

/// Largest difference, and largest absolute value of the reference.
pub fn difference(got: &ArrayD<f32>, reference: &ArrayD<f32>) -> (f32, f32) {
    assert_eq!(got.shape(), reference.shape());
    assert!(got.iter().chain(reference).all(|v| v.is_finite()), "a value is not finite");
    got.iter().zip(reference).fold((0.0, 0.0), |(d, m): (f32, f32), (g, r)| (d.max((g - r).abs()), m.max(r.abs())))
}

/// Fails unless `got` is within `1e-4 * max(1, |reference|max)`.
pub fn assert_close(got: &ArrayD<f32>, reference: &ArrayD<f32>, what: &str) {
    let (difference, largest) = difference(got, reference);
    assert!(difference <= 1e-4 * largest.max(1.0), "{what}: differs by {difference}, the largest value is {largest}");
}
