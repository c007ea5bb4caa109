"""A checkpoint is numbers and text: whatever in it would run as code is refused or left alone."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from cluster.request.completion import Turn
from cluster.text.tokenizers import CheckpointTokenizer
from replicas.errors import BadCheckpoint
from replicas.models.checkpoint import Checkpoint
from replicas.models.config_file import read_spec
from tests.checkpoints import make_llama
from tests.unit.cluster.test_tokenizers import write_tokenizer


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.trace,))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "code-has-run"


def test_the_bomb_works(trace: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_never_read_as_weights(tmp_path: Path, trace: Path, name: str) -> None:
    folder = make_llama(tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    torch.save({"w": Bomb(trace)}, folder / name)
    with pytest.raises(BadCheckpoint):
        Checkpoint(folder)
    assert not trace.exists()


def test_an_index_does_not_lead_to_a_pickle(tmp_path: Path, trace: Path) -> None:
    folder = make_llama(tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    torch.save({"w": Bomb(trace)}, folder / "pytorch_model.bin")
    index = {"weight_map": {"w": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match="is not a readable safetensors file"):
        Checkpoint(folder)
    assert not trace.exists()


def write_module(folder: Path, trace: Path) -> None:
    (folder / "evil.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nclass Config: pass\nclass Tok: pass\n"
    )


def add_auto_map(path: Path, auto_map: dict[str, object]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))


def test_code_beside_a_model_is_refused(tmp_path: Path, trace: Path) -> None:
    folder = make_llama(tmp_path / "llama")
    write_module(folder, trace)
    add_auto_map(folder / "config.json", {"AutoConfig": "evil.Config"})
    with pytest.raises(BadCheckpoint, match="code shipped with a model is never run"):
        read_spec(folder)
    assert not trace.exists()


def test_code_beside_a_tokenizer_is_left_alone(tmp_path: Path, trace: Path) -> None:
    folder = write_tokenizer(tmp_path)
    write_module(folder, trace)
    add_auto_map(folder / "tokenizer_config.json", {"AutoTokenizer": [None, "evil.Tok"]})
    assert CheckpointTokenizer(folder).encode("hello")
    assert not trace.exists()


def test_a_chat_template_reaches_nothing_but_its_words(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = CheckpointTokenizer(write_tokenizer(tmp_path, template=template))
    with pytest.raises(ValueError, match="unsafe"):
        tokenizer.encode_chat([Turn(role="user", content="hello")])
