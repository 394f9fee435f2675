"""A checkpoint like the synthetic one that answers with its prompt.

With random weights an answer never quotes. Here 64 neurons of the first layer are a chain: each knows one token and writes the next,
so strongly that what the random weights add does not matter (Geva et al., 2021, "Transformer Feed-Forward Layers Are Key-Value
Memories"). The first knows the token that the prompt's template ends with.
"""

from __future__ import annotations

import json
import shutil
import string
import struct
from pathlib import Path

# What the answer says, over and over; each is a token.
SAID = string.ascii_letters + string.digits + "."
# A passage, four times: it lacks every 21st of them, so that an answer quotes 20 tokens at a time.
QUOTE = 20
PROMPT = "".join(c for i, c in enumerate(SAID) if i % (QUOTE + 1) < QUOTE) * 4


def make(checkpoint: Path, to: Path) -> None:
    """Writes the checkpoint: links to the files of `checkpoint`, and a copy of the one with the first layer."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    shard = index["model.embed_tokens.weight"]
    to.mkdir()
    for file in checkpoint.iterdir():
        if file.name != shard:
            (to / file.name).symlink_to(file.resolve())
    shutil.copyfile(checkpoint / shard, to / shard)
    vocab = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    chain = [vocab[token] for token in ("Ċ", *SAID)]
    with (to / shard).open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(size))
        start = 8 + size

        def row(tensor: str, i: int) -> int:
            """Seeks to a row, and says how many elements it has."""
            _, width = tensors[tensor]["shape"]
            file.seek(start + tensors[tensor]["data_offsets"][0] + i * width * 2)
            return width

        def direction(token: int) -> bytes:
            """Of a token's embedding, of length 1."""
            width = row("model.embed_tokens.weight", token)
            values = [struct.unpack("<f", b"\0\0" + file.read(2))[0] for _ in range(width)]
            length = sum(value * value for value in values) ** 0.5
            return b"".join(struct.pack("<f", value / length)[2:] for value in values)

        directions = [direction(token) for token in chain]
        for neuron, known in enumerate(directions):
            for projection in ("gate", "up"):
                row(f"model.layers.0.mlp.{projection}_proj.weight", neuron)
                file.write(known)
        follow = [*directions[1:], directions[1]]
        for i in range(len(directions[0]) // 2):
            row("model.layers.0.mlp.down_proj.weight", i)
            file.write(b"".join(written[2 * i : 2 * i + 2] for written in follow))
