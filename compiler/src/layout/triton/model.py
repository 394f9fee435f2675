"""Answers a prompt, token by token: `vision`, `embed` and `decoder` of this repository, run with ONNX Runtime.

Inputs: `input_ids` i64[n], the tensors of pictures that `model.json` names (all or none), `max_new_tokens` i64[1] (256 without).
Responses: `token_id` i64[1], the most probable tokens, the one that ends the answer among them.
"""
import json
import os

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}


class TritonPythonModel:
    def initialize(self, args):
        here = os.path.join(args["model_repository"], args["model_version"])
        with open(os.path.join(here, "model.json"), encoding="utf-8") as f:
            self.settings = json.load(f)
        graph = lambda name: os.path.join(args["model_repository"], "..", name, "1", "model.onnx")
        self.sessions = {name: ort.InferenceSession(graph(name), providers=self.settings["providers"]) for name in self.settings["graphs"]}

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                for token in self.answer({t.name(): t.as_numpy() for t in request.inputs()}):
                    if request.is_cancelled():
                        break
                    sender.send(pb.InferenceResponse([pb.Tensor("token_id", np.array([token], np.int64))]))
            except Exception as e:
                sender.send(pb.InferenceResponse(error=pb.TritonError(str(e))))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None

    def run(self, name, given):
        """Outputs of a graph by name; what is not given has no rows."""
        session, feed = self.sessions[name], {}
        for port in session.get_inputs():
            value = given.get(port.name)
            if value is None:
                value = np.zeros([1 if d == "batch" else d if isinstance(d, int) else 0 for d in port.shape], DTYPES[port.type])
            feed[port.name] = value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value, DTYPES[port.type]))
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run_with_ort_values(names, feed)))

    def answer(self, inputs):
        s, ids = self.settings, inputs["input_ids"].reshape(1, -1)
        limit = int(inputs["max_new_tokens"].reshape(-1)[0]) if "max_new_tokens" in inputs else 256
        pictures = {name: inputs[name] for name in s["picture_inputs"] if name in inputs}
        placeholders = int((ids == s["image_token_id"]).sum()) if s["image_token_id"] is not None else 0
        features = {}
        if pictures:
            missing = [name for name in s["picture_inputs"] if name not in pictures]
            if missing:
                raise ValueError(f"'{missing[0]}' is missing: pictures need {', '.join(s['picture_inputs'])}")
            features = self.run("vision", {**pictures, "feature_positions": np.arange(placeholders)})
        rows = next(iter(features.values())).shape()[0] if features else 0
        if s["image_token_id"] is not None and rows != placeholders:
            raise ValueError(f"the prompt has {placeholders} image placeholders, but the pictures make {rows} features")
        positions, following = self.positions(ids, pictures.get("image_grid_thw"))
        past, length, axes = {}, 0, positions.shape[:-1]
        for _ in range(min(limit, s["context_length"] - ids.shape[1] + 1)):
            length += ids.shape[1]
            embeds = self.run("embed", {"input_ids": ids, **features})
            out = self.run("decoder", {**embeds, **past, "position_ids": positions, "attention_mask": np.ones((1, length))})
            token = int(out["logits"].numpy()[0, -1].argmax())
            yield token
            if token in s["eos_token_ids"]:
                return
            past = {name.replace("present", "past_key_values", 1): value for name, value in out.items() if name.startswith("present.")}
            ids, features = np.array([[token]]), {}
            positions, following = np.full((*axes, 1), following), following + 1

    def positions(self, ids, grids):
        """Position ids of a prompt, and that of the token after it. With several axes (M-RoPE, arXiv 2409.12191, section 2.1) a
        picture's tokens have their row and column, and what follows goes on after the largest."""
        merge = self.settings["spatial_merge_size"]
        if merge is None:
            return np.arange(ids.shape[1])[None], ids.shape[1]
        out, at, following = [], 0, 0
        grids = iter([] if grids is None else grids.reshape(-1, 3).tolist())
        while at < ids.shape[1]:
            if ids[0, at] != self.settings["image_token_id"]:
                out.append(np.full((3, 1), following))
                at, following = at + 1, following + 1
                continue
            grid = next(grids, None)
            if grid is None:
                raise ValueError("'image_grid_thw' has fewer pictures than the prompt")
            t, h, w = grid[0], grid[1] // merge, grid[2] // merge
            out.append(np.indices((t, h, w)).reshape(3, -1) + following)
            at, following = at + t * h * w, following + max(t, h, w)
        return np.concatenate(out, 1)[:, None], following
