//! Artifacts in the checkpoint's own type share its weight files.
#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy knows only the tests themselves")]

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};
use vlmc_runtime::Artifact;
use vlmc_tests::{check_case_within, compile, exec_case, fixture, load};

/// A copy of a fixture with its weights in f16.
fn in_f16(name: &str, out: &Path) {
    fs::create_dir(out).unwrap();
    let file = fs::read(fixture(name).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let narrow = |t: &TensorView<'_>| -> Vec<u8> {
        assert_eq!(t.dtype(), Dtype::BF16);
        t.data().as_chunks().0.iter().flat_map(|b| f16::from_f32(bf16::from_le_bytes(*b).to_f32()).to_le_bytes()).collect()
    };
    let data: Vec<_> = tensors.tensors().into_iter().map(|(n, t)| (n, t.shape().to_vec(), narrow(&t))).collect();
    let views = data.iter().map(|(n, shape, data)| (n, TensorView::new(Dtype::F16, shape.clone(), data).unwrap()));
    fs::write(out.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::copy(fixture(name).join("config.json"), out.join("config.json")).unwrap();
}

#[test]
fn untouched_weights_are_linked() {
    let name = "qwen2-vl";
    let golden = load(&fixture(name).join("golden.safetensors"));
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = dir.path().join("checkpoint");
    in_f16(name, &checkpoint);
    let weights = checkpoint.join("model.safetensors");
    for target in ["onnx-cuda", "onnx-tensorrt"] {
        let artifact = dir.path().join(target);
        compile(&checkpoint, target, &artifact);
        let linked = artifact.join("model.safetensors");
        assert_eq!(fs::metadata(&linked).unwrap().ino(), fs::metadata(&weights).unwrap().ino());
        assert!(load(&artifact.join("weights.safetensors")).is_empty());
        for case in ["chat", "text"] {
            check_case_within(2e-2, case, &golden, &exec_case(&fixture(name), &artifact, case, &[], 1));
        }
        Artifact::open(&artifact).unwrap().verify(|_| {}).unwrap();
    }
    // Of another type they are written anew.
    let wide = dir.path().join("wide");
    compile(&checkpoint, "onnx-tensorrt:f32", &wide);
    assert!(!wide.join("model.safetensors").exists());

    // A header of another file is noticed at once, other data when it is looked for.
    let artifact = dir.path().join("onnx-cuda");
    let file = fs::File::options().read(true).write(true).open(&weights).unwrap();
    let flip = |at: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };
    let last = file.metadata().unwrap().len() - 1;
    flip(last);
    let error = Artifact::open(&artifact).unwrap().verify(|_| {}).unwrap_err().to_string();
    assert!(error.contains("its digest is not the one in the manifest"), "{error}");
    flip(last);
    flip(12);
    let error = Artifact::open(&artifact).unwrap_err().to_string();
    assert!(error.contains("its digest is not the one in the manifest"), "{error}");
}
