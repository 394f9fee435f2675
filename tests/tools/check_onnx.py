"""The ONNX project's own checker, with full shape inference, on the files given."""
import sys

import onnx

for path in sys.argv[1:]:
    onnx.checker.check_model(path, full_check=True)
print(f"{len(sys.argv) - 1} graphs pass the ONNX checker")
