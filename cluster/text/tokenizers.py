"""Tokenizers of checkpoints: the Rust tokenizer and chat template that ship with a model.

`PreTrainedTokenizerFast` instead of `AutoTokenizer`: it reads the same files, never runs a checkpoint's own
code, and does not import torch (0.8 s and 300 MiB saved in the router).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from cluster.config import ConfigError, ModelSection
from cluster.request.completion import Turn
from cluster.sources import resolve_source
from cluster.text.null_tokenizer import NullTokenizer
from cluster.text.tokenizer import Tokenizer
from replicas.supervisor.tokenizer_digest import tokenizer_digest


class CheckpointTokenizer:
    """The tokenizer in a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self._fast = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        self._rust = self._fast.backend_tokenizer
        # A checkpoint may come with its training settings; a prompt is never cut or padded here.
        self._rust.no_truncation()
        self._rust.no_padding()
        self.digest = tokenizer_digest(folder)
        self.vocab_size: int = max(self._rust.get_vocab(with_added_tokens=True).values()) + 1
        added = self._rust.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.has_chat_template = self._fast.chat_template is not None

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._rust.encode(text, add_special_tokens=True).ids)

    def encode_chat(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            text = self._fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses it: {str(error)[:200]}") from error
        return tuple(self._rust.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._rust.decode(ids, skip_special_tokens=True)
        return text


def load_tokenizer(section: ModelSection) -> Tokenizer:
    """The tokenizer of one model. Slow (seconds): called at start-up.

    Raises SourceError where there is no such folder, ConfigError where it holds no tokenizer.
    """
    if section.is_null and not section.tokenizer:
        return NullTokenizer(section.null_engine.vocab_size)
    source = section.tokenizer or section.source
    folder = resolve_source(source, revision=section.revision, has_weights=False)
    try:
        return CheckpointTokenizer(folder)
    except Exception as error:  # The Rust tokenizer raises no narrower one for a file it cannot read.
        raise ConfigError(
            f"models[{section.name}].tokenizer: {source!r} holds no tokenizer that can be read ({error}); "
            "name a folder or hub id with tokenizer.json"
        ) from error
