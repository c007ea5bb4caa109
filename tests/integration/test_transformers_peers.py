"""The two adapters of transformers in this process: both run a workload to its end, token for token alike."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.peers.adapter import PeerSetup, open_peer
from bench.peers.driver import drive
from bench.rows import checkpoint_shape, make_workload
from bench.workload import Workload
from tests.checkpoints import make_llama


def heads_of(name: str, model: Path, workload: Workload) -> list[tuple[int, ...]]:
    peer = open_peer(
        PeerSetup(
            name=name,
            model=str(model),
            dtype="float32",
            threads=1,
            context_tokens=workload.context_tokens,
            converted=str(model.parent),
        )
    )
    try:
        return [one.head for one in drive(peer, workload).times()]
    finally:
        peer.close()


def test_a_padded_batch_and_continuous_batching_give_the_same_tokens(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "tiny")
    workload = make_workload("mix", checkpoint_shape(model), 3, 4)
    threads = torch.get_num_threads()
    try:
        static = heads_of("transformers-static", model, workload)
        assert static == heads_of("transformers-uncached", model, workload)
    finally:
        torch.set_num_threads(threads)
    assert len(set(static)) > 1
