"""Reads graphs of `onnx-cpu` artifacts with OpenVINO, runs whole prompts through them, and compares every output with ONNX Runtime's.

Usage: openvino_.py DIRECTORY-OF-ARTIFACTS
"""
import os
import sys

import numpy as np
import onnxruntime as ort
import openvino as ov

from shared import golden

directory, = sys.argv[1:]
core = ov.Core()
# Otherwise the CPU plugin may compute in bf16.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


class Graph:
    """One graph in both; gives what ONNX Runtime gives."""

    def __init__(self, path):
        self.path = path
        self.reference = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.model = core.compile_model(core.read_model(path), "CPU", EXACT)
        self.names = [o.name for o in self.reference.get_outputs()]
        inputs = [i.name for i in self.reference.get_inputs()]
        assert {name for port in self.model.inputs for name in port.names} >= set(inputs), path
        self.inputs = inputs

    def run(self, given):
        feed = {name: given[name] for name in self.inputs}
        want = self.reference.run(None, feed)
        got = self.model(feed)
        for name, a in zip(self.names, want):
            b = got[name]
            assert a.shape == b.shape, f"{self.path}: {name}: {b.shape} instead of {a.shape}"
            error, size = np.abs(a - b).max(initial=0), max(1, np.abs(a).max(initial=0))
            assert error <= 1e-4 * size, f"{self.path}: {name}: differs by {error} of {size}"
        return dict(zip(self.names, want))


def prompt(fixture, case):
    t = golden(fixture, case)
    vision, embed, decoder = (Graph(os.path.join(directory, fixture, f"{name}.onnx")) for name in ["vision", "embed", "decoder"])
    width = next(i.shape[1] for i in embed.reference.get_inputs() if i.name == "image_features")
    features = vision.run(t) if "pixel_values" in t else {"image_features": np.zeros((0, width), np.float32)}
    embeds = embed.run({**t, **features})
    seq = t["input_ids"].shape[1]
    axes = next(i.shape[:-1] for i in decoder.reference.get_inputs() if i.name == "position_ids")
    positions = t.get("position_ids", np.zeros([d if isinstance(d, int) else 1 for d in axes] + [1], np.int64) + np.arange(seq))
    past = {i.name: np.zeros([1 if d == "batch" else 0 if isinstance(d, str) else d for d in i.shape], np.float32)
            for i in decoder.reference.get_inputs() if i.name.startswith("past")}
    ids, length = t["generated_ids"][0].tolist(), seq
    out = decoder.run({**embeds, **past, "position_ids": positions, "attention_mask": np.ones((1, length), np.int64), "logit_positions": np.array([seq - 1])})
    got = [int(out["logits"][0, -1].argmax())]
    # Some tokens more, with the cache.
    while len(got) < 4:
        length += 1
        embeds = embed.run({"input_ids": np.array([[got[-1]]]), "image_features": np.zeros((0, width), np.float32)})
        past = {name.replace("present", "past_key_values"): value for name, value in out.items() if name.startswith("present")}
        place = positions.max() + len(got)
        out = decoder.run({**embeds, **past, "position_ids": np.full((*positions.shape[:-1], 1), place), "attention_mask": np.ones((1, length), np.int64),
                           "logit_positions": np.array([0])})
        got.append(int(out["logits"][0, -1].argmax()))
    assert got == ids[:4], f"{fixture}: {case}: {got} instead of {ids[:4]}"


for fixture in ["qwen2-vl", "qwen2.5-vl", "llava-1.5"]:
    for case in ["chat", "two", "text"]:
        prompt(fixture, case)
print("openvino: ok")
