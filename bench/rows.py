"""What is measured, in the order of the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    unit: str
    # Measured in one process, one after the other; rows of a group follow each other.
    group: str
    # Rates, of which more is better; times and sizes otherwise.
    rate: bool = False
    # Takes minutes, or hardly varies: `--repeat-long`.
    long: bool = False
    # The artifact of vlmc, if it is not the one that stands beside the peer's weights.
    artifact: str | None = None


ROWS = [
    Row("decode", "decode 64 tokens", "tok/s", "text", rate=True),
    Row("prefill-512", "prefill 512 tokens", "tok/s", "text", rate=True),
    Row("prefill-733", "prefill 733 tokens", "tok/s", "text", rate=True),
    Row("equal-accuracy", "decode 64 tokens, no less accurate", "tok/s", "equal accuracy", rate=True, artifact="equal"),
    Row("lookup", "decode 64 tokens that quote, prompt lookup beside none", "tok/s", "lookup", rate=True, artifact="quoting"),
    Row("context", "weights and cache read, decoding after 4096 tokens beside after 128", "GB/s", "context", rate=True),
    Row("encode-448", "encode a 448x448 picture", "s", "picture"),
    Row("encode-1344", "encode a 1344x1344 picture", "s", "large picture", long=True),
    Row("first-token", "start to first token, text", "s", "start"),
    Row("memory-text", "peak memory, text", "GB", "start"),
    Row("memory", "peak memory, 448x448 picture and text", "GB", "memory", long=True),
    Row("onnx-decode", "decode 64 tokens, vlmc's graphs in the same client", "tok/s", "onnx text", rate=True, artifact="onnx-genai"),
    Row("onnx-prefill-512", "prefill 512 tokens, vlmc's graphs in the same client", "tok/s", "onnx text", rate=True, artifact="onnx-genai"),
    Row("onnx-g32-decode", "decode 64 tokens, vlmc's graphs in the same client, the same groups", "tok/s", "onnx text, same groups", rate=True, artifact="onnx-g32"),
    Row("onnx-g32-prefill-512", "prefill 512 tokens, vlmc's graphs in the same client, the same groups", "tok/s", "onnx text, same groups", rate=True, artifact="onnx-g32"),
    Row("onnx-encode-448", "encode a 448x448 picture, vlmc's graph in ONNX Runtime", "s", "onnx picture", artifact="onnx"),
    Row("compile", "checkpoint to ONNX graphs in int4", "s", "compile", long=True, artifact="onnx-genai"),
    Row("compile-memory", "peak memory of that", "GB", "compile", long=True, artifact="onnx-genai"),
]
BY_NAME = {row.name: row for row in ROWS}


def chosen(names: list[str]) -> list[Row]:
    """The rows of these names; `prefill` stands for all that begin with it."""
    for name in names:
        if not any(row.name == name or row.name.startswith(f"{name}-") for row in ROWS):
            raise ValueError(f"--rows: there is no '{name}'; there are {', '.join(BY_NAME)}")
    return [row for row in ROWS if any(row.name == name or row.name.startswith(f"{name}-") for name in names)]


def ratio(row: Row, peer: float, vlmc: float) -> float:
    """How many times better vlmc is."""
    return vlmc / peer if row.rate else peer / vlmc
