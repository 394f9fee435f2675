#!/usr/bin/env bash
# Sets up what the tests need (ONNX Runtime and the ONNX checker, from PyPI, into target/) and runs all of them.
# With --clients, also runs clients of other people on compiled artifacts: onnxruntime-genai, transformers.js, OpenVINO, Triton (1 GB
# more from PyPI and npm).
# Needs Rust and a Python 3 with pip; Python serves only to fetch and check, never to compile or run a model.
set -euo pipefail
cd "$(dirname "$0")"

packages=(onnxruntime==1.32.0 onnx==1.23.2 numpy)
if [ "$(cat target/python/.packages 2>/dev/null)" != "${packages[*]}" ]; then
  rm -rf target/python
  python3 -m pip install --quiet --disable-pip-version-check --target target/python "${packages[@]}"
  # A name without a version, for .cargo/config.toml.
  (cd target/python/onnxruntime/capi && ln -sf libonnxruntime.so.1* libonnxruntime.so)
  echo "${packages[*]}" > target/python/.packages
fi

cargo fmt --all --check
cargo clippy --workspace --all-targets --features vlmc-tests/tract -- -D warnings
cargo test --workspace --features vlmc-tests/tract

# The kernels' tests again, to find reads and writes outside of memory: on AVX2 and without SIMD, all that Valgrind knows (Miri knows
# neither AVX-512 nor assembly). What it says of values that are not initialised is left out: compilers load and compare some that
# they then do not use. The same binary as above, since `cargo test -p` would build it anew, with other features of the dependencies.
if command -v valgrind > /dev/null; then
  kernels=$(cargo test --workspace --features vlmc-tests/tract --no-run 2>&1 | sed -n 's/.*(\(.*vlmc_kernels-.*\))/\1/p')
  valgrind --quiet --error-exitcode=1 --undef-value-errors=no "$kernels" --skip probe
fi

# The reference checker of the ONNX project, on every graph of every fixture; compiled by the binary that the tests ran, too.
rm -rf target/onnx-check
for checkpoint in fixtures/*/; do
  [ -f "$checkpoint/model.safetensors" ] || [ -f "$checkpoint/model.safetensors.index.json" ] || continue
  for options in "onnx-cpu" "onnx-cuda" "onnx-cuda --dtype bf16" "onnx-tensorrt" "onnx-tensorrt --dtype f32" "onnx-tensorrt --opset 17" \
    "onnx-cpu --quant int4" "onnx-tensorrt --quant int4" "onnx-tensorrt --quant int8 --opset 17"; do
    out="target/onnx-check/$(basename "$checkpoint")-${options// /}"
    # shellcheck disable=SC2086 # options are words
    "${CARGO_TARGET_DIR:-target}/debug/vlmc" compile "$checkpoint" --target $options -o "$out"
  done
done
for opset in 17 19 23; do
  "${CARGO_TARGET_DIR:-target}/debug/vlmc" compile fixtures/shapes-vl --target onnx-tensorrt --opset $opset --quant int8 \
    --calibrate fixtures/shapes-vl/calibration.jsonl -o "target/onnx-check/shapes-vl-calibrated-$opset"
done
PYTHONPATH=target/python python3 tests/tools/check_onnx.py target/onnx-check/*/*.onnx

if [ "${1:-}" = --clients ]; then
  python3 tests/clients/run.py "${CARGO_TARGET_DIR:-target}/debug/vlmc"
fi
