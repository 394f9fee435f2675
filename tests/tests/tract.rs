//! The ONNX graphs through a second reader, tract: `cargo test -p vlmc-tests --features tract --test tract`.
#![cfg(feature = "tract")]
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use ndarray::{ArrayD, Axis, IxDyn};
use std::{collections::BTreeMap, path::Path};
use tract_onnx::prelude::*;
use vlmc_ir::interp::Array;
use vlmc_tests::{assert_close, compile, fixture, load};

type Tensors = BTreeMap<String, Array>;

/// Runs a model of an artifact on named inputs; its outputs by name.
fn run(artifact: &Path, graph: &str, inputs: &Tensors) -> Tensors {
    let path = artifact.join(format!("{graph}.onnx"));
    let model = tract_onnx::onnx().model_for_path(&path).unwrap_or_else(|e| panic!("{graph}: {e:?}"));
    let names: Vec<String> = model.input_outlets().unwrap().iter().map(|o| model.node(o.node).name.clone()).collect();
    let outputs: Vec<String> =
        model.output_outlets().unwrap().iter().map(|o| model.outlet_label(*o).unwrap_or(&model.node(o.node).name).to_string()).collect();
    let runnable = model.into_optimized().and_then(|m| m.into_runnable()).unwrap_or_else(|e| panic!("{graph}: {e:?}"));
    let tensor = |a: &Array| -> Tensor {
        match a {
            Array::F32(a) => Tensor::from_shape(a.shape(), a.as_standard_layout().as_slice().unwrap()).unwrap(),
            Array::I64(a) => Tensor::from_shape(a.shape(), a.as_standard_layout().as_slice().unwrap()).unwrap(),
            Array::Bool(a) => Tensor::from_shape(a.shape(), a.as_standard_layout().as_slice().unwrap()).unwrap(),
        }
    };
    let feed: TVec<TValue> =
        names.iter().map(|n| tensor(inputs.get(n).unwrap_or_else(|| panic!("{graph}: input {n}"))).into_tvalue()).collect();
    let results = runnable.run(feed).unwrap_or_else(|e| panic!("{graph}: {e:?}"));
    let floats = |t: &TValue| {
        let t = t.cast_to::<f32>().unwrap();
        Array::F32(ArrayD::from_shape_vec(IxDyn(t.shape()), t.to_plain_array_view::<f32>().unwrap().iter().copied().collect()).unwrap())
    };
    outputs.into_iter().zip(results.iter().map(floats)).collect()
}

#[test]
fn vision_and_decoder_agree_with_the_reference() {
    let dir = fixture("qwen2-vl");
    let golden = load(&dir.join("golden.safetensors"));
    let out = tempfile::tempdir().unwrap();
    let artifact = out.path().join("artifact");
    compile(&dir, "onnx-tensorrt:f32", &artifact);
    for case in ["chat", "two", "video", "batch", "text"] {
        let get = |n: &str| golden.get(&format!("{case}/{n}")).cloned();
        let ids = get("input_ids").unwrap();
        let [batch, seq] = [ids.shape()[0], ids.shape()[1]];
        let mut features = Array::F32(ArrayD::zeros(IxDyn(&[0, 64])));
        if let (Some(pixels), Some(grid)) =
            (get("pixel_values").or(get("pixel_values_videos")), get("image_grid_thw").or(get("video_grid_thw")))
        {
            let inputs = Tensors::from([("pixel_values".into(), pixels), ("image_grid_thw".into(), grid)]);
            features = run(&artifact, "vision", &inputs).remove("image_features").unwrap();
            let reference = get("image_features").or(get("video_features")).unwrap();
            assert_close(features.f32().unwrap(), reference.f32().unwrap(), &format!("{case}: image_features"));
        }
        // The embedding graph has no arithmetic of its own; its result is looked up here.
        let weights = load(&dir.join("model.safetensors"));
        let table = weights["model.embed_tokens.weight"].f32().unwrap();
        let mut rows = features.f32().unwrap().outer_iter();
        let mut embeds = ArrayD::zeros(IxDyn(&[batch, seq, 64]));
        for (e, id) in embeds.as_slice_mut().unwrap().chunks_exact_mut(64).zip(ids.i64().unwrap()) {
            let row = if matches!(*id, 298 | 299) { rows.next().unwrap() } else { table.index_axis(Axis(0), *id as usize) };
            e.iter_mut().zip(row.iter()).for_each(|(e, v)| *e = *v);
        }
        let positions = get("position_ids").unwrap_or_else(|| Array::I64(ArrayD::from_shape_fn(IxDyn(&[3, batch, seq]), |i| i[2] as i64)));
        let mut inputs = Tensors::from([
            ("inputs_embeds".into(), Array::F32(embeds)),
            ("position_ids".into(), positions),
            ("attention_mask".into(), get("attention_mask").unwrap()),
            ("logit_positions".into(), Array::I64(ArrayD::from_shape_fn(IxDyn(&[seq]), |i| i[0] as i64))),
        ]);
        for layer in 0..2 {
            for kind in ["key", "value"] {
                inputs.insert(format!("past_key_values.{layer}.{kind}"), Array::F32(ArrayD::zeros(IxDyn(&[batch, 2, 0, 16]))));
            }
        }
        let logits = run(&artifact, "decoder", &inputs).remove("logits").unwrap();
        let (logits, reference) = (logits.f32().unwrap().clone(), get("logits").unwrap());
        let reference = reference.f32().unwrap();
        let mask = get("attention_mask").unwrap();
        for row in 0..batch {
            let live = mask.i64().unwrap().index_axis(Axis(0), row).iter().filter(|m| **m != 0).count().min(reference.shape()[1]);
            let part = |a: &ArrayD<f32>| {
                let from = a.shape()[1] - live;
                a.index_axis(Axis(0), row).slice_axis(Axis(0), (from..).into()).to_owned()
            };
            assert_close(&part(&logits), &part(reference), &format!("{case}: logits of row {row}"));
        }
    }
}
