"""llama.cpp's convert_hf_to_gguf.py, on a checkpoint whose made-up tokenizer it cannot know.

Usage: python gguf_convert.py LLAMA_CPP_SOURCE <arguments of convert_hf_to_gguf.py>

The converter recognizes how a tokenizer splits text by a hash of what it makes of a test string. The synthetic checkpoint's
tokenizer is Qwen2's kind with other words, so the answer is given instead. Nothing about the weights changes.
"""

import runpy
import sys
from pathlib import Path

source = Path(sys.argv[1])
sys.path[:0] = [str(source), str(source / "gguf-py")]

from conversion.base import TextModel  # noqa: E402: it lives in the source that was just put on the path

TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = sys.argv[1:]
runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")
