"""Exports the tower of Qwen2-VL with torch.onnx, in f32, for one picture of SIDE x SIDE pixels.

Usage: python torch_export.py CHECKPOINT SIDE OUT

As it is published the tower cannot be exported: its loops depend on the grid. So the angles of that one grid are constants, and
attention is over all patches, which is what the tower does with one picture.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision


class Tower(torch.nn.Module):
    def __init__(self, visual: torch.nn.Module, angles: torch.Tensor) -> None:
        super().__init__()
        self.visual = visual
        both = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", both.cos())
        self.register_buffer("sin", both.sin())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.visual.patch_embed(pixels)
        for block in self.visual.blocks:
            qkv = block.attn.qkv(block.norm1(x)).reshape(x.shape[0], 3, block.attn.num_heads, -1)
            q, k, v = qkv.permute(1, 0, 2, 3).unbind(0)
            q, k = apply_rotary_pos_emb_vision(q, k, self.cos, self.sin)
            q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
            attended = scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1).reshape(x.shape)
            x = x + block.attn.proj(attended)
            x = x + block.mlp(block.norm2(x))
        return self.visual.merger(x)


def angles(config, side: int) -> torch.Tensor:
    """`[patches, head_dim / 2]`, patches in the order of the processor: squares of merged ones."""
    grid, merge = side // config.patch_size, config.spatial_merge_size
    order = lambda t: t.reshape(grid // merge, merge, grid // merge, merge).permute(0, 2, 1, 3).flatten()  # noqa: E731
    rows = torch.arange(grid).unsqueeze(1).expand(grid, grid)
    places = torch.stack((order(rows.contiguous()), order(rows.t().contiguous())), dim=-1)
    width = config.embed_dim // config.num_heads // 2
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float) / width)
    return (places.unsqueeze(-1) * frequencies).flatten(1)


def main() -> None:
    checkpoint, side, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    visual, config = model.model.visual, model.config.vision_config
    of_grid = angles(config, side)
    tower = Tower(visual, of_grid).eval()
    pixels = torch.randn(of_grid.shape[0], config.in_channels * config.temporal_patch_size * config.patch_size**2)
    with torch.no_grad():
        grid = side // config.patch_size
        expected = visual(pixels, grid_thw=torch.tensor([[1, grid, grid]]))
        expected = getattr(expected, "pooler_output", expected)
        difference = (tower(pixels) - expected).abs().max() / expected.abs().max()
        assert difference < 1e-4, f"the tower computes something else: {difference}"
        out.mkdir()
        torch.onnx.export(tower, (pixels,), out / "vision.onnx", dynamo=True, external_data=True)


main()
