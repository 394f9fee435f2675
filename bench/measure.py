"""One measurement of a peer, and the same of vlmc."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import quoting
import setup
from commands import Failed, Finished, run
from rows import BY_NAME
from setup import HERE, Place

GB = 1e9


@dataclass(frozen=True)
class Peer:
    # As the report names it.
    name: str
    # What is set up: see setup.py.
    tool: str
    # Its weights, in words.
    weights: str
    # The artifact of vlmc that it is measured beside.
    quant: str
    rows: tuple[str, ...]


TEXT = ("decode", "prefill-512", "prefill-733", "first-token", "memory-text")
ALL = (*TEXT, "encode-448", "encode-1344", "memory")
# onnxruntime-genai running graphs that others made.
CLIENT = ("onnx-decode", "onnx-prefill-512", "onnx-g32-decode", "onnx-g32-prefill-512")
PEERS = [
    Peer("llama.cpp Q4_0", "llama.cpp", "4-bit text in groups of 32, bf16 tower", "g32", (*ALL, "equal-accuracy", "lookup")),
    Peer("llama.cpp Q8_0", "llama.cpp", "8-bit text in groups of 32", "int8", TEXT),
    Peer("OpenVINO GenAI", "openvino", "4-bit text in groups of 128, 8-bit head and tower", "g32", ALL),
    Peer("onnxruntime-genai", "onnxruntime-genai", "4-bit text in groups of 32, no tower", "g32", (*TEXT, *CLIENT, "compile", "compile-memory")),
    Peer("mobius", "mobius-onnx", "4-bit text and head, Q4_0 of llama.cpp, no tower", "onnx-genai", CLIENT),
    Peer("torch", "torch", "bf16", "g32", ALL),
    Peer("torch.onnx", "torch.onnx", "f32 tower for pictures of this size", "onnx", ("onnx-encode-448",)),
    Peer("vlmc g32", "vlmc", "as vlmc's", "g32", ("context",)),
]


def measure_peer(place: Place, vlmc: Path, peer: Peer, rows: list[str], threads: int, prompt_tokens: int) -> dict[str, float]:
    """Numbers of the rows, which are of one group, in the units of rows.py."""
    if peer.tool == "vlmc":
        return {"context": bench(place, vlmc, peer.quant, threads, ["--context", "128", "--new-tokens", "64"])["decode"]["gb_s"]["median"]}
    if peer.tool == "llama.cpp":
        return llama_cpp(place, vlmc, place.model(f"{peer.name.split()[1]}.gguf"), rows, threads, prompt_tokens)
    group = BY_NAME[rows[0]].group
    if group == "compile":
        return compiling(place, lambda out: setup.build_command(place, out))
    model = place.peers_checkpoint if peer.tool == "torch" else place.model(peer.tool)
    if group.startswith("onnx"):
        return in_client(place, "torch.onnx" if group == "onnx picture" else "onnxruntime-genai", model, threads, rows)
    finished = run([place.python(peer.tool), HERE / "worker.py", peer.tool, model, str(threads), str(prompt_tokens), *rows])
    measured = last_json(finished)
    return measured | {row: finished.peak_bytes / GB for row in rows if row.startswith("memory")}


def in_client(place: Place, tool: str, model: Path, threads: int, rows: list[str]) -> dict[str, float]:
    """What a client makes of ONNX graphs, whoever made them."""
    kinds = {row.removeprefix("onnx-").removeprefix("g32-"): row for row in rows}
    measured = last_json(run([place.python(tool), HERE / "worker.py", tool, model, str(threads), "1", *kinds]))
    return {kinds[kind]: value for kind, value in measured.items()}


def compiling(place: Place, command) -> dict[str, float]:
    """Of a command that writes a model to a directory."""
    out = place.root / "compiled"
    setup.remove(out)
    finished = run(command(out))
    setup.remove(out)
    return {"compile": finished.seconds, "compile-memory": finished.peak_bytes / GB}


def llama_cpp(place: Place, vlmc: Path, model: Path, rows: list[str], threads: int, prompt_tokens: int) -> dict[str, float]:
    group = BY_NAME[rows[0]].group
    common = ["--model", model, "--threads", str(threads)]
    if group in ("equal accuracy", "lookup"):
        (row,) = rows
        before = count_tokens(place, vlmc, quoting.PROMPT) if group == "lookup" else 0
        tests = llama_bench(place, [*common, "--n-prompt", "0", "--n-gen", "64", "--n-depth", str(before)])
        return {row: tests[0]["avg_ts"]}
    if group == "text":
        prompts = [row.partition("-")[2] for row in rows if row.startswith("prefill")]
        tests = llama_bench(place, [*common, "--n-prompt", ",".join(prompts) or "0", "--n-gen", "64" if "decode" in rows else "0"])
        return {f"prefill-{t['n_prompt']}" if t["n_prompt"] else "decode": t["avg_ts"] for t in tests}
    if group == "start":
        # Its run before the first is left out: it costs time here.
        finished = run(
            [place.llama_tool("llama-completion"), *common, "--prompt", "a" * prompt_tokens, "--n-predict", "1"]
            + ["--no-conversation", "--no-warmup", "--ctx-size", "4096"]
        )
        return {"first-token": finished.seconds, "memory-text": finished.peak_bytes / GB}
    side = 1344 if group == "large picture" else 448
    finished = run(
        [place.llama_tool("llama-mtmd-cli"), *common, "--mmproj", place.model("mmproj-bf16.gguf"), "--image", place.picture(side)]
        + ["--prompt", "a", "--n-predict", "1", "--ctx-size", "8192" if side == 1344 else "4096", "--batch-size", "512", "--verbosity", "4"]
    )
    encoded = re.search(r"encoding done in (\d+) ms", finished.output)
    if encoded is None:
        raise Failed("llama-mtmd-cli does not say how long it encoded the picture: 'encoding done in' is not in its output")
    return {f"encode-{side}": int(encoded[1]) / 1e3, "memory": finished.peak_bytes / GB}


def llama_bench(place: Place, options: list[str | Path]) -> list[dict]:
    finished = run([place.llama_tool("llama-bench"), "--output", "json", "--repetitions", "1", *options])
    return json.loads(finished.output[finished.output.index("[\n") :])


def measure_vlmc(place: Place, vlmc: Path, quant: str, rows: list[str], threads: int) -> dict[str, dict]:
    """Of each row its number, `value`, as of `measure_peer`, and what else is to be told of it: `of_limit`, its part of the machine's
    limit (bandwidth or arithmetic); `bytes_per_token`; `acceptance`."""
    group = BY_NAME[rows[0]].group
    if group in ("start", "memory"):
        picture = ["--image", place.picture(448)] if group == "memory" else []
        finished = run([vlmc, "run", place.artifact(quant), *picture, *first(SHORTEST), "--threads", str(threads)])
        memory = "memory" if group == "memory" else "memory-text"
        return {"first-token": {"value": finished.seconds}, memory: {"value": finished.peak_bytes / GB}}
    if group == "lookup":
        return {"lookup": lookup(place, vlmc, quant, threads)}
    if group == "compile":
        numbers = compiling(place, lambda out: setup.compile_command(place, vlmc, place.checkpoint, *setup.of_artifact(quant), out))
        return {row: {"value": value} for row, value in numbers.items()}
    if group.startswith("onnx text"):
        return {row: {"value": value} for row, value in in_client(place, "onnxruntime-genai", place.artifact(quant), threads, rows).items()}
    if group == "onnx picture":
        options = ["--picture", "448x448", "--new-tokens", "1", "--context", "1"]
        encode = bench(place, vlmc, quant, threads, options, onnxruntime(place))["encode"][0]
        return {"onnx-encode-448": {"value": encode["seconds"]["median"]}}
    if group == "context":
        decode = bench(place, vlmc, quant, threads, ["--context", "4096", "--new-tokens", "64"])["decode"]
        return {"context": of_decode(decode) | {"value": decode["gb_s"]["median"]}}
    decodes = "decode" in rows or group == "equal accuracy"
    # What is not asked for is made as small as can be.
    options = ["--context", "1", "--new-tokens", "64" if decodes else "1"]
    options += [word for row in rows if row.startswith("encode") for side in [row.partition("-")[2]] for word in ("--picture", f"{side}x{side}")]
    options += [word for row in rows if row.startswith("prefill") for word in ("--prompt-tokens", row.partition("-")[2])]
    report = bench(place, vlmc, quant, threads, options)
    numbers = {"equal-accuracy" if group == "equal accuracy" else "decode": of_decode(report["decode"])}
    for encode in report["encode"]:
        numbers[f"encode-{encode['picture'].partition('x')[0]}"] = {"value": encode["seconds"]["median"], "of_limit": encode["fraction_of_peak"]["median"]}
    for prefill in report["prefill"]:
        number = {"value": prefill["tokens_per_s"]["median"]}
        # Of longer prompts `vlmc bench` counts what the first block of 512 tokens computes.
        numbers[f"prefill-{prefill['tokens']}"] = number | ({"of_limit": prefill["fraction_of_peak"]["median"]} if prefill["tokens"] <= 512 else {})
    return numbers


def bench(place: Place, vlmc: Path, quant: str, threads: int, options: list[str], env: dict[str, str] | None = None) -> dict:
    """What `vlmc bench` reports; what is not among `options` is small."""
    small = {"--picture": "56x56", "--prompt-tokens": "1"}
    options = [*options, *(word for option, value in small.items() if option not in options for word in (option, value))]
    return last_json(run([vlmc, "bench", place.artifact(quant), "--json", "--threads", str(threads), "--repeat", "1", *options], env))


def of_decode(decode: dict) -> dict:
    return {
        "value": decode["tokens_per_s"]["median"],
        "of_limit": decode["fraction_of_bandwidth"]["median"],
        "bytes_per_token": decode["bytes_per_token"],
    }


def lookup(place: Place, vlmc: Path, quant: str, threads: int) -> dict:
    """Tokens per second with prompt lookup, whose answer must be that without."""
    command = [vlmc, "run", place.artifact(quant), "--prompt", quoting.PROMPT, "--max-new-tokens", "64", "--temperature", "0"]
    command += ["--repetition-penalty", "1", "--json", "--threads", str(threads)]
    plain, ahead = last_json(run(command)), last_json(run([*command, "--prompt-lookup"]))
    if plain["text"] != ahead["text"] or plain["finish"] != "length":
        raise Failed(f"prompt lookup changed the answer, or it ended early ({plain['finish']}): {plain['text']!r}, {ahead['text']!r}")
    return {"value": ahead["decode_tokens_per_second"], "acceptance": ahead["prompt_lookup"]["acceptance"], "per_pass": ahead["prompt_lookup"]["tokens_per_pass"]}


def onnxruntime(place: Place) -> dict[str, str] | None:
    """The environment in which vlmc finds ONNX Runtime, if a peer has it."""
    roots = [place.python(name).parent.parent for name in ("torch.onnx", "onnxruntime-genai")]
    found = [file for root in roots for file in root.glob("lib/python*/site-packages/onnxruntime/capi/libonnxruntime.so.1*")]
    return {"ORT_DYLIB_PATH": str(found[0])} if found else None


def accuracy(place: Place, vlmc: Path) -> dict[str, dict]:
    """What policies of vlmc cost a small model that was trained: `vlmc eval` against the same model without quantization."""
    variants = {quant: (setup.TRAINED, quant, []) for quant in ("none", "q4_0", "g32", "int4")}
    variants["equal"] = (setup.TRAINED, "equal", ["--calibrate", setup.TRAINED / "calibration.jsonl"])
    env = onnxruntime(place)
    if place.model("onnxruntime-genai").exists():
        # By its search vlmc finds the codes and scales of numbers that are rounded already.
        variants["onnx-builder"] = (setup.rounded_by_builder(place), "g32", setup.ONNX_CPU)
        variants |= {f"onnx-{quant}": (setup.TRAINED, quant, setup.ONNX_CPU) for quant in ("g32", "int4")}
    artifacts = {name: setup.compile(place, vlmc, *variant, f"trained-{name}") for name, variant in variants.items()}
    data = ["--reference", artifacts.pop("none"), "--data", setup.TRAINED / "heldout.jsonl", "--max-new-tokens", "16", "--json"]
    scores = {name: last_json(run([vlmc, "eval", artifact, *data], env)) for name, artifact in artifacts.items()}
    file = place.model("Q4_0.gguf")
    if file.exists():
        # A token reads all of it: the head is the table of tokens.
        scores["q4_0"]["bytes_per_token"] = file.stat().st_size
    return scores


# The template makes more tokens of it.
SHORTEST = "a"


def first(question: str) -> list[str]:
    """Asks `vlmc run` for the first token of an answer."""
    return ["--prompt", question, "--max-new-tokens", "1", "--json"]


def count_tokens(place: Place, vlmc: Path, question: str = SHORTEST) -> int:
    """How many tokens vlmc's answer to a question follows on; the peers get as many."""
    return last_json(run([vlmc, "run", place.artifact("g32"), *first(question)]))["prompt_tokens"]


def last_json(finished: Finished) -> dict:
    """The object that output ends with."""
    start = max(finished.output.rfind("\n{"), 0)
    try:
        return json.loads(finished.output[start:])
    except ValueError as e:
        raise Failed(f"no JSON at the end of the output: {e}") from e
