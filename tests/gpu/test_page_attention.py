"""Attention of a step over pages by either kind, or one kind for each part, equals plain attention.

Torch's varlen attention runs on CUDA alone: its place is taken by what torch documents, in plain torch
(`tests/varlen_reference.py`). These tests prove our tables, lengths, starts and masks, not torch's kernels.
"""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="needs Triton (pip install 'wattline[gpu]')")

from replicas.attention_choice import VARLEN_ALONE, AttentionChoice
from replicas.layers.attention import PagedSequences
from replicas.layers.triton.page_attention import PageAttention
from replicas.layers.triton.sequences import DeviceSequences
from replicas.layers.triton.varlen import find_varlen
from tests.varlen_reference import Recorded, varlen_reference

PAGE, HEADS, HEAD_DIM = 4, 6, 16
DECODES = ((0, 1), (8, 1), (10, 1))
CHUNKS = ((0, 7), (5, 3), (11, 2))
"""Tokens before, and new ones."""


class Step:
    """Sequences whose keys and values lie in pages in no order, between pages that hold NaN."""

    def __init__(
        self, contexts: tuple[tuple[int, int], ...], num_kv_heads: int, device: torch.device
    ) -> None:
        torch.manual_seed(7)
        self.contexts = contexts
        lengths = [before + new for before, new in contexts]
        counts = [-(-length // PAGE) for length in lengths]
        order = iter((torch.randperm(sum(counts)) + 1).tolist())
        tables = np.zeros((len(contexts), max(counts) + 2), dtype=np.int64)
        shape = (sum(counts) + 2, PAGE, num_kv_heads, HEAD_DIM)
        self.keys, self.values = (torch.full(shape, torch.nan, device=device) for _ in range(2))
        self.plain: list[tuple[torch.Tensor, torch.Tensor]] = []
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            tables[row, :count] = list(itertools.islice(order, count))
            pair = torch.randn(2, length, num_kv_heads, HEAD_DIM, device=device)
            self.plain.append((pair[0], pair[1]))
            for token in range(length):
                block, place = tables[row, token // PAGE], token % PAGE
                self.keys[block, place], self.values[block, place] = pair[0, token], pair[1, token]
        new = np.array([count for _, count in contexts])
        starts = np.cumsum(new) - new
        rows_B4 = np.stack((starts, new, [before for before, _ in contexts], range(len(contexts))), axis=1)
        self.queries = torch.randn(int(new.sum()), HEADS, HEAD_DIM, device=device)
        self.sequences = DeviceSequences.from_paged(
            PagedSequences(rows_B4=rows_B4, tables=tables), block_tokens=PAGE, device=device
        )

    def expected(self, scale: float) -> torch.Tensor:
        """Torch's attention, sequence by sequence, over what was never in a page."""
        outs, start = [], 0
        for (before, new), (keys, values) in zip(self.contexts, self.plain, strict=True):
            is_seen = torch.ones(new, before + new, dtype=torch.bool, device=keys.device).tril(before)
            out = functional.scaled_dot_product_attention(
                self.queries[start : start + new].transpose(0, 1),
                keys.transpose(0, 1),
                values.transpose(0, 1),
                attn_mask=is_seen,
                scale=scale,
                enable_gqa=True,
            )
            outs.append(out.transpose(0, 1))
            start += new
        return torch.cat(outs)


CHOICES = {
    "varlen": VARLEN_ALONE,
    "varlen decodes": AttentionChoice(varlen_rows=3),
    "varlen chunks": AttentionChoice(varlen_rows=4, varlen_chunks=True),
}


@pytest.mark.parametrize("num_kv_heads", [2, 6])
@pytest.mark.parametrize(
    "contexts", [DECODES, CHUNKS, (*DECODES, *CHUNKS)], ids=["decodes", "chunks", "both"]
)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_every_choice_gives_plain_attention(
    device: torch.device,
    choice: AttentionChoice,
    contexts: tuple[tuple[int, int], ...],
    num_kv_heads: int,
) -> None:
    step = Step(contexts, num_kv_heads, device)
    attention = PageAttention(scale=0.3, find=lambda: varlen_reference, choice=choice)
    attention.begin(step.sequences)
    out_TND = attention.attend(step.queries, step.keys, step.values)
    torch.testing.assert_close(out_TND, step.expected(0.3), rtol=1e-4, atol=1e-5)
    assert out_TND.is_contiguous()


def test_each_part_is_one_call_that_torch_would_take(device: torch.device) -> None:
    """Decode rows without a mask, so that heads are folded; chunks with; bounds that the host knows."""
    step = Step((*DECODES, *CHUNKS), 2, device)
    recorded = Recorded(varlen_reference)
    attention = PageAttention(scale=0.3, find=lambda: recorded, choice=VARLEN_ALONE)
    attention.begin(step.sequences)
    for _ in range(2):
        attention.attend(step.queries, step.keys, step.values)
    said = [(args[5], args[6], options["window_size"]) for args, options in recorded.calls]
    assert said == [(1, 13, (-1, -1)), (7, 13, (-1, 0))] * 2
    torchs = find_varlen()
    if torchs is not None:
        for args, options in recorded.calls:
            inspect.signature(torchs).bind(*args, **options)


def test_a_torch_without_it_is_said_so(device: torch.device) -> None:
    step = Step(DECODES, 2, device)
    attention = PageAttention(scale=0.3, find=lambda: None, choice=VARLEN_ALONE)
    attention.begin(step.sequences)
    with pytest.raises(RuntimeError, match="this torch has no varlen attention"):
        attention.attend(step.queries, step.keys, step.values)
