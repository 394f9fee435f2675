"""One measurement of a peer, and the same of vlmc."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

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
ALL = tuple(BY_NAME)
PEERS = [
    Peer("llama.cpp Q4_0", "llama.cpp", "4-bit text in groups of 32, bf16 tower", "int4", ALL),
    Peer("llama.cpp Q8_0", "llama.cpp", "8-bit text in groups of 32", "int8", TEXT),
    Peer("OpenVINO GenAI", "openvino", "4-bit text in groups of 128, 8-bit head and tower", "int4", ALL),
    Peer("onnxruntime-genai", "onnxruntime-genai", "4-bit text in groups of 32, no tower", "int4", TEXT),
    Peer("torch", "torch", "bf16", "int4", ALL),
]


def measure_peer(place: Place, peer: Peer, rows: list[str], threads: int, prompt_tokens: int) -> dict[str, float]:
    """Numbers of the rows, which are of one group, in the units of rows.py."""
    if peer.tool == "llama.cpp":
        return llama_cpp(place, place.model(f"{peer.name.split()[1]}.gguf"), rows, threads, prompt_tokens)
    model = place.peers_checkpoint if peer.tool == "torch" else place.model(peer.tool)
    finished = run([place.python(peer.tool), HERE / "worker.py", peer.tool, model, str(threads), str(prompt_tokens), *rows])
    measured = last_json(finished)
    return measured | {row: finished.peak_bytes / GB for row in rows if row.startswith("memory")}


def llama_cpp(place: Place, model: Path, rows: list[str], threads: int, prompt_tokens: int) -> dict[str, float]:
    group = BY_NAME[rows[0]].group
    common = ["--model", model, "--threads", str(threads)]
    if group == "text":
        prompts = [row.partition("-")[2] for row in rows if row.startswith("prefill")]
        finished = run(
            [place.llama_tool("llama-bench"), *common, "--output", "json", "--repetitions", "1"]
            + ["--n-prompt", ",".join(prompts) or "0", "--n-gen", "64" if "decode" in rows else "0"]
        )
        tests = json.loads(finished.output[finished.output.index("[\n") :])
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
        + ["--prompt", "a", "--n-predict", "1", "--ctx-size", "4096", "--batch-size", "512", "--verbosity", "4"]
    )
    encoded = re.search(r"encoding done in (\d+) ms", finished.output)
    if encoded is None:
        raise Failed("llama-mtmd-cli does not say how long it encoded the picture: 'encoding done in' is not in its output")
    return {f"encode-{side}": int(encoded[1]) / 1e3, "memory": finished.peak_bytes / GB}


def measure_vlmc(place: Place, vlmc: Path, quant: str, rows: list[str], threads: int) -> tuple[dict[str, float], dict[str, float]]:
    """Numbers as of `measure_peer`, and what part of the machine's limit (bandwidth or arithmetic) they are."""
    artifact = place.model(f"vlmc-{quant}")
    group = BY_NAME[rows[0]].group
    if group in ("start", "memory"):
        picture = ["--image", place.picture(448)] if group == "memory" else []
        finished = run([vlmc, "run", artifact, *picture, *FIRST, "--threads", str(threads)])
        memory = "memory" if group == "memory" else "memory-text"
        return {"first-token": finished.seconds, memory: finished.peak_bytes / GB}, {}
    sides = [row.partition("-")[2] for row in rows if row.startswith("encode")]
    prompts = [row.partition("-")[2] for row in rows if row.startswith("prefill")]
    # What is not asked for is made as small as can be.
    options = ["--repeat", "1", "--context", "1", "--new-tokens", "64" if "decode" in rows else "1"]
    options += [word for side in sides or ["56"] for word in ("--picture", f"{side}x{side}")]
    options += [word for tokens in prompts or ["1"] for word in ("--prompt-tokens", tokens)]
    report = last_json(run([vlmc, "bench", artifact, "--json", "--threads", str(threads), *options]))
    numbers, limits = {}, {}
    for encode in report["encode"]:
        row = f"encode-{encode['picture'].partition('x')[0]}"
        numbers[row], limits[row] = encode["seconds"]["median"], encode["fraction_of_peak"]
    for prefill in report["prefill"]:
        row = f"prefill-{prefill['tokens']}"
        numbers[row], limits[row] = prefill["tokens_per_s"]["median"], prefill["fraction_of_peak"]
    decode = report["decode"]
    numbers["decode"], limits["decode"] = decode["tokens_per_s"]["median"], decode["fraction_of_bandwidth"]
    return numbers, {row: of["median"] for row, of in limits.items() if of}


# The shortest question; the template makes more tokens of it.
FIRST = ["--prompt", "a", "--max-new-tokens", "1", "--json"]


def prompt_tokens(place: Place, vlmc: Path) -> int:
    """How many tokens vlmc's first answer follows on; the peers get as many."""
    return last_json(run([vlmc, "run", place.model("vlmc-int4"), *FIRST]))["prompt_tokens"]


def last_json(finished: Finished) -> dict:
    """The object that output ends with."""
    start = max(finished.output.rfind("\n{"), 0)
    try:
        return json.loads(finished.output[start:])
    except ValueError as e:
        raise Failed(f"no JSON at the end of the output: {e}") from e
