"""Starts Triton (the server of the package nvidia-pytriton, which has the Python backend only) on two model repositories and asks over
gRPC: the trained model about pictures, and the tiny random one what the reference implementation generates.

Usage: triton.py REPOSITORY-OF-shapes-vl REPOSITORY-OF-qwen2-vl REQUESTS.npz
"""
import os
import queue
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time

import numpy as np
import tritonclient.grpc as triton

from shared import golden

SITE = sysconfig.get_path("purelib")
SERVER = os.path.join(SITE, "pytriton", "tritonserver")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A server on a repository, until the block ends."""

    def __init__(self, repository):
        self.repository = repository

    def __enter__(self):
        # The backend beside the stub of this Python, which starts the models' processes.
        self.backends = tempfile.TemporaryDirectory()
        backend = shutil.copytree(os.path.join(SERVER, "backends", "python"), os.path.join(self.backends.name, "python"))
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        shutil.copy(os.path.join(SERVER, "python_backend_stubs", version, "triton_python_backend_stub"), backend)
        libraries = [sysconfig.get_config_var("LIBDIR"), os.path.join(SITE, "nvidia_pytriton.libs")]
        # The stub takes the packages of the Python that is first on the path.
        path = f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', '')}"
        environment = dict(os.environ, LD_LIBRARY_PATH=":".join(libraries), PATH=path)
        port = free_port()
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [os.path.join(SERVER, "bin", "tritonserver"), f"--model-repository={self.repository}", f"--backend-directory={self.backends.name}",
             "--model-control-mode=explicit", "--load-model=generate", "--grpc-address=127.0.0.1", f"--grpc-port={port}", "--allow-http=false",
             "--allow-metrics=false", "--disable-auto-complete-config"], env=environment, stdout=self.log, stderr=self.log)
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        deadline = time.monotonic() + 120
        while True:
            try:
                if client.is_model_ready("generate"):
                    return client
            except triton.InferenceServerException:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                self.log.seek(0)
                raise SystemExit(f"{self.log.read().decode()}the server did not start")
            time.sleep(0.2)

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.backends.cleanup()


def ask(client, **tensors):
    """Token ids, as the responses of one request bring them."""
    responses = queue.Queue()
    client.start_stream(lambda result, error: responses.put(error or result))
    inputs = []
    for name, value in tensors.items():
        value = np.ascontiguousarray(value)
        inputs.append(triton.InferInput(name, value.shape, {"int64": "INT64", "float32": "FP32"}[value.dtype.name]))
        inputs[-1].set_data_from_numpy(value)
    client.async_stream_infer("generate", inputs, enable_empty_final_response=True)
    out = []
    while True:
        response = responses.get(timeout=120)
        if isinstance(response, Exception):
            client.stop_stream()
            raise response
        tokens = response.as_numpy("token_id")
        if tokens is not None:
            assert tokens.shape == (1,), f"a response has {tokens.shape} tokens"
            out.append(int(tokens[0]))
        if response.get_response().parameters["triton_final_response"].bool_param:
            client.stop_stream()
            return out


def main():
    shapes, tiny, requests = sys.argv[1:]
    asked = np.load(requests)
    with Server(shapes) as client:
        for i in range(int(asked["count"])):
            names = ["input_ids", "pixel_values", "image_grid_thw"]
            got = ask(client, **{name: asked[f"{i}/{name}"] for name in names if f"{i}/{name}" in asked})
            want = asked[f"{i}/answer"].tolist()
            assert got[:-1] == want, f"question {i}: {got} instead of {want}"
        try:
            ask(client, input_ids=asked["0/input_ids"], pixel_values=asked["0/pixel_values"])
        except triton.InferenceServerException as e:
            assert "'image_grid_thw' is missing" in str(e), e
        else:
            raise AssertionError("a picture without its grid is answered")
    with Server(tiny) as client:
        for case in ["chat", "two", "text"]:
            t = golden("qwen2-vl", case)
            want = t["generated_ids"][0].tolist()
            pictures = {name: t[name] for name in ["pixel_values", "image_grid_thw"] if name in t}
            got = ask(client, input_ids=t["input_ids"][0], max_new_tokens=np.array([len(want)]), **pictures)
            # The golden goes on after the end of text.
            assert got == want[:len(got)] and got, f"{case}: {got} instead of {want}"
    print("triton: ok")


main()
