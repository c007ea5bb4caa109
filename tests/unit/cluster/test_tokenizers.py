"""Tokenizers of checkpoint folders: templates, special tokens, digests, and folders that hold none."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cluster.command_error import CommandError
from cluster.config import ConfigError, ModelSection
from cluster.request.completion import Turn
from cluster.text.null_tokenizer import NullTokenizer
from cluster.text.tokenizers import CheckpointTokenizer, load_tokenizer
from replicas.supervisor.tokenizer_digest import tokenizer_digest

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ message.content }}<eos>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """A byte-level tokenizer as a checkpoint has it: beginning-of-text token, left-over training settings."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rust.train_from_iterator(["hello world"], trainer)
    rust.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    rust.enable_truncation(max_length=4)
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = template
    fast.save_pretrained(str(folder))
    return folder


def test_a_prompt_gets_its_first_token_and_is_never_cut(tmp_path: Path) -> None:
    tokenizer = CheckpointTokenizer(write_tokenizer(tmp_path))
    ids = tokenizer.encode("hello world " * 10)
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "hello world " * 10
    assert tokenizer.special_ids == {0, 1}
    assert max(ids) < tokenizer.vocab_size


def test_the_template_brings_its_own_special_tokens(tmp_path: Path) -> None:
    tokenizer = CheckpointTokenizer(write_tokenizer(tmp_path))
    ids = tokenizer.encode_chat([Turn(role="user", content="hello"), Turn(role="assistant", content="world")])
    assert [ids[0], ids.count(0), ids.count(1)] == [0, 1, 2]
    assert tokenizer.decode(ids) == "helloworld>"


def test_a_template_that_refuses_is_a_value_error(tmp_path: Path) -> None:
    tokenizer = CheckpointTokenizer(write_tokenizer(tmp_path))
    with pytest.raises(ValueError, match="no system here"):
        tokenizer.encode_chat([Turn(role="system", content="x")])


def test_a_checkpoint_without_template_says_so_and_has_the_replicas_digest(tmp_path: Path) -> None:
    tokenizer = CheckpointTokenizer(write_tokenizer(tmp_path, template=None))
    assert not tokenizer.has_chat_template
    assert tokenizer.digest == tokenizer_digest(tmp_path) != ""


def test_a_folder_without_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\[m\].tokenizer: .* holds no tokenizer that can be read"):
        load_tokenizer(ModelSection(name="m", source=str(tmp_path)))


@pytest.mark.parametrize("is_later", [True, False], ids=["of-a-later-version", "of-no-version"])
def test_a_tokenizer_that_cannot_be_read_is_a_sentence(tmp_path: Path, is_later: bool) -> None:
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    file.write_text(file.read_text().replace('"BPE"', '"Later"') if is_later else "[]")
    with pytest.raises(ConfigError, match="holds no tokenizer that can be read"):
        load_tokenizer(ModelSection(name="m", source=str(tmp_path)))


def test_a_source_that_is_nowhere_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CommandError, match="nobody/nothing"):
        load_tokenizer(ModelSection(name="m", source="nobody/nothing"))


def test_the_null_engine_needs_no_files() -> None:
    tokenizer = load_tokenizer(ModelSection(name="m", source="null"))
    assert isinstance(tokenizer, NullTokenizer)
    assert tokenizer.decode(tokenizer.encode("naïve 🙂")) == "naïve 🙂"
    assert all(tokenizer.decode([token_id]).isprintable() for token_id in range(260, tokenizer.vocab_size))


def test_a_vocabulary_smaller_than_a_byte_still_tokenises() -> None:
    assert max(NullTokenizer(16).encode("hello")) < 16
