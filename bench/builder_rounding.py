"""A copy of a checkpoint whose text model has the numbers that onnxruntime-genai's builder gives it in int4.

Usage: python builder_rounding.py CHECKPOINT OUT; needs torch and safetensors.

In groups of 32 columns the scale is the number of largest size over -8, as in Q4_0 of llama.cpp, and the rest is rounded to the nearest of
-8 to 7 scales. The copy is in f32, so that vlmc's int4g32 finds these very codes and scales.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32


def rounded(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scales = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    codes = (groups / torch.where(scales == 0, 1, scales)).round().clamp(-8, 7)
    return (codes * scales).flatten(-2)


def main() -> None:
    source, out = map(Path, sys.argv[1:])
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        # Matrices of the text model are linear layers and the table of tokens, which is the head.
        text = [name for name, weight in tensors.items() if not name.startswith("visual.") and weight.ndim == 2]
        save_file({name: rounded(weight) if name in text else weight.float() for name, weight in tensors.items()}, file)


main()
