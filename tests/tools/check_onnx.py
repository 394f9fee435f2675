"""The ONNX project's own checker, with full shape inference, on the files given."""
import pathlib
import shutil
import sys
import tempfile

import onnx

graphs = [pathlib.Path(p) for p in sys.argv[1:]]
for directory in dict.fromkeys(g.parent for g in graphs):
    # The checker refuses weights in files that have other names too, as those of a checkpoint may; copies have one.
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(directory, copy, dirs_exist_ok=True)
        for graph in graphs:
            if graph.parent == directory:
                onnx.checker.check_model(str(pathlib.Path(copy, graph.name)), full_check=True)
print(f"{len(graphs)} graphs pass the ONNX checker")
