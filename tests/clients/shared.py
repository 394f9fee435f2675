"""What the scripts share: fixtures and their tensors."""
import json
import os

import numpy as np

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
FIXTURES = os.path.join(ROOT, "fixtures")
TYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


def tensors(path):
    """All tensors of a safetensors file by name, but those of types that numpy does not have."""
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        data = f.read()
    out = {}
    for name, t in header.items():
        if name != "__metadata__" and t["dtype"] in TYPES:
            start, end = t["data_offsets"]
            out[name] = np.frombuffer(data[start:end], TYPES[t["dtype"]]).reshape(t["shape"])
    return out


def golden(fixture, case):
    """Tensors of a case of a fixture's goldens."""
    path = os.path.join(FIXTURES, fixture, "golden.safetensors")
    return {name.removeprefix(case + "/"): t for name, t in tensors(path).items() if name.startswith(case + "/")}


def held_out(count):
    """The first pictures and questions of the trained model, and its reference's answers, all of which are right."""
    with open(os.path.join(FIXTURES, "shapes-vl", "heldout.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return [row for row in rows if row["answer"] == row["reference"]][:count]


def picture(row):
    """Path of the picture of such a question."""
    return os.path.join(FIXTURES, "shapes-vl", row["image"])
