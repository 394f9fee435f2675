//! Where f16 would overflow: a tower with large numbers in its residual stream.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use half::bf16;
use safetensors::{SafeTensors, serialize, tensor::TensorView};
use std::{collections::BTreeMap, fs, path::Path};
use vlmc::{compile::Model, ranges::LIMIT, verify::Request};
use vlmc_runtime::prepare::Preparer;
use vlmc_tests::fixture;

/// Copies a checkpoint in bf16, one tensor times `factor`.
fn scaled(name: &str, tensor: &str, factor: f32, to: &Path) {
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "json") {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
    let bytes = fs::read(fixture(name).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut data: BTreeMap<String, Vec<u8>> = file.tensors().into_iter().map(|(n, t)| (n, t.data().to_vec())).collect();
    let chunks = data.get_mut(tensor).unwrap().as_chunks_mut::<2>().0;
    chunks.iter_mut().for_each(|b| *b = bf16::from_f32(bf16::from_le_bytes(*b).to_f32() * factor).to_le_bytes());
    let views = file.tensors().into_iter().map(|(n, t)| (n.clone(), TensorView::new(t.dtype(), t.shape().to_vec(), &data[&n]).unwrap()));
    fs::write(to.join("model.safetensors"), serialize(views.collect::<Vec<_>>(), None).unwrap()).unwrap();
}

fn synthetic(model: &Model) -> Vec<Request> {
    let dir = model.checkpoint().dir();
    let preparer = Preparer::new(model.lower().unwrap().task, model.processor().unwrap(), |n| Some(dir.join(n)).filter(|p| p.exists()));
    vec![Request { name: "synthetic".into(), tensors: preparer.unwrap().synthetic().unwrap() }]
}

#[test]
fn islands_are_named_and_help() {
    let dir = tempfile::tempdir().unwrap();
    scaled("qwen2.5-vl", "visual.blocks.0.mlp.down_proj.weight", 3e6, dir.path());
    let model = Model::open(dir.path()).unwrap();
    let ranges = model.ranges(&synthetic(&model), &|_| {}).unwrap();
    // The layer itself and the residual stream after it, to the end of the tower; nothing of the decoder.
    assert_eq!((ranges.islands[0].scope.as_str(), ranges.islands[0].op.as_str()), ("visual.blocks.0", "linear"), "{ranges:?}");
    assert!(ranges.islands.iter().all(|i| i.graph == "vision" && i.largest > LIMIT), "{ranges:?}");
    assert!(ranges.islands.iter().any(|i| i.scope == "visual.blocks.1" && i.op == "add"), "{ranges:?}");
    assert!(ranges.largest_in_f16 <= LIMIT);
    assert_eq!(ranges.plain.error, None, "f16 has to overflow");
    assert!(ranges.with_islands.error.unwrap() < 5e-3, "{ranges:?}");
}

#[test]
fn most_models_have_none() {
    let model = Model::open(&fixture("qwen2.5-vl")).unwrap();
    let ranges = model.ranges(&synthetic(&model), &|_| {}).unwrap();
    assert_eq!(ranges.islands, []);
    assert_eq!(ranges.plain, ranges.with_islands);
    assert!((1e-6..5e-3).contains(&ranges.plain.error.unwrap()), "{ranges:?}");
}
