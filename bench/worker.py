"""Measures a peer that is a Python package; runs in its virtual environment.

Usage: python worker.py openvino|onnxruntime-genai|torch|torch.onnx MODEL THREADS PROMPT_TOKENS ROW...

Prints what it measured as one line of JSON, the last: for each ROW (see rows.py) its number, in the unit given there. Every
measurement comes after a run of the same kind that is not measured, except that of the first token, which starts with loading
and ends with the first of the answer to a prompt of PROMPT_TOKENS; importing the packages is not counted.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Callable

import numpy as np

# Of the synthetic tokenizer: one token.
LETTER, LETTER_ID = "a", 97
NEW_TOKENS = 64


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def openvino_genai(model: str, threads: int):
    import openvino
    import openvino_genai as ov

    pictures = np.random.default_rng()

    class Peer:
        def __init__(self) -> None:
            # The default backend keeps what it made of earlier prompts, and would measure that.
            self.pipe = ov.VLMPipeline(model, "CPU", ATTENTION_BACKEND="SDPA", INFERENCE_NUM_THREADS=threads)

        def generate(self, prompt: int, new_tokens: int, side: int | None = None):
            config = ov.GenerationConfig()
            config.max_new_tokens = new_tokens
            config.ignore_eos = True
            config.do_sample = False
            config.apply_chat_template = False
            # A picture that was seen is not encoded again.
            images = [] if side is None else [openvino.Tensor(pictures.integers(0, 256, (1, side, side, 3), np.uint8))]
            metrics = self.pipe.generate(LETTER * prompt, images=images, generation_config=config).perf_metrics
            if side is None and metrics.get_num_input_tokens() != prompt:
                raise SystemExit(f"a prompt of {prompt} tokens became {metrics.get_num_input_tokens()}")
            return metrics

        def prefill(self, tokens: int) -> float:
            return self.generate(tokens, 1).get_ttft().mean / 1e3

        def decode(self, tokens: int) -> float:
            return tokens * self.generate(1, tokens + 1).get_tpot().mean / 1e3

        def encode(self, side: int) -> float:
            # The duration of "vision encoding" has the patches' convolution alone; the blocks count as preparing embeddings.
            return self.generate(1, 1, side).get_prepare_embeddings_duration().mean / 1e3

        def answer(self, side: int) -> None:
            self.generate(1, 1, side)

    return Peer


def onnxruntime_genai(model: str, threads: int):
    import onnxruntime_genai as og

    class Peer:
        def __init__(self) -> None:
            config = og.Config(model)
            parts = json.loads(Path(model, "genai_config.json").read_text())["model"]
            options = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {part: options for part in ("decoder", "embedding") if part in parts}}))
            self.model = og.Model(config)

        def generator(self, tokens: int):
            params = og.GeneratorParams(self.model)
            params.set_search_options(do_sample=False, min_length=tokens, max_length=tokens)
            return og.Generator(self.model, params)

        def prefill(self, tokens: int) -> float:
            generator = self.generator(tokens + 1)
            ids = np.full(tokens, LETTER_ID, np.int32)
            return seconds(lambda: (generator.append_tokens(ids), generator.generate_next_token()))

        def decode(self, tokens: int) -> float:
            generator = self.generator(tokens + 2)
            generator.append_tokens(np.array([LETTER_ID], np.int32))
            generator.generate_next_token()
            return seconds(lambda: [generator.generate_next_token() for _ in range(tokens)])

    return Peer


def torch(model: str, threads: int):
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)

    class Peer:
        def __init__(self) -> None:
            self.model = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
            self.config = self.model.config

        def prefill(self, tokens: int) -> float:
            ids = torch.full((1, tokens), LETTER_ID)
            return seconds(lambda: self.model(input_ids=ids, logits_to_keep=1))

        def decode(self, tokens: int) -> float:
            reply = self.model(input_ids=torch.full((1, 1), LETTER_ID), use_cache=True)

            def steps() -> None:
                logits, cache = reply.logits, reply.past_key_values
                for _ in range(tokens):
                    step = self.model(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
                    logits, cache = step.logits, step.past_key_values

            return seconds(steps)

        def pixels(self, side: int):
            vision = self.config.vision_config
            grid = side // vision.patch_size
            patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            return torch.randn(grid * grid, patch, dtype=torch.bfloat16), torch.tensor([[1, grid, grid]])

        def encode(self, side: int) -> float:
            pixels, grid = self.pixels(side)
            return seconds(lambda: self.model.model.visual(pixels, grid_thw=grid))

        def answer(self, side: int) -> None:
            pixels, grid = self.pixels(side)
            tokens = pixels.shape[0] // self.config.vision_config.spatial_merge_size**2
            start, image, end = self.config.vision_start_token_id, self.config.image_token_id, self.config.vision_end_token_id
            ids = torch.tensor([[start, *[image] * tokens, end, LETTER_ID]])
            kinds = (ids == image).int()
            self.model(input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds, logits_to_keep=1)

    return Peer


def torch_onnx(model: str, threads: int):
    import onnxruntime as ort

    class Peer:
        def __init__(self) -> None:
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            self.session = ort.InferenceSession(f"{model}/vision.onnx", options, providers=["CPUExecutionProvider"])

        def encode(self, side: int) -> float:
            (pixels,) = self.session.get_inputs()
            values = np.random.default_rng(0).standard_normal(pixels.shape, np.float32)
            return seconds(lambda: self.session.run(None, {pixels.name: values}))

    return Peer


PEERS = {"openvino": openvino_genai, "onnxruntime-genai": onnxruntime_genai, "torch": torch, "torch.onnx": torch_onnx}


def warm(f: Callable[[int], float], argument: int) -> float:
    f(argument)
    return f(argument)


def main() -> None:
    name, model, threads, prompt, *rows = sys.argv[1:]
    open_peer = PEERS[name](model, int(threads))
    result: dict[str, float] = {}
    start = time.perf_counter()
    peer = open_peer()
    if "first-token" in rows:
        peer.prefill(int(prompt))
        result["first-token"] = time.perf_counter() - start
    for row in rows:
        kind, _, size = row.partition("-")
        if kind == "decode":
            result[row] = NEW_TOKENS / warm(peer.decode, NEW_TOKENS)
        elif kind == "prefill":
            result[row] = int(size) / warm(peer.prefill, int(size))
        elif kind == "encode":
            # A large picture takes minutes; a small one warms up as well.
            peer.encode(448)
            result[row] = peer.encode(int(size))
        elif row == "memory":
            peer.answer(448)
    print(json.dumps(result))


main()
