"""`python -m bench.peers.gguf LLAMACPP_SOURCE MODEL TARGET TYPE`: a checkpoint in llama.cpp's format.

llama.cpp's own converter does the work. It tells tokenizers apart by a table of known hashes and refuses
others; prompts go in as token ids here, so that any answer to that one question serves.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def convert(source: Path, model: Path, target: Path, weight_type: str) -> None:
    """Write `target`. Raises what the converter raises."""
    sys.path[:0] = [str(source / "gguf-py"), str(source)]
    converter = importlib.import_module("convert_hf_to_gguf")
    for owner in vars(importlib.import_module("conversion.base")).values():
        if isinstance(owner, type) and "get_vocab_base_pre" in vars(owner):
            owner.get_vocab_base_pre = lambda _self, _tokenizer: "llama-bpe"  # type: ignore[attr-defined]
    sys.argv = ["convert", str(model), "--outfile", str(target), "--outtype", weight_type]
    converter.main()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
