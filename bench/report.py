"""Writes benchmarks.md and benchmarks.svg.

Usage: python report.py RESULTS DOCS, with RESULTS the results.json of run.py; needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

import matplotlib
from rows import ROWS, Row, ratio

matplotlib.use("Agg")
# The same results give the same file.
matplotlib.rcParams["svg.hashsalt"] = "vlmc"
import matplotlib.pyplot as plt  # noqa: E402: after the choice of the backend

COLORS = ["#3b6fb6", "#d1772e", "#4c9a57", "#a94f8d", "#7a6a5d", "#2f9c9c", "#b8a02c", "#c2413b"]

INTRODUCTION = """# vlmc beside others, on a CPU

Written by `bench/run.py`; do not edit. Qwen2-VL-2B's shape with random weights of `vlmc synth qwen2-vl-2b`, the same for all:
speed does not depend on them. A peer and vlmc run one after the other, each time in new processes, so that both meet the machine
in the same state, which changes from minute to minute on shared hardware. A ratio belongs to one such pair and says how many
times better vlmc is: above 1, vlmc is ahead. Numbers are medians, with the least and the largest.

- **decode**: 64 tokens, one by one, after a prompt of one token. **prefill**: a prompt's tokens per second, up to the first token
  of the answer. **encode**: a picture through the vision tower.
- vlmc's weights `g32` have the groups of llama.cpp's Q4_0, 32, and so the same 4.5 bits. **no less accurate**: `equal`, `--quant int4` with 3
  bits in half of each layer, of which a token reads fewer bytes than of the peer's. What they cost is below.
- **prompt lookup**: after a prompt that quotes itself, vlmc with `--prompt-lookup`, whose answer is the same as without, and llama.cpp
  after as many tokens. vlmc's weights are `quoting`: `g32`, and one layer such that the answer quotes the prompt 20 tokens at a time,
  with one of its own between (`bench/quoting.py`).
- **weights and cache read**: `vlmc bench` after 4096 tokens beside the same after 128: above 0.87, a token costs at most 15 % more than its
  bytes.
- **start to first token**: from the start of the process, files being in the system's cache, to the first token after a short
  question; for OpenVINO, onnxruntime-genai and torch without the time that Python and imports take.
- **peak memory**: the largest resident set of the process, mapped files included.
- **vlmc's graphs in the same client**: onnxruntime-genai runs what its own builder made of the text model, or what mobius made of it from
  llama.cpp's Q4_0, and what vlmc made with `--target onnx-cpu --layout genai`. `onnx-genai` is `--quant int4`, whose groups of 128 in the
  layers have fewer bytes of scales, 4.25 bits per weight instead of 5; searched scales make up for it, by mean KL and answers (below, beside
  `onnx-builder`). `onnx-g32` has groups of 32, as the builder and Q4_0: a token reads as many bytes, by the same kernel. The tower of these
  graphs, in 8 bits, is beside one that torch.onnx exported in f32 for pictures of this size. **checkpoint to ONNX graphs**: the builder makes the text model, vlmc text model and tower.
- **of the limit**: of this machine's bandwidth (decode) or arithmetic (prefill, encode), measured by `vlmc bench` in the same run.
"""


def spread(values: list[float]) -> str:
    return f"{number(median(values))} ({number(min(values))} to {number(max(values))})" if len(values) > 1 else number(values[0])


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def ratios(row: Row, samples: list[dict]) -> list[float]:
    return [ratio(row, s["theirs"], s["ours"]) for s in samples]


def notes(samples: list[dict]) -> str:
    """Of vlmc's number: its weights, and what prompt lookup did."""
    told = {key: [s[key] for s in samples if key in s] for key in ("acceptance", "per_pass")}
    lookup = [f"{100 * median(told['acceptance']):.0f} % accepted, {number(median(told['per_pass']))} tokens a run"] if told["acceptance"] else []
    return ", ".join([samples[0]["quant"], *lookup])


def select(results: dict, threads: int, row: Row, peer: str) -> list[dict]:
    return [s for s in results["samples"] if (s["threads"], s["row"], s["peer"]) == (threads, row.name, peer)]


def table(results: dict, threads: int) -> str:
    lines = [
        f"## {threads} thread{'s' if threads > 1 else ''}",
        "",
        "| | beside | theirs | vlmc | vlmc is better by | vlmc, of the limit | pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        for peer in results["peers"]:
            samples = select(results, threads, row, peer)
            if not samples:
                continue
            limits = [s["of_limit"] for s in samples if "of_limit" in s]
            cells = [
                f"{row.title}, {row.unit}",
                peer,
                spread([s["theirs"] for s in samples]),
                f"{spread([s['ours'] for s in samples])}, {notes(samples)}",
                spread(ratios(row, samples)),
                f"{100 * median(limits):.0f} %" if limits else "",
                str(len(samples)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


WEIGHTS = {
    "q4_0": "layers in 4 bits in groups of 32, rounded to the nearest, as Q4_0 of llama.cpp; head in 8 bits, for its 6",
    "g32": "layers and head in 4 bits in groups of 32, searched scales",
    "int4": "`--quant int4`: layers in 4 bits in groups of 128, head in groups of 32, searched scales",
    "equal": "`int4`, and gate and up projections in 3 bits in groups of 128, calibrated on 48 other pictures (in the rows of speed above they are not: "
    "random weights have nothing to be calibrated on)",
    "onnx-builder": "in ONNX Runtime, where scales are f32: layers and head with the codes and scales of onnxruntime-genai's builder, groups of 32, "
    "5 bits per weight",
    "onnx-g32": "the same with the codes and scales of `g32`",
    "onnx-int4": "the same with those of `int4`, as in `onnx-genai`: 4.25 bits per weight of a layer, 5 of the head",
}


def accuracy(results: dict) -> str:
    lines = [
        "## What vlmc's weights cost",
        "",
        "Bytes per token are of Qwen2-VL-2B's shape, with the KV cache of few tokens; those of q4_0 are llama.cpp's. Of heads",
        "in vlmc's runtime the upper halves of the codes count, which is what the most probable token needs of most rows. Answers and",
        "Kullback-Leibler divergence (nats, of a token's probabilities from those without quantization) are of shapes-vl, a small model",
        "that was trained, on pictures that it has not seen.",
        "",
        "| vlmc's weights | | MB per token | mean KL | largest KL | answers right | as without |",
        "|---|---|---|---|---|---|---|",
    ]
    for quant, of in results["accuracy"].items():
        read = [s["bytes_per_token"] / 1e6 for s in results["samples"] if s["quant"] == quant and s["row"] in ("decode", "equal-accuracy") and "bytes_per_token" in s]
        if "bytes_per_token" in of:
            read.append(of["bytes_per_token"] / 1e6)
        cells = [quant, WEIGHTS[quant], number(median(read)) if read else "", f"{of['mean_kl']:.1e}", f"{of['max_kl']:.1e}"]
        cells += [f"{of['right']} of {of['known']}", f"{of['same']} of {of['samples']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def failures(results: dict) -> str:
    if not results["failures"]:
        return ""
    lines = ["## What could not be measured", ""]
    for failure in results["failures"]:
        what = f", {failure['group']} with {failure['threads']} threads" if "group" in failure else ""
        reason = " ".join(failure["reason"].split())
        lines.append(f"- **{failure['peer']}**{what}: {reason[:600]}")
    return "\n".join(lines) + "\n"


def about(results: dict) -> str:
    machine, versions = results["machine"], results["versions"]
    lines = [
        "## Machine and versions",
        "",
        f"{results['date']}: {machine['processor']}, {machine['cores']} cores ({machine['instructions']}), {machine['memory']}, "
        f"Linux {machine['kernel']}.",
        "",
        "| | version |",
        "|---|---|",
        *(f"| {name} | {'; '.join(of)} |" for name, of in sorted(versions.items())),
        "",
        "| | weights | beside vlmc's |",
        "|---|---|---|",
        *(f"| {name} | {peer['weights']} | {peer['quant']} |" for name, peer in results["peers"].items()),
    ]
    return "\n".join(lines) + "\n"


AGAIN = """## Again

```sh
python3 bench/run.py
```

[bench/README.md](../bench/README.md) says what that installs, how long it takes, and how to measure less.
"""


def plot(results: dict, threads: list[int], file: Path) -> None:
    """Ratios by row and peer: the median as a dot, from the least to the largest as a line."""
    peers = list(results["peers"])
    color = dict(zip(peers, COLORS))
    lines = [(row, peer) for row in ROWS for peer in peers if any(select(results, n, row, peer) for n in threads)]
    figure, axes = plt.subplots(1, len(threads), figsize=(4.2 * len(threads) + 2.4, 0.24 * len(lines) + 1.6), sharey=True, squeeze=False)
    ticks: dict[str, list[int]] = {}
    for axis, n in zip(axes[0], threads):
        for y, (row, peer) in enumerate(lines):
            ticks.setdefault(row.title, []).append(y)
            values = ratios(row, select(results, n, row, peer))
            if values:
                axis.plot([min(values), max(values)], [y, y], color=color[peer], linewidth=2, solid_capstyle="round")
                axis.plot(median(values), y, "o", color=color[peer], markersize=6)
                axis.annotate(number(median(values)), (max(values), y), (6, 0), textcoords="offset points", va="center", fontsize=7)
        for above, below in zip(lines, lines[1:]):
            if above[0] is not below[0]:
                axis.axhline(lines.index(below) - 0.5, color="#dddddd", linewidth=0.8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * 1.3)
        marks = [m for m in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= m <= high * 1.3]
        axis.set_xticks(marks, [f"{m:g}x" for m in marks])
        axis.minorticks_off()
        axis.set_title(f"{n} thread{'s' if n > 1 else ''}", fontsize=10)
        axis.set_xlabel("vlmc is better by (median, least to largest)", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks([sum(ys) / len(ys) for ys in ticks.values()], list(ticks), fontsize=8)
    axes[0][0].invert_yaxis()
    handles = [plt.Line2D([], [], color=color[peer], marker="o", linewidth=2, label=peer) for peer in peers]
    figure.legend(handles=handles, loc="upper center", ncols=min(len(peers), 3), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    results, docs = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    threads = sorted({s["threads"] for s in results["samples"]}, reverse=True)
    picture = "![How many times better vlmc is, by what is done and beside whom](benchmarks.svg)\n"
    parts = [INTRODUCTION, *([picture] if threads else []), *(table(results, n) for n in threads)]
    parts += [accuracy(results), failures(results), about(results), AGAIN]
    (docs / "benchmarks.md").write_text("\n".join(part for part in parts if part))
    if threads:
        plot(results, threads, docs / "benchmarks.svg")


main()
