"""Copies on huge pages: what is in them, and that they keep their memory alive."""

from __future__ import annotations

import gc

import torch

from replicas.layers.huge_pages import CHUNK_BYTES, HugeArena


def test_copies_of_an_arena_are_contiguous_apart_and_outlive_it() -> None:
    sources = [torch.arange(12.0).view(3, 4).t(), torch.ones(7, dtype=torch.int8), torch.full((2,), 3.0)]
    arena = HugeArena()
    copies = [arena.copy(source) for source in sources]
    del arena
    gc.collect()
    assert all(copy.is_contiguous() for copy in copies)
    assert all(torch.equal(copy, source) for copy, source in zip(copies, sources, strict=True))


def test_what_is_larger_than_a_chunk_has_its_own() -> None:
    arena = HugeArena()
    large = arena.copy(torch.ones(CHUNK_BYTES + 1, dtype=torch.int8))
    small = arena.copy(torch.ones(3))
    assert len(large) == CHUNK_BYTES + 1
    assert torch.equal(small, torch.ones(3))
