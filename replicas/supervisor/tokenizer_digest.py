"""A digest of the files that decide how text becomes tokens.

Replica and router compute it on their own copies: the router fails a stream over only between replicas whose
digest equals its own. Pure but for reading the files.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATE_FOLDER = "additional_chat_templates"
DIGEST_BYTES = 16


def tokenizer_digest(folder: Path) -> str:
    """Hexadecimal digest of the tokenizer and chat template in `folder`; empty where there is no tokenizer.

    Names and sizes go in with the contents, so moving bytes from one file to the next changes the digest.
    """
    paths = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    paths += sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    if not paths:
        return ""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
