"""What is measured: vlmc, the peers and the same weights for all of them, made once and kept in a work directory."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import quoting
from commands import Failed, run

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent

# What the virtual environment of each peer has besides those that all share. optimum-intel converts Qwen2-VL only with
# transformers before 5.1, and onnxruntime-genai's builder needs a later one.
SHARED = ["torch", "torchvision", "numpy", "pillow", "cmake", "ninja", "matplotlib"]
PACKAGES = {
    "llama.cpp": ["transformers<5.1", "sentencepiece", "protobuf"],
    "openvino": ["transformers<5.1", "optimum-intel", "openvino-genai", "openvino-tokenizers", "nncf"],
    "onnxruntime-genai": ["transformers", "onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir"],
    "torch": ["transformers", "accelerate"],
    "mobius-onnx": ["transformers", "mobius-onnx", "gguf"],
    "torch.onnx": ["transformers", "onnx", "onnxscript", "onnxruntime"],
}
SHARED_ENVIRONMENT = "shared"
SIDES = (448, 1344)

# Policies of vlmc besides its own. "g32" has the groups, and so the bits, of llama.cpp's Q4_0 and of onnxruntime-genai's builder; "q4_0" its
# numbers too. "equal" reads the fewest bytes per token, and by `accuracy` in measure.py, where it is calibrated, answers no worse.
RULE = '[[rule]]\nweights = "{}"\nscheme = "{}"\n'
POLICIES = {
    # Of 6 bits, which its head has, there is no scheme: 8 stand for them.
    "q4_0": 'base = "int8"\n' + RULE.format("model.layers.*", "int4g32") + 'method = "round"\n',
    "g32": 'base = "int4"\n' + RULE.format("model.layers.*", "int4g32"),
    "equal": 'base = "int4"\n' + RULE.format("model.layers.*.{gate,up}_proj.weight", "int3g128"),
}
ONNX_CPU = ["--target", "onnx-cpu"]
# Policies and options of ONNX graphs, for vlmc and for onnxruntime-genai.
ONNX = {
    "onnx": ("int4", ONNX_CPU),
    "onnx-genai": ("int4", [*ONNX_CPU, "--layout", "genai"]),
    "onnx-g32": ("g32", [*ONNX_CPU, "--layout", "genai"]),
}
# A small model that was trained, with pictures that it has not seen.
TRAINED = REPOSITORY / "fixtures/shapes-vl"


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Place:
    """Where things lie in the work directory."""

    root: Path

    def python(self, environment: str) -> Path:
        """Of a peer's virtual environment, or of `shared`."""
        return self.root / "environments" / environment / "bin/python"

    @property
    def llama_source(self) -> Path:
        return self.root / "llama.cpp/source/vendor/llama.cpp"

    def llama_tool(self, name: str) -> Path:
        return self.root / "llama.cpp/build/bin" / name

    @property
    def checkpoint(self) -> Path:
        """As `vlmc synth` writes it."""
        return self.root / "checkpoint"

    @property
    def peers_checkpoint(self) -> Path:
        return self.root / "checkpoint-peers"

    def model(self, name: str) -> Path:
        return self.root / "models" / name

    @property
    def quoting(self) -> Path:
        """As `quoting.py` makes it; there only while it is compiled."""
        return self.root / "checkpoint-quoting"

    def artifact(self, name: str) -> Path:
        """Of vlmc."""
        return self.model(f"vlmc-{name}")

    def picture(self, side: int) -> Path:
        return self.root / f"picture-{side}.png"


def make(path: Path, what: str, how) -> None:
    """Calls `how(part)` to make `path`, unless it is there; it appears only when it is complete."""
    if path.exists():
        return
    log(f"making {what} ({path})")
    part = path.with_name(path.name + ".part")
    remove(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    how(part)
    part.rename(path)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def install(place: Place, environment: str, packages: list[str]) -> None:
    """Installs into a virtual environment. A peer's sees what is in the shared one: torch alone takes 5 GB."""
    python = place.python(environment)
    if not python.exists():
        log(f"making the virtual environment '{environment}'")
        run([sys.executable, "-m", "venv", python.parent.parent])
        if environment != SHARED_ENVIRONMENT:
            link = site_packages(place, environment) / "shared.pth"
            link.write_text(f"{site_packages(place, SHARED_ENVIRONMENT)}\n")
    log(f"installing {', '.join(packages)}")
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])


def site_packages(place: Place, environment: str) -> Path:
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(run([place.python(environment), "-c", where]).output.strip())


def versions(place: Place, environment: str) -> dict[str, str]:
    """Of the packages in a virtual environment."""
    python = place.python(environment)
    if not python.exists():
        return {}
    listed = run([python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]).output
    return {package["name"]: package["version"] for package in json.loads(listed.splitlines()[0])}


def built() -> Path:
    """The binary, built from this repository."""
    log("building vlmc")
    run(["cargo", "build", "--release", "--package", "vlmc"], cwd=REPOSITORY)
    return REPOSITORY / os.environ.get("CARGO_TARGET_DIR", "target") / "release/vlmc"


def vlmc(place: Place, binary: Path | None, artifacts: set[str]) -> Path:
    """The binary, built from this repository unless it is given, after it has made the weights and its artifacts of these names."""
    binary = binary or built()
    make(place.checkpoint, "random weights", lambda part: run([binary, "synth", "qwen2-vl-2b", "-o", part]))
    for name in artifacts:
        if name == "quoting":
            make(place.quoting, "a checkpoint that quotes", lambda part: quoting.make(place.checkpoint, part))
            compile(place, binary, place.quoting, "g32", [], name)
            remove(place.quoting)
        else:
            compile(place, binary, place.checkpoint, *of_artifact(name), name)
    for side in SIDES:
        make(place.picture(side), "a picture", lambda part, side=side: part.write_bytes(png(side)))
    return binary


def of_artifact(name: str) -> tuple[str, list[str]]:
    """Policy and options of an artifact of Qwen2-VL-2B's shape."""
    return ONNX.get(name, (name, []))


def compile(place: Place, binary: Path, checkpoint: Path, quant: str, options: list[str], name: str) -> Path:
    """An artifact of a checkpoint, by a policy of POLICIES or of vlmc's own."""
    # The compiler may have changed since the last run, and compiling takes seconds.
    remove(place.artifact(name))
    make(place.artifact(name), f"vlmc's artifact '{name}'", lambda part: run(compile_command(place, binary, checkpoint, quant, options, part)))
    return place.artifact(name)


def compile_command(place: Place, binary: Path, checkpoint: Path, quant: str, options: list[str], out: Path) -> list[str | Path]:
    policy = quant
    if quant in POLICIES:
        policy = place.root / f"{quant}.toml"
        policy.write_text(POLICIES[quant])
    return [binary, "compile", checkpoint, "--quant", policy, *options, "-o", out]


def png(side: int) -> bytes:
    """A square picture of colours that change from pixel to pixel."""
    rows = b"".join(b"\0" + bytes((x * 7 + y * 13 + c * 85) % 256 for x in range(side) for c in range(3)) for y in range(side))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def checkpoint_like(place: Place, part: Path, config: dict, tokenizer: dict) -> None:
    """A checkpoint with the same weights (links to them) and another config and tokenizer."""
    part.mkdir()
    for file in place.checkpoint.iterdir():
        if file.name not in ("config.json", "tokenizer.json"):
            (part / file.name).symlink_to(file.resolve())
    (part / "config.json").write_text(json.dumps(config))
    (part / "tokenizer.json").write_text(json.dumps(tokenizer))


def peers_checkpoint(place: Place) -> None:
    """The synthetic checkpoint with one merge in its tokenizer, which has none: llama.cpp opens no BPE without any."""
    config = json.loads((place.checkpoint / "config.json").read_text())
    tokenizer = json.loads((place.checkpoint / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    if not tokenizer["model"]["merges"]:
        vocab["Ġw"] = vocab.pop(next(word for word in vocab if word.startswith("Ġw")))
        tokenizer["model"]["merges"] = ["Ġ w"]
    make(place.peers_checkpoint, "the peers' checkpoint", lambda part: checkpoint_like(place, part, config, tokenizer))


def llama_cpp(place: Place) -> None:
    """llama.cpp, built from the source package of llama-cpp-python, and its models."""
    tools = ["llama-bench", "llama-completion", "llama-mtmd-cli", "llama-quantize"]

    def unpack(part: Path) -> None:
        archives = place.root / "llama.cpp/archive"
        pip = [place.python("llama.cpp"), "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        run([*pip, "--dest", archives, "llama-cpp-python"])
        archive = next(archives.glob("*.tar.gz"))
        shutil.unpack_archive(archive, part)
        (inner,) = part.iterdir()
        for file in inner.iterdir():
            file.rename(part / file.name)
        (part / "VERSION").write_text(archive.name.removesuffix(".tar.gz"))

    def build(part: Path) -> None:
        bin = place.python(SHARED_ENVIRONMENT).parent
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": bin / "ninja",
            "CMAKE_CXX_FLAGS": f"-include {HERE / 'amx_intrinsics.h'}",
            # So that the directory can be renamed when it is complete.
            "CMAKE_BUILD_RPATH": "$ORIGIN",
            "GGML_NATIVE": "ON",
            "LLAMA_OPENSSL": "OFF",
            "LLAMA_BUILD_TESTS": "OFF",
            "LLAMA_BUILD_EXAMPLES": "OFF",
            "LLAMA_BUILD_SERVER": "OFF",
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        run([bin / "cmake", "-G", "Ninja", "-S", place.llama_source, "-B", part, *defines])
        run([bin / "cmake", "--build", part, "--target", *tools])

    def convert(part: Path, *options: str) -> None:
        run(gguf_command(place, place.peers_checkpoint, part, *options))

    def quantize(kind: str, part: Path) -> None:
        text = place.model("text-bf16.gguf")
        make(text, "llama.cpp's text model", lambda part: convert(part, "--outtype", "bf16"))
        run([place.llama_tool("llama-quantize"), text, part, kind])

    make(place.root / "llama.cpp/source", "llama.cpp's source", unpack)
    make(place.root / "llama.cpp/build", "llama.cpp, for minutes", build)
    make(place.model("mmproj-bf16.gguf"), "llama.cpp's tower", lambda part: convert(part, "--mmproj", "--outtype", "bf16"))
    for kind in ("Q4_0", "Q8_0"):
        make(place.model(f"{kind}.gguf"), f"llama.cpp's {kind} model", lambda part, kind=kind: quantize(kind, part))
    remove(place.model("text-bf16.gguf"))


def gguf_command(place: Place, checkpoint: Path, out: Path, *options: str) -> list[str | Path]:
    """Of llama.cpp's converter."""
    return [place.python("llama.cpp"), HERE / "gguf_convert.py", place.llama_source, checkpoint, "--outfile", out, *options]


def openvino(place: Place) -> None:
    export = [place.python("openvino"), "-m", "optimum.commands.optimum_cli", "export", "openvino", "--task", "image-text-to-text"]
    source = ["--model", place.peers_checkpoint, "--weight-format", "int4"]
    make(place.model("openvino"), "OpenVINO's model, for minutes and with 16 GB of memory", lambda part: run([*export, *source, part]))


def torch_onnx(place: Place) -> None:
    export = [place.python("torch.onnx"), HERE / "torch_export.py", place.peers_checkpoint, "448"]
    make(place.model("torch.onnx"), "the tower by torch.onnx, for minutes and with 14 GB of memory", lambda part: run([*export, part]))


def text_checkpoint(place: Place) -> Path:
    """The text model alone, whose tensors have the same names in Qwen2: the builder and mobius's GGUF reader do not know Qwen2-VL."""
    config = json.loads((place.peers_checkpoint / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("vision_config", "rope_scaling")}
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    tokenizer = json.loads((place.peers_checkpoint / "tokenizer.json").read_text())
    text = place.root / "checkpoint-text"
    make(text, "the text model's checkpoint", lambda part: checkpoint_like(place, part, config, tokenizer))
    return text


def onnxruntime_genai(place: Place) -> None:
    text_checkpoint(place)
    make(
        place.model("onnxruntime-genai"),
        "onnxruntime-genai's model, for minutes and with 13 GB of memory",
        lambda part: run(build_command(place, part)),
    )


def build_command(place: Place, out: Path) -> list[str | Path]:
    """Of onnxruntime-genai's builder."""
    builder = [place.python("onnxruntime-genai"), "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu", "-c", place.root / "cache"]
    return [*builder, "-i", place.root / "checkpoint-text", "-o", out]


def rounded_by_builder(place: Place) -> Path:
    """The trained model with the numbers of onnxruntime-genai's builder in int4, which does not take the model itself."""
    rounded = place.root / "trained-builder"
    make(rounded, "a trained model rounded by a peer", lambda part: run([place.python("onnxruntime-genai"), HERE / "builder_rounding.py", TRAINED, part]))
    return rounded


def mobius(place: Place) -> None:
    """It quantizes nothing itself, and gets the text model in llama.cpp's Q4_0, head included. onnxruntime-genai runs it."""
    for needed, model in (("llama.cpp", llama_cpp), ("onnxruntime-genai", text_checkpoint)):
        install(place, needed, PACKAGES[needed])
        model(place)
    text, codes = (place.model(f"qwen2-{kind}.gguf") for kind in ("bf16", "Q4_0"))

    def quantize(part: Path) -> None:
        make(text, "Qwen2's text model for llama.cpp", lambda part: run(gguf_command(place, text_checkpoint(place), part, "--outtype", "bf16")))
        run([place.llama_tool("llama-quantize"), "--pure", text, part, "Q4_0"])
        remove(text)

    def build(part: Path) -> None:
        make(codes, "the same in Q4_0", quantize)
        command = [place.python("mobius-onnx"), "-m", "mobius"]
        # Of GGUF it writes no settings for the client; those of the same model without weights have the same names.
        run([*command, "build", "--config", text_checkpoint(place), part, "--no-weights", "--ep", "cpu", "--runtime", "ort-genai"])
        run([*command, "build-gguf", codes, "--output", part, "--keep-quantized", "--ep", "cpu"])
        remove(codes)

    make(place.model("mobius-onnx"), "mobius's model", build)


MODELS = {
    "llama.cpp": llama_cpp,
    "openvino": openvino,
    "onnxruntime-genai": onnxruntime_genai,
    "mobius-onnx": mobius,
    "torch": lambda place: None,
    "torch.onnx": torch_onnx,
}


def peers(place: Place, names: list[str]) -> dict[str, str]:
    """Sets up the peers, and says of those that failed why."""
    failures = {}
    install(place, SHARED_ENVIRONMENT, SHARED)
    peers_checkpoint(place)
    for name in PACKAGES:
        if name not in names:
            continue
        try:
            install(place, name, PACKAGES[name])
            MODELS[name](place)
        except (Failed, OSError) as e:
            log(f"{name} could not be set up: {e}")
            failures[name] = str(e)
    return failures
