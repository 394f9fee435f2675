//! `vlmc exec`: a whole model on tensors named as in the Hugging Face forward signature.

use crate::{Error, Result};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{collections::BTreeMap, fs, path::Path};
use vlmc_runtime::{Data, Engine, Pipeline, Scored, Tensor, Tensors, forward};

/// Runs the model of `engine` on the tensors of the safetensors file `inputs` and writes to `outputs` all that it gives. A model
/// that answers prompts gives `logits` f32[batch, seq, vocab] of all positions, `image_features` (of the pictures; of the videos
/// if there are only videos; under the name that the model has for them), `video_features`, and with `new_tokens`
/// `generated_ids` i64[batch, new_tokens]: greedy, whatever token comes.
///
/// Returns warnings: tensors that were ignored.
///
/// # Errors
/// A file cannot be read or written, or the tensors do not fit the model.
pub fn exec(mut engine: Box<dyn Engine>, inputs: &Path, outputs: &Path, new_tokens: usize) -> Result<Vec<String>> {
    let given = read(inputs)?;
    let mut out = Tensors::new();
    let ignored: Vec<String> = if engine.manifest().task.prompt().is_some() {
        let mut pipeline = Pipeline::new(engine)?;
        let features = pipeline.features(&given)?;
        let logits = pipeline.prefill(&given, &features, Scored::All)?;
        if new_tokens > 0 {
            out.insert("generated_ids".into(), pipeline.continue_greedily(&logits, new_tokens)?);
        }
        out.insert("logits".into(), logits);
        out.extend(features.image.as_ref().or(features.video.as_ref()).into_iter().flatten().cloned());
        out.extend(features.video.and_then(|v| v.into_iter().next()).map(|(_, t)| ("video_features".into(), t)));
        let takes = pipeline.inputs();
        given.keys().filter(|n| !takes.contains(&n.as_str())).cloned().collect()
    } else {
        out.extend(forward(&mut *engine, &given)?);
        let takes = |n: &str| engine.manifest().entries.iter().flat_map(|e| &e.inputs).any(|p| p.name == n);
        given.keys().filter(|n| !takes(n)).cloned().collect()
    };
    write(outputs, &out)?;
    Ok(ignored.into_iter().map(|name| format!("tensor '{name}' is ignored: the model takes no such input")).collect())
}

/// Tensors of a safetensors file: floats as `f32`, integers as `i64`.
///
/// # Errors
/// The file cannot be read, or has a tensor of another type.
pub fn read(path: &Path) -> Result<Tensors> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::file(path, format!("is not a safetensors file: {e}")))?;
    let mut out = Tensors::new();
    for (name, view) in file.tensors() {
        let t = tensor(&view).map_err(|why| Error::file(path, format!("tensor '{name}': {why}")))?;
        out.insert(name, t);
    }
    Ok(out)
}

/// Floats as `f32`; integers and booleans as `i64`.
fn tensor(view: &TensorView<'_>) -> Result<Tensor, String> {
    fn map<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks::<N>().0.iter().map(|b| f(*b)).collect()
    }
    let bytes = view.data();
    let data: Data = match view.dtype() {
        Dtype::F32 => map(bytes, f32::from_le_bytes).into(),
        Dtype::F16 => map(bytes, |b| f16::from_le_bytes(b).to_f32()).into(),
        Dtype::BF16 => map(bytes, |b| bf16::from_le_bytes(b).to_f32()).into(),
        Dtype::F64 => map(bytes, |b| f64::from_le_bytes(b) as f32).into(),
        Dtype::I64 => map(bytes, i64::from_le_bytes).into(),
        Dtype::I32 => map(bytes, |b| i64::from(i32::from_le_bytes(b))).into(),
        Dtype::U8 | Dtype::BOOL => map(bytes, |[b]| i64::from(b)).into(),
        other => return Err(format!("has type {other:?}; f32, f16, bf16, f64, i64, i32, u8 or bool is needed")),
    };
    Tensor::new(view.shape(), data).map_err(|e| e.to_string())
}

fn write(path: &Path, tensors: &Tensors) -> Result<()> {
    let bytes = |t: &Tensor| match t.data() {
        Data::F32(v) => (Dtype::F32, v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()),
        Data::I64(v) => (Dtype::I64, v.iter().flat_map(|x| x.to_le_bytes()).collect()),
        Data::Bool(v) => (Dtype::BOOL, v.iter().map(|x| u8::from(*x)).collect()),
    };
    let raw: BTreeMap<&str, (Dtype, Vec<u8>)> = tensors.iter().map(|(n, t)| (n.as_str(), bytes(t))).collect();
    let views = tensors
        .iter()
        .map(|(n, t)| TensorView::new(raw[n.as_str()].0, t.shape().to_vec(), &raw[n.as_str()].1).map(|v| (n, v)))
        .collect::<Result<Vec<_>, _>>();
    let failed = |e: safetensors::SafeTensorError| Error::file(path, e.to_string());
    let bytes = safetensors::serialize(views.map_err(failed)?, None).map_err(failed)?;
    // Under another name first, so that a reader never sees half a file.
    let part = path.with_extension("part");
    fs::write(&part, bytes).and_then(|()| fs::rename(&part, path)).map_err(|cause| {
        // Already failing: what cannot be removed either stays.
        let _ = fs::remove_file(&part);
        Error::io(path)(cause)
    })
}
