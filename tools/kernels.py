"""Makes the tables of compiler/src/target/kernels/: what operators take, and which of them an execution provider has kernels for.

    python tools/kernels.py OperatorKernels.tsv operators.md

The signatures and the CPU's kernels come from the installed onnxruntime. OperatorKernels.tsv has the CUDA provider's rows of ONNX
Runtime's docs/OperatorKernels.md, with tabs between domain, operator, versions and types. operators.md is onnx-tensorrt's
docs/operators.md. Only operators that vlmc emits are listed (EMITTED), and only types that it uses.
"""

import pathlib
import re
import sys

import onnxruntime
import onnxruntime.capi.onnxruntime_pybind11_state as state

OUT = pathlib.Path(__file__).parent.parent / "compiler/src/target/kernels"
EMITTED = """Abs Add And Attention Cast Concat Conv Cos CumSum DequantizeLinear Div Equal Erf Exp Expand Floor Gather Gelu Identity
LayerNormalization Less LessOrEqual Log MatMul Max Min Mod Mul Neg Not Or Pow QuantizeLinear RMSNormalization Range ReduceMax ReduceMean ReduceSum
Reshape RotaryEmbedding Round Shape Sigmoid Sin Slice Sqrt Squeeze Sub Tanh TopK Transpose Unsqueeze Where
com.microsoft.FusedMatMul com.microsoft.GatherBlockQuantized com.microsoft.GroupQueryAttention com.microsoft.MatMulNBits com.microsoft.MoE
com.microsoft.MultiHeadAttention com.microsoft.QMoE com.microsoft.QuickGelu com.microsoft.SkipLayerNormalization com.microsoft.SkipSimplifiedLayerNormalization""".split()
TYPES = ["float", "float16", "bfloat16", "int32", "int64", "bool", "uint8", "int8", "int4"]
# The oldest operator set that vlmc emits, and the newest.
OLDEST, NEWEST = 17, 23
LAST = 2147483647


def name(domain: str, op: str) -> str:
    return op if domain in ("", "ai.onnx") else f"{domain}.{op}"


def known(types) -> list[str]:
    found = {t.removeprefix("tensor(").removesuffix(")") for t in types}
    return [t for t in TYPES if t in found]


def write(file: str, source: str, what: str, lines) -> None:
    text = f"# {source}\n# {what} Made by tools/kernels.py.\n" + "".join(f"{line}\n" for line in lines)
    (OUT / file).write_text(text)


def versions(start: int, end: int) -> str:
    return f"{start}+" if end == LAST else f"{start}-{end}"


def row(op: str, start: int, end: int, types: dict[str, list[str]]) -> str:
    return " ".join([f"{op} {versions(start, end)}"] + [f"{p}={','.join(t)}" for p, t in sorted(types.items())])


def merged(rows: list[tuple]) -> list[str]:
    """Rows that differ in the types of one parameter only, as one."""
    rows = [(op, start, end, dict(types)) for op, start, end, types in rows]
    again = True
    while again:
        again = False
        for i, a in enumerate(rows):
            for b in rows[i + 1 :]:
                if a[:3] != b[:3] or a[3].keys() != b[3].keys():
                    continue
                differ = [p for p in a[3] if a[3][p] != b[3][p]]
                if len(differ) <= 1:
                    for p in differ:
                        a[3][p] = [t for t in TYPES if t in a[3][p] + b[3][p]]
                    rows.remove(b)
                    again = True
                    break
    return [row(*r) for r in rows]


def emitted(op: str, start: int, end: int) -> bool:
    return op in EMITTED and ("." in op or (start <= NEWEST and end >= OLDEST))


# The same parameter of several operands makes them of one type.
signatures = {}
for s in state.get_all_operator_schema():
    op = name(s.domain, s.name)
    if op in EMITTED and ("." in op or s.since_version <= NEWEST):
        def formal(f) -> str:
            variadic = "..." if f.option.name == "Variadic" else ""
            # A type instead of a parameter stands for itself.
            return f.typeStr + variadic
        fixed = {c.type_param_str: known(c.allowed_type_strs) for c in s.type_constraints}
        signatures[op, s.since_version] = ([formal(f) for f in s.inputs], [formal(f) for f in s.outputs], fixed)
newest_before = {op: max((v for o, v in signatures if o == op and v <= OLDEST), default=0) for op, _ in signatures}
kept = {k: v for k, v in sorted(signatures.items()) if k[1] >= newest_before[k[0]]}
version = onnxruntime.__version__
write("operators.txt", f"ONNX Runtime {version}: signatures of operators.",
      "Since which version, operands and results by type parameter; `...` may be repeated.",
      (f"{op} {since}: {', '.join(i)} -> {', '.join(o)}" for (op, since), (i, o, _) in kept.items()))

rows = []
for k in state.get_all_opkernel_def():
    op, (start, end) = name(k.domain, k.op_name), k.version_range
    if k.provider == "CPUExecutionProvider" and emitted(op, start, end):
        types = {p: known(t) for p, t in k.type_constraints.items()}
        if all(types.values()):
            rows.append((op, start, end, types))
write("cpu.txt", f"ONNX Runtime {version}, CPUExecutionProvider: its kernels.",
      "Versions of the operator, and types by type parameter; others are not restricted.", merged(sorted(rows, key=str)))

rows = []
for line in pathlib.Path(sys.argv[1]).read_text().splitlines():
    domain, op, span, types = (line.split("\t") + ["", "", ""])[:4]
    numbers = [int(n) for n in re.findall(r"\d+", span)]
    if not numbers:
        continue
    op, start = name(domain, op), numbers[0]
    end = LAST if span.endswith("+") else numbers[-1]
    types = {p: known(re.split(r",\s*", t)) for p, t in re.findall(r"(\w+) = ([^;]*\w)", types)}
    if emitted(op, start, end) and all(types.values()):
        rows.append((op, start, end, types))
write("cuda.txt", "ONNX Runtime 1.25, CUDAExecutionProvider: its kernels, from docs/OperatorKernels.md. Newer releases add to it.",
      "Versions of the operator, and types by type parameter; others are not restricted.", merged(rows))

# Of operators that came after that table: the release notes of TensorRT 10.15.
FLOATS = ["float", "float16", "bfloat16"]
rows = [(op, 23, LAST, {p: FLOATS}) for op, p in [("Attention", "T1"), ("RMSNormalization", "T"), ("RotaryEmbedding", "T")]]
NAMES = {"FP32": "float", "FP16": "float16", "BF16": "bfloat16"}
for line in pathlib.Path(sys.argv[2]).read_text().splitlines():
    cells = [c.strip() for c in line.strip().strip("|").split("|")]
    if len(cells) < 3 or cells[1] != "Y" or cells[0] not in EMITTED:
        continue
    params = {p.removesuffix("...") for (op, _), (i, _, _) in kept.items() if op == cells[0] for p in i}
    types = known(NAMES.get(t.strip(), t.strip().lower()) for t in cells[2].split(","))
    rows.append((cells[0], 1, LAST, {"T" if "T" in params else "T1": types}))
write("tensorrt.txt", "TensorRT 10: operators that its ONNX parser reads, from onnx-tensorrt 10.1's docs/operators.md.",
      "Versions of the operator, and types by type parameter; others are not restricted.", sorted(row(*r) for r in rows))
