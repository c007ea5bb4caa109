"""Slices come from one file or many alike; a folder that does not fit is refused by file and tensor."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from replicas.config import ParallelConfig
from replicas.errors import BadCheckpoint
from replicas.models import checkpoint as checkpoint_module
from replicas.models.checkpoint import Checkpoint
from replicas.models.config_file import read_spec
from replicas.models.weights import ExpertWeights, MlpWeights, ModelWeights, load_weights
from replicas.parallel.degrees import shard_of
from tests.checkpoints import make_granite_moe, make_llama


def save(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    save_file(tensors, folder / name)
    (folder / "config.json").write_text("{}")
    return folder


def load(folder: Path, *, tensor: int = 1, expert: int = 1, rank: int = 0) -> ModelWeights:
    spec = read_spec(folder)
    shard = shard_of(spec, ParallelConfig(tensor=tensor, expert=expert), rank)
    with Checkpoint(folder) as opened:
        return load_weights(
            opened,
            spec,
            shard,
            device=torch.device("cpu"),
            dtype=torch.float32,
            progress=lambda stage, done, total: None,
        )


def edit(folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """Rewrite the single weight file with tensors replaced, added or (None) removed."""
    with Checkpoint(folder) as opened:
        tensors = {
            name: opened.read(name, stored.shape, tuple((0, size) for size in stored.shape))
            for name, stored in opened.tensors.items()
        }
    for name, tensor in change.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_slice_is_the_slice(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    with Checkpoint(save(tmp_path, {"w": whole})) as opened:
        assert torch.equal(opened.read("w", (4, 6), ((1, 3), (2, 6))), whole[1:3, 2:6])


def test_spread_files_hold_the_same_weights_as_one(tmp_path: Path) -> None:
    one = load(make_llama(tmp_path / "one"))
    spread = load(make_llama(tmp_path / "spread", max_shard_size="50KB"))
    assert len(list((tmp_path / "spread").glob("*.safetensors"))) > 2
    assert torch.equal(one.head_VH, spread.head_VH)
    assert torch.equal(one.layers[1].qkv_QH, spread.layers[1].qkv_QH)


def test_shards_put_together_are_the_whole(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "llama")
    whole = load(folder)
    halves = [load(folder, tensor=2, rank=rank) for rank in range(2)]
    assert torch.equal(torch.cat([half.embedding_VH for half in halves])[:515], whole.embedding_VH[:515])
    assert torch.equal(torch.cat([half.layers[0].out_HA for half in halves], dim=1), whole.layers[0].out_HA)
    mlps = [layer.ffn for layer in (whole.layers[0], *(half.layers[0] for half in halves))]
    gates_and_ups = []
    for mlp in mlps:
        assert isinstance(mlp, MlpWeights)
        gates_and_ups.append(mlp.gate_up_2FH.view(2, -1, 64))
    assert torch.equal(torch.cat(gates_and_ups[1:], dim=1), gates_and_ups[0])


def test_expert_columns_are_cut_from_both_halves(tmp_path: Path) -> None:
    folder = make_granite_moe(tmp_path / "moe", vocab_size=515)
    parts = [load(folder).layers[0].ffn]
    parts += [load(folder, tensor=2, rank=rank).layers[0].ffn for rank in range(2)]
    views = []
    for part in parts:
        assert isinstance(part, ExpertWeights)
        views.append(part.gate_up_E2FH.view(8, 2, -1, 64))
    assert torch.equal(torch.cat(views[1:], dim=2), views[0])
    last = load(folder, expert=4, rank=3).layers[0].ffn
    assert isinstance(last, ExpertWeights)
    assert torch.equal(last.gate_up_E2FH.view(2, 2, -1, 64), views[0][6:])


def test_a_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "llama", is_tied=True)
    weights = load(folder)
    assert weights.head_VH is weights.embedding_VH
    edit(folder, {"lm_head.weight": weights.embedding_VH[:515].clone()})
    weights = load(folder)
    assert weights.head_VH is weights.embedding_VH


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "llama")
    spec = read_spec(folder)
    seen: list[tuple[str, int, int]] = []
    with Checkpoint(folder) as opened:
        load_weights(
            opened,
            spec,
            shard_of(spec, ParallelConfig(tensor=2), 1),
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            progress=lambda stage, done, total: seen.append((stage, done, total)),
        )
    done = [entry[1] for entry in seen]
    assert done == sorted(done)
    assert seen[-1][1] == seen[-1][2] > 0


NORM = "model.layers.1.input_layernorm.weight"


def test_only_one_tensor_at_a_time_waits_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read is gone before the next is: on a GPU the host never holds more than one tensor."""
    source = make_granite_moe(tmp_path / "moe", vocab_size=515)
    read_before: list[weakref.ref[torch.Tensor]] = []
    read = Checkpoint.read

    def watched(
        self: Checkpoint, name: str, shape: tuple[int, ...], part: tuple[tuple[int, int], ...]
    ) -> torch.Tensor:
        assert all(before() is None for before in read_before)
        tensor = read(self, name, shape, part)
        read_before.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    spec = read_spec(source)
    with Checkpoint(source) as opened:
        load_weights(
            opened,
            spec,
            shard_of(spec, ParallelConfig(), 0),
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            progress=lambda stage, done, total: None,
        )
    assert len(read_before) == len(Checkpoint(source).tensors)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({NORM: None}, f"tensor {NORM} is missing"),
        ({NORM: torch.ones(63)}, rf"model.safetensors: tensor {NORM} has shape \(63,\); expected \(64,\)"),
        ({NORM: torch.full((64,), torch.nan)}, f"tensor {NORM} has values that are not finite"),
        ({NORM: torch.ones(64, dtype=torch.int8)}, f"tensor {NORM} is I8"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "1 tensors have no place"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, torch.Tensor | None], reason: str
) -> None:
    folder = edit(make_llama(tmp_path / "llama"), change)
    with pytest.raises(BadCheckpoint, match=reason):
        load(folder)


def test_constants_of_older_checkpoints_are_ignored(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "llama")
    load(edit(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))


def test_other_formats_and_broken_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadCheckpoint, match="save_pretrained"):
        Checkpoint(tmp_path)
    save(tmp_path, {"w": torch.ones(1000)})
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadCheckpoint, match="cut short"):
        Checkpoint(tmp_path)
    for header in (b"[]", b'{"w": {"shape": [], "data_offsets": [0, 0]}}', b'{"w": 1}'):
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(BadCheckpoint, match="not a readable safetensors"):
            Checkpoint(tmp_path)
    file.write_bytes(b"\xff" * 16)
    with pytest.raises(BadCheckpoint, match="not a readable safetensors"):
        Checkpoint(tmp_path)


def test_an_index_cannot_leave_its_folder(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../other.safetensors"}}))
    with pytest.raises(BadCheckpoint, match="no file of the folder"):
        Checkpoint(tmp_path)
    index.write_text("[]")
    with pytest.raises(BadCheckpoint, match="no readable weight_map"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("whole_bytes", [2**26, 0])
def test_the_digest_names_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    monkeypatch.setattr(checkpoint_module, "_WHOLE_DIGEST_BYTES", whole_bytes)
    first = Checkpoint(make_llama(tmp_path / "first")).digest()
    same = Checkpoint(make_llama(tmp_path / "same")).digest()
    other = Checkpoint(make_llama(tmp_path / "other", seed=1)).digest()
    assert first == same != other
    assert len(first) == 32
