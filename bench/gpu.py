#!/usr/bin/env python3
"""Measures vlmc's ONNX graphs on an NVIDIA GPU beside torch, and compares them with the goldens: see README.md.

Usage: python3 bench/gpu.py [options]
       python gpu.py torch MODEL DEVICE CONTEXT NEW_TOKENS PROMPT_TOKENS...   (by itself, in its virtual environment)
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import setup
from commands import Failed, run
from measure import last_json
from setup import HERE, REPOSITORY, Place, log

PACKAGES = {
    "cuda": ["onnxruntime-gpu[cuda,cudnn]", "torch", "transformers", "safetensors", "numpy"],
    "cpu": ["onnxruntime", "torch", "transformers", "safetensors", "numpy"],
}
# Of a model that computes in f16, as in the README.
TOLERANCE = 2e-2
# What a client gives besides the graphs' own inputs, and what of these it leaves to vlmc.
GIVEN = {"input_ids", "attention_mask", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "images_seq_mask", "images_emb_mask"}
MADE = {"logit_positions", "prompt_length", "feature_positions"}
# Why a case is left out: the kernel has no mask for that padding (docs/onnx.md); Qwen-VL's goldens have the pictures
# apart.
LEFT_OUT = ("has padding before tokens", "image placeholders, but the images given make 0 features")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--provider", choices=PACKAGES, default="cuda", help="cpu is for trying the script [default: cuda]")
    parser.add_argument("--checkpoint", type=Path, help="directory of a Qwen2-VL checkpoint [default: made by `vlmc synth qwen2-vl-2b`]")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache when decoding begins")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5, help="pairs of measurements, torch and vlmc in turn")
    parser.add_argument("--fixtures", nargs="*", help="names of fixtures to compare with their goldens [default: all that have some]")
    parser.add_argument("--vlmc", type=Path, help="the binary [default: built from this repository]")
    parser.add_argument("--python", type=Path, help="an interpreter that has the packages [default: a virtual environment in the work directory]")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "target/bench-gpu")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "docs/gpu.md", help="file to write [default: docs/gpu.md]")
    return parser.parse_args()


def libraries(python: Path) -> dict[str, str]:
    """Where vlmc finds ONNX Runtime, and that finds CUDA: in the packages of the interpreter."""
    find = """
import importlib.util, json, pathlib
root = pathlib.Path(importlib.util.find_spec("onnxruntime").origin).parent
site = {p.parent for p in root.parent.glob("nvidia/**/*.so*")}
print(json.dumps([str(next(root.glob("capi/libonnxruntime.so*"))), ":".join(sorted(map(str, site)))]))
"""
    library, path = json.loads(run([python, "-c", find]).output.splitlines()[-1])
    return {"ORT_DYLIB_PATH": library, "LD_LIBRARY_PATH": path}


def parity(args: argparse.Namespace, vlmc: Path, env: dict[str, str], place: Place) -> list[dict]:
    """Of each fixture the largest difference of an output from its golden, as a share of the golden's largest value (at least 1)."""
    found = (p.parent for p in (REPOSITORY / "fixtures").glob("*/golden.safetensors"))
    names = args.fixtures if args.fixtures is not None else sorted(p.name for p in found if list(p.glob("model.safetensors*")))
    return [of_fixture(args, vlmc, env, place, name) for name in names]


def of_fixture(args: argparse.Namespace, vlmc: Path, env: dict[str, str], place: Place, name: str) -> dict:
    import numpy
    from safetensors.numpy import load_file, save_file

    checkpoint, artifact = REPOSITORY / "fixtures" / name, place.model(f"fixture-{name}")
    setup.remove(artifact)
    setup.make(artifact, f"the artifact of {name}", lambda part: run([vlmc, "compile", checkpoint, "--target", "onnx-cuda", "-o", part]))
    entries = json.loads((artifact / "manifest.json").read_text())["entries"]
    outputs = {port["name"] for entry in entries for port in entry["outputs"]}
    takes = ({port["name"] for entry in entries for port in entry["inputs"]} - outputs | GIVEN) - MADE
    golden = load_file(checkpoint / "golden.safetensors")
    result = {"fixture": name, "cases": 0, "left_out": 0, "compared": 0, "difference": 0.0}
    # Of a model that answers prompts some tensors belong to no case alone.
    cases = json.loads((checkpoint / "golden.json").read_text()).get("cases") if (checkpoint / "golden.json").exists() else None
    for case in cases or sorted({key.rpartition("/")[0] for key in golden}):
        tensors = {key.rpartition("/")[2]: t for key, t in golden.items() if key.rpartition("/")[0] == case}
        inputs = {key: numpy.ascontiguousarray(t) for key, t in tensors.items() if key in takes}
        if not inputs:
            continue
        given, made = place.root / "in.safetensors", place.root / "out.safetensors"
        save_file(inputs, given)
        try:
            run([vlmc, "exec", artifact, "--inputs", given, "--outputs", made, "--provider", args.provider], env)
        except Failed as e:
            if not any(reason in str(e) for reason in LEFT_OUT):
                raise
            result["left_out"] += 1
            continue
        result["cases"] += 1
        for key, got in load_file(made).items():
            # Of a long prompt the golden has the last logits.
            expected = tensors.get(key)
            if expected is None or (key == "generated_ids"):
                continue
            got = got.reshape(-1, got.shape[-1]) if got.ndim else got
            expected = expected.reshape(-1, expected.shape[-1]) if expected.ndim else expected
            got = got[-len(expected) :] if got.ndim else got
            if "attention_mask" in tensors and len(expected) == tensors["attention_mask"].size:
                live = tensors["attention_mask"].reshape(-1) != 0
                got, expected = got[live], expected[live]
            largest = max(1.0, float(numpy.abs(expected).max()))
            result["difference"] = max(result["difference"], float(numpy.abs(got.astype("f8") - expected).max()) / largest)
            result["compared"] += 1
    if result["compared"] == 0:
        raise Failed(f"{name}: no output has a golden")
    log(f"{name}: {result['difference']:.1e} of {result['compared']} outputs")
    return result


def measure_torch(model: str, device: str, context: int, new_tokens: int, *prompts: int) -> dict:
    """Runs in the virtual environment, and is warm when it measures."""
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    torch.set_grad_enabled(False)
    dtype = torch.float16 if device == "cuda" else torch.float32
    net = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").to(device).eval()

    def seconds(f) -> float:
        wait()
        start = time.perf_counter()
        f()
        wait()
        return time.perf_counter() - start

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def ids(tokens: int):
        return torch.full((1, tokens), 97, device=device)

    def prefill(tokens: int) -> float:
        return seconds(lambda: net(input_ids=ids(tokens), use_cache=True, logits_to_keep=1))

    def decode() -> float:
        reply = net(input_ids=ids(context), use_cache=True, logits_to_keep=1)

        def steps() -> None:
            logits, cache = reply.logits, reply.past_key_values
            for _ in range(new_tokens):
                step = net(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
                logits, cache = step.logits, step.past_key_values

        return seconds(steps)

    def warm(f, *arguments) -> float:
        f(*arguments)
        return f(*arguments)

    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = [seconds(lambda: target.copy_(source)) for _ in range(11)]
    text = net.model.language_model
    # The table of tokens is read whole only where it is the head too.
    read = {p.data_ptr(): p.nbytes for n, p in text.named_parameters() if not n.startswith("embed_tokens")}
    read |= {net.lm_head.weight.data_ptr(): net.lm_head.weight.nbytes}
    config = net.config.get_text_config()
    head = config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head * torch.finfo(dtype).bits // 8
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": f"torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, eager, sdpa",
        # Every byte is read and written.
        "bandwidth_gb_s": 2e-9 * source.nbytes / median(copies),
        "weight_bytes": sum(read.values()),
        "kv_bytes": kv * (context + new_tokens // 2),
        "decode": new_tokens / warm(decode),
        "prefill": {str(n): n / warm(prefill, n) for n in prompts},
    }


def measure_vlmc(args: argparse.Namespace, vlmc: Path, artifact: Path, env: dict[str, str]) -> dict:
    options = ["--provider", args.provider, "--context", args.context, "--new-tokens", args.new_tokens, "--repeat", 1, "--json"]
    options += [word for n in args.prompt_tokens for word in ("--prompt-tokens", n)]
    report = last_json(run([vlmc, "bench", artifact, "--picture", "448x448", *map(str, options)], env))
    return {
        "decode": report["decode"]["tokens_per_s"]["median"],
        "prefill": {str(p["tokens"]): p["tokens_per_s"]["median"] for p in report["prefill"]},
        "encode_s": report["encode"][0]["seconds"]["median"],
        "load_s": report["load_s"]["median"],
    }


def spread(values: list[float]) -> str:
    number = lambda v: f"{v:.3g}" if v < 100 else f"{v:.0f}"  # noqa: E731
    return number(median(values)) + (f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else "")


def report(results: dict) -> str:
    samples = results["samples"]
    first = samples[0]["torch"]
    of_bandwidth = lambda who: [  # noqa: E731
        1e-9 * (s["torch"]["weight_bytes"] + s["torch"]["kv_bytes"]) * s[who]["decode"] / s["torch"]["bandwidth_gb_s"] for s in samples
    ]
    rows = [("decode", lambda s: s["decode"])] + [(f"prefill of {n}", lambda s, n=n: s["prefill"][n]) for n in first["prefill"]]
    lines = [
        "# vlmc on a GPU",
        "",
        "Written by `bench/gpu.py`; do not edit.",
        "",
        f"{first['device']}, {results['date']}, vlmc {results['vlmc']} on the provider `{results['provider']}` in f16 (`onnx-cuda`), beside "
        f"{first['torch']}. The same weights for both: {results['checkpoint']}. Both run in turn, each time in new processes; numbers are "
        f"medians of {len(samples)} with the least and the largest.",
        "",
        f"A device copy moves {spread([s['torch']['bandwidth_gb_s'] for s in samples])} GB/s (read and written bytes), measured in each round. A "
        f"token needs {1e-9 * (first['weight_bytes'] + first['kv_bytes']):.2f} GB: weights of the text model with its head, and the cache. "
        f"Decoding is {results['new_tokens']} tokens after {results['context']}.",
        "",
        "| tokens per second | torch | vlmc | vlmc is better by |",
        "|---|---|---|---|",
    ]
    for name, of in rows:
        theirs, ours = [of(s["torch"]) for s in samples], [of(s["vlmc"]) for s in samples]
        lines.append(f"| {name} | {spread(theirs)} | {spread(ours)} | {spread([o / t for o, t in zip(ours, theirs)])} |")
    lines += [
        f"| decode, share of the bandwidth | {spread(of_bandwidth('torch'))} | {spread(of_bandwidth('vlmc'))} | |",
        "",
        f"vlmc encodes a picture of 448x448 in {spread([s['vlmc']['encode_s'] for s in samples])} s, and loads in "
        f"{spread([s['vlmc']['load_s'] for s in samples])} s.",
        "",
        "## Beside the reference implementations",
        "",
        f"The largest difference of any output of `vlmc exec` from the goldens, relative to the golden's largest value (at least 1); {TOLERANCE} "
        "is allowed. Left out are batches with padding before tokens, for which the kernel has no mask, and prompts with pictures of Qwen-VL.",
        "",
        "| fixture | cases | left out | outputs | difference |",
        "|---|---|---|---|---|",
    ]
    for p in results["parity"]:
        wrong = "" if p["difference"] <= TOLERANCE else " **too large**"
        lines.append(f"| {p['fixture']} | {p['cases']} | {p['left_out']} | {p['compared']} | {p['difference']:.1e}{wrong} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = arguments()
    place = Place(args.work.resolve())
    place.root.mkdir(parents=True, exist_ok=True)
    python = args.python
    if python is None:
        setup.install(place, setup.SHARED_ENVIRONMENT, PACKAGES[args.provider])
        python = place.python(setup.SHARED_ENVIRONMENT)
    # It compares tensors, for which it needs the packages too.
    if Path(sys.executable).absolute() != python.absolute():
        raise SystemExit(subprocess.call([python, __file__, *sys.argv[1:], "--python", python]))
    env = libraries(python)
    vlmc = args.vlmc.resolve() if args.vlmc else setup.built()
    checkpoint = args.checkpoint or place.checkpoint
    if args.checkpoint is None:
        setup.make(checkpoint, "random weights", lambda part: run([vlmc, "synth", "qwen2-vl-2b", "-o", part]))
    artifact = place.artifact("onnx-cuda")
    setup.remove(artifact)
    setup.make(artifact, "the artifact", lambda part: run([vlmc, "compile", checkpoint, "--target", "onnx-cuda", "-o", part]))
    results = {
        "date": datetime.date.today().isoformat(),
        "provider": args.provider,
        "vlmc": run([vlmc, "--version"]).output.split()[-1],
        "checkpoint": "random, of Qwen2-VL-2B's shape" if args.checkpoint is None else args.checkpoint.name,
        "context": args.context,
        "new_tokens": args.new_tokens,
        "parity": parity(args, vlmc, env, place),
        "samples": [],
    }
    file = place.root / "results.json"
    worker = [python, HERE / "gpu.py", "torch", checkpoint, args.provider, args.context, args.new_tokens, *args.prompt_tokens]
    for _ in range(args.repeat):
        theirs = last_json(run(list(map(str, worker))))
        ours = measure_vlmc(args, vlmc, artifact, env)
        results["samples"].append({"torch": theirs, "vlmc": ours})
        log(f"decode: torch {theirs['decode']:.4g}, vlmc {ours['decode']:.4g} tokens/s")
        file.write_text(json.dumps(results, indent=1))
    args.report.write_text(report(results))
    log(f"{file}: every measurement; {args.report} is written")
    wrong = [p["fixture"] for p in results["parity"] if p["difference"] > TOLERANCE]
    if wrong:
        raise Failed(f"the outputs of {', '.join(wrong)} differ from the goldens")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["torch"]:
            model, device, *numbers = sys.argv[2:]
            print(json.dumps(measure_torch(model, device, *map(int, numbers))))
        else:
            main()
    except Failed as e:
        raise SystemExit(f"error: {e}") from e
