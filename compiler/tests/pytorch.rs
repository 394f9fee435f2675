//! Weights in PyTorch files (`fixtures/gen/pytorch_files.py`): the same bytes as from safetensors, and no code that runs.

// The lint knows tests by their attribute, and the helpers have none.
#![allow(clippy::unwrap_used)]

use safetensors::{Dtype, SafeTensors};
use std::{
    fs,
    io::{Cursor, Write},
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;
use vlmc::checkpoint::Checkpoint;
use vlmc_ir::WeightSource;
use zip::{CompressionMethod, ZipArchive, ZipWriter, write::SimpleFileOptions};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

/// A checkpoint directory with an empty configuration and these files.
fn checkpoint(files: &[(&str, &[u8])]) -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// What opening this file as `pytorch_model.bin` gives.
fn open(bytes: &[u8]) -> Result<Checkpoint, String> {
    let dir = checkpoint(&[("pytorch_model.bin", bytes)]);
    let prefix = format!("{}/pytorch_model.bin: ", dir.path().display());
    Checkpoint::open(dir.path()).map_err(|e| e.to_string().strip_prefix(&prefix).expect("the error names the file").to_owned())
}

/// All tensors are those of the safetensors file, row by row as well.
fn assert_golden(checkpoint: &Checkpoint, golden: &str) {
    let bytes = fs::read(fixture("pytorch").join(golden)).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = golden.names();
    names.sort();
    assert_eq!(checkpoint.unused([]), names);
    for (name, view) in golden.tensors() {
        match checkpoint.tensor(&name) {
            Some((_, shape)) => assert_eq!(shape, view.shape(), "{name}"),
            None => assert!(matches!(view.dtype(), Dtype::F64 | Dtype::I16), "{name}"),
        }
        let rows = view.shape().first().copied().unwrap_or(1);
        let row = view.data().len().checked_div(rows).unwrap_or(0);
        let mut buf = vec![];
        for (start, end) in (0..=rows).flat_map(|start| (start..=rows).map(move |end| (start, end))) {
            checkpoint.read_rows(&name, start..end, &mut buf).unwrap();
            assert_eq!(buf, view.data()[start * row..end * row], "{name} {start}..{end}");
        }
    }
}

/// A zip archive as `torch.save` writes it.
fn archive(pickle: &[u8], storages: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(vec![]));
    let mut add = |name: String, bytes: &[u8]| {
        zip.start_file(name, SimpleFileOptions::default().compression_method(CompressionMethod::Stored)).unwrap();
        zip.write_all(bytes).unwrap();
    };
    add("model/data.pkl".into(), pickle);
    for (key, bytes) in storages {
        add(format!("model/data/{key}"), bytes);
    }
    zip.finish().unwrap().into_inner()
}

struct View<'a> {
    name: &'a str,
    class: &'a str,
    key: &'a str,
    len: usize,
    offset: i64,
    shape: &'a [usize],
    strides: &'a [usize],
}

/// The pickle of a state dict.
fn pickle(views: &[View<'_>]) -> Vec<u8> {
    let mut out = b"\x80\x02}(".to_vec();
    let text = |out: &mut Vec<u8>, s: &str| out.extend([b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat());
    let int = |out: &mut Vec<u8>, n: i64| out.extend([b"\x8a\x08", &n.to_le_bytes()[..]].concat());
    for View { name, class, key, len, offset, shape, strides } in views {
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(format!("ctorch\n{class}Storage\n").bytes());
        text(&mut out, key);
        text(&mut out, "cpu");
        int(&mut out, *len as i64);
        out.extend(b"tQ");
        int(&mut out, *offset);
        for dims in [shape, strides] {
            out.push(b'(');
            dims.iter().for_each(|n| int(&mut out, *n as i64));
            out.push(b't');
        }
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

/// One f32 tensor `t` in a storage of 12 elements.
fn one(offset: i64, shape: &[usize], strides: &[usize]) -> Result<Checkpoint, String> {
    open(&archive(&pickle(&[View { name: "t", class: "Float", key: "0", len: 12, offset, shape, strides }]), &[("0", &[7; 48])]))
}

#[test]
fn state_dicts() {
    for name in ["state_dict.bin", "wrapped.bin", "protocol4.bin", "old.bin"] {
        let dir = checkpoint(&[(name, &fs::read(fixture("pytorch").join(name)).unwrap())]);
        let c = Checkpoint::open(dir.path()).unwrap();
        assert_golden(&c, "golden.safetensors");
        assert_eq!(c.source().weights.keys().collect::<Vec<_>>(), [name]);
        assert_eq!(c.source().weights[name].len(), 64);
        assert_eq!(c.resolve("shared.transposed", &[8, 6]), Ok(vlmc_artifact::DType::F32));
    }
}

#[test]
fn torchscript_module() {
    let dir = checkpoint(&[("ViT-B-32.pt", &fs::read(fixture("pytorch/module.pt")).unwrap())]);
    let c = Checkpoint::open(dir.path()).unwrap();
    assert_golden(&c, "module.safetensors");
    assert_eq!(c.contains("visual.conv1.weight"), Some(true));
}

#[test]
fn shards() {
    let dir = checkpoint(&[]);
    for entry in fs::read_dir(fixture("pytorch/sharded")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let c = Checkpoint::open(dir.path()).unwrap();
    assert_golden(&c, "golden.safetensors");
    assert_eq!(c.source().weights.len(), 2);
    // The index is held to what the shards have, and safetensors win.
    let index = dir.path().join("pytorch_model.bin.index.json");
    fs::write(&index, fs::read_to_string(&index).unwrap().replace("\"f32\"", "\"f33\"")).unwrap();
    let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("places tensor 'f33' in pytorch_model-00001-of-00002.bin, which does not have it"), "{message}");
    fs::copy(fixture("pytorch/module.safetensors"), dir.path().join("model.safetensors")).unwrap();
    assert_golden(&Checkpoint::open(dir.path()).unwrap(), "module.safetensors");
}

#[test]
fn files_that_would_run_code_are_refused() {
    for (name, global) in [
        ("os_system", "posix.system"),
        ("eval", "__builtin__.eval"),
        ("class", "__main__.Plain"),
        ("dtype", "torch.float16"),
        ("numpy", "numpy._core.multiarray._reconstruct"),
    ] {
        let message = open(&fs::read(fixture(&format!("pytorch/refused/{name}.bin"))).unwrap()).unwrap_err();
        let expected = format!(
            "refers to '{global}', which is no part of a tensor; loading it could run code, so it is refused: \
             convert the file to safetensors, in a place where you trust it"
        );
        assert!(message.contains(&expected), "{message}");
    }
}

#[test]
fn the_command_line_refuses_and_runs_nothing() {
    let dir = TempDir::new().unwrap();
    let proof = dir.path().join("ran");
    let model = dir.path().join("checkpoint");
    fs::create_dir(&model).unwrap();
    fs::copy(fixture("qwen2-vl/config.json"), model.join("config.json")).unwrap();
    let command = format!("touch {}", proof.display());
    let pickle = [b"\x80\x02cposix\nsystem\nX", &(command.len() as u32).to_le_bytes()[..], command.as_bytes(), b"\x85R."].concat();
    fs::write(model.join("pytorch_model.bin"), archive(&pickle, &[])).unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_vlmc")).arg("compile").arg(&model).arg("-o").arg(dir.path().join("out")).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    let message = String::from_utf8_lossy(&out.stderr);
    assert!(message.contains("pytorch_model.bin: pickle, byte 2: refers to 'posix.system'"), "{message}");
    assert!(!proof.exists() && !dir.path().join("out").exists());
}

#[test]
fn tensors_must_lie_in_their_storage() {
    let huge = 1 << 62;
    for (offset, shape, strides) in [
        (0, &[13][..], &[1][..]),
        (1, &[12], &[1]),
        (i64::MAX, &[1], &[1]),
        (0, &[3, 4], &[5, 1]),
        (0, &[2], &[huge]),
        (0, &[3, 2], &[huge, huge]),
        (0, &[huge, huge], &[0, 0]),
        (0, &[huge], &[0]),
        (0, &[13], &[0]),
        (0, &[huge, 8, 0], &[huge, huge, huge]),
    ] {
        let message = match one(offset, shape, strides) {
            Err(message) => message,
            // Nothing at all, wherever it is.
            Ok(c) => {
                assert!(shape.contains(&0));
                c.read_rows("t", 0..0, &mut vec![]).unwrap();
                continue;
            }
        };
        let expected = format!(
            "tensor 't' of shape {shape:?}, strides {strides:?} and offset {offset} does not lie within its storage of 12 elements"
        );
        assert_eq!(message, expected);
    }
    for (offset, shape, strides, expected) in [
        (-1, &[1][..], &[1][..], "describes a tensor in a way that is not supported"),
        (0, &[1, 1], &[1], "tensor 't' has 2 axes and 1 strides"),
        (0, &[1; 65], &[1; 65], "tensor 't' has 65 axes"),
    ] {
        let message = one(offset, shape, strides).unwrap_err();
        assert!(message.contains(expected), "{message}");
    }
    let wide = View { name: "w", class: "Byte", key: "0", len: 100, offset: 0, shape: &[2, 2], strides: &[2, 90] };
    let message = open(&archive(&pickle(&[wide]), &[("0", &[0; 100])])).unwrap_err();
    assert_eq!(
        message,
        "tensor 'w' of shape [2, 2] has strides [2, 90], which are not supported: call .contiguous() on it and save the file again"
    );
    one(11, &[], &[]).unwrap();
    one(0, &[1, 12], &[99, 1]).unwrap();
}

#[test]
fn bad_archives() {
    let view = |name, len| View { name, class: "Float", key: "0", len, offset: 0, shape: &[2], strides: &[1] };
    let good = archive(&pickle(&[view("t", 2)]), &[("0", &[0; 8])]);
    open(&good).unwrap();
    let mut compressed = good.clone();
    let headers: Vec<_> = (0..good.len() - 4).filter(|at| matches!(&good[*at..at + 4], b"PK\x03\x04" | b"PK\x01\x02")).collect();
    for at in headers {
        let method = at + if good[at + 2] == 3 { 8 } else { 10 };
        compressed[method] = 8;
    }
    for (bytes, expected) in [
        (vec![], "is no PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1".to_vec(), "is no PyTorch file"),
        (b"PK\x03\x04 and no more".to_vec(), "is a zip archive that cannot be read"),
        (compressed, "entry \"model/data.pkl\" is compressed or encrypted, which torch.save never does"),
        (archive(&pickle(&[view("t", 3)]), &[("0", &[0; 8])]), "tensor 't' is in a storage of 3 elements, of which the file has 2"),
        (archive(&pickle(&[view("t", 2)]), &[("1", &[0; 8])]), "has no entry 'data/0', which a tensor needs"),
        (archive(&pickle(&[view("t", 2), view("t", 2)]), &[("0", &[0; 8])]), "tensor 't' is listed twice"),
        (archive(&pickle(&[view("a\nb", 2)]), &[("0", &[0; 8])]), "too long or has control characters"),
        (archive(&pickle(&[view(&"n".repeat(2000), 2)]), &[("0", &[0; 8])]), "too long or has control characters"),
        (archive(&pickle(&[]), &[]), "holds no named tensors"),
        (archive(b"", &[]), "pickle, byte 0: ends too early"),
    ] {
        let message = open(&bytes).unwrap_err();
        assert!(message.contains(expected), "{message:?} should contain {expected:?}");
    }
    let mut zip = ZipWriter::new(Cursor::new(vec![]));
    zip.start_file("word/document.xml", SimpleFileOptions::default()).unwrap();
    let message = open(&zip.finish().unwrap().into_inner()).unwrap_err();
    assert!(message.contains("must have one entry <name>/data.pkl"), "{message}");
}

#[test]
fn truncated_files_are_refused() {
    for name in ["state_dict.bin", "module.pt", "old.bin", "refused/os_system.bin"] {
        let bytes = fs::read(fixture("pytorch").join(name)).unwrap();
        for len in (0..bytes.len()).step_by(13).chain([bytes.len() - 1]) {
            assert!(open(&bytes[..len]).is_err(), "{name} cut to {len} bytes");
        }
    }
}

/// Whatever happens to the bytes: an error, or tensors that can be read.
#[test]
fn damaged_files_never_panic() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let (mut refused, mut read) = (0, 0);
    for name in ["state_dict.bin", "protocol4.bin", "module.pt", "old.bin"] {
        let good = fs::read(fixture("pytorch").join(name)).unwrap();
        // The pickle; and in a quarter of the cases anything, such as the directory of the archive.
        let pickle = match ZipArchive::new(Cursor::new(&good)) {
            Ok(mut zip) => {
                let name = zip.file_names().map(|n| n.unwrap().into_owned()).find(|n| n.ends_with("/data.pkl")).unwrap();
                let entry = zip.by_index_raw(zip.index_for_name(&name).unwrap());
                let entry = entry.unwrap();
                entry.data_start().unwrap() as usize..(entry.data_start().unwrap() + entry.size()) as usize
            }
            Err(_) => 0..good.len(),
        };
        for case in 0..400 {
            let mut bytes = good.clone();
            for _ in 0..1 + random(4) {
                let at = if case % 4 == 0 { random(good.len()) } else { pickle.start + random(pickle.len()) };
                bytes[at] = if random(2) == 0 { random(256) as u8 } else { bytes[at] ^ (1 << random(8)) };
            }
            let dir = checkpoint(&[("pytorch_model.bin", &bytes)]);
            let Ok(c) = Checkpoint::open(dir.path()) else {
                refused += 1;
                continue;
            };
            for tensor in c.unused([]) {
                if let Some((dtype, shape)) = c.tensor(&tensor) {
                    let (rows, bytes) = (shape.first().copied().unwrap_or(1), dtype.size() * shape.iter().product::<usize>());
                    let mut buf = vec![];
                    c.read_rows(&tensor, 0..rows, &mut buf).unwrap();
                    assert_eq!(buf.len(), bytes, "{name} {case} {tensor}");
                }
            }
            read += 1;
        }
    }
    assert!(refused > 100 && read > 100, "{refused} refused, {read} read: the cases are lopsided");
}

/// The artifact of a checkpoint does not depend on the format of its weights.
#[test]
fn compiles_to_the_same_weights() {
    let dir = TempDir::new().unwrap();
    let model = dir.path().join("checkpoint");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(fixture("qwen2-vl")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "json") {
            fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
        }
    }
    let bytes = fs::read(fixture("qwen2-vl/model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<_> = tensors.tensors().into_iter().enumerate().map(|(i, (name, view))| (i.to_string(), name, view)).collect();
    let shapes: Vec<Vec<usize>> = tensors.iter().map(|(_, _, v)| v.shape().to_vec()).collect();
    let strides: Vec<Vec<usize>> = shapes.iter().map(|s| (1..=s.len()).map(|i| s[i..].iter().product()).collect()).collect();
    let views: Vec<_> = std::iter::zip(&tensors, std::iter::zip(&shapes, &strides))
        .map(|((key, name, view), (shape, strides))| {
            let class = match view.dtype() {
                Dtype::BF16 => "BFloat16",
                Dtype::F32 => "Float",
                other => panic!("{other}"),
            };
            View { name, class, key, len: shape.iter().product(), offset: 0, shape, strides }
        })
        .collect();
    let storages: Vec<_> = tensors.iter().map(|(key, _, view)| (key.as_str(), view.data())).collect();
    fs::write(model.join("pytorch_model.bin"), archive(&pickle(&views), &storages)).unwrap();

    for target in ["cpu", "onnx-cpu"] {
        let weights = |model: &Path, name: &str| {
            let out = dir.path().join(format!("{name}-{target}"));
            let run = Command::new(env!("CARGO_BIN_EXE_vlmc"))
                .args(["compile", "--target", target])
                .arg(model)
                .arg("-o")
                .arg(&out)
                .env("HF_HUB_OFFLINE", "1")
                .output()
                .unwrap();
            assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
            fs::read(out.join("weights.safetensors")).unwrap()
        };
        assert!(weights(&fixture("qwen2-vl"), "safetensors") == weights(&model, "pytorch"), "{target}: other weights");
    }
}
