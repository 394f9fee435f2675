//! Writes `compiler/src/back/onnx/proto.rs` from `onnx.proto` (of the Python package onnx, Apache-2.0), both beside this
//! program: `cargo run` in this directory.

use std::{fs, path::Path};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = protox::compile([here.join("onnx.proto")], [here])?;
    let out = std::env::temp_dir();
    prost_build::Config::new().bytes(["raw_data"]).out_dir(&out).compile_fds(files)?;
    let code = fs::read_to_string(out.join("onnx.rs"))?;
    let header = "// Made by tools/onnx-proto from onnx.proto; do not edit.\n#![allow(missing_docs, clippy::all, clippy::pedantic, rustdoc::all)]\n\n";
    fs::write(here.join("../../compiler/src/back/onnx/proto.rs"), format!("{header}{code}"))?;
    Ok(())
}
