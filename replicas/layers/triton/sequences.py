"""The sequences of a step as device kernels read them: tensors that never leave the device, and three bounds.

Made by the rank's batch builder, once per step or once per captured graph; needs torch alone. Shape letters:
B sequences, P pages of the longest table, C prefill chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from replicas.layers.attention import PagedSequences


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSequences:
    """Decode rows come first, and row b of them is flat token b; then the prefill chunks.

    `tables_BP` int32: the blocks of every sequence; what is beyond a length is never read. `lengths_B` int32:
    its cached tokens, those of this step included; 0 gives an output of zeros. `starts_C1` int32: the first
    flat token of each chunk, and the end of the last. The integers are known to the host and fixed in a
    captured graph: `max_context_tokens` is then the longest sequence the graph may ever serve. A padding row
    has table 0 (the scratch block), length 1 and slot 0, which no sequence has.
    """

    tables_BP: torch.Tensor
    lengths_B: torch.Tensor
    starts_C1: torch.Tensor
    num_decodes: int
    max_chunk_tokens: int
    max_context_tokens: int

    @property
    def num_chunks(self) -> int:
        return self.lengths_B.shape[0] - self.num_decodes

    @classmethod
    def from_paged(
        cls, sequences: PagedSequences, *, block_tokens: int, device: torch.device
    ) -> DeviceSequences:
        """One step's sequences, uploaded as one tensor; a sequence with one new token is a decode row."""
        starts, counts, positions, rows = sequences.rows_B4.T
        lengths = positions + counts
        num_decodes = int((counts == 1).sum())
        assert (counts[:num_decodes] == 1).all(), "decode rows come before chunks"
        num_pages = -(-int(lengths.max()) // block_tokens)
        words = np.concatenate(
            (
                sequences.tables[rows, :num_pages].ravel(),
                lengths,
                starts[num_decodes:],
                [int(starts[-1] + counts[-1])],
            )
        )
        on_device = torch.from_numpy(words.astype(np.int32)).to(device, non_blocking=True)
        num_rows = len(rows)
        tables, lengths_B, starts_C1 = on_device.split(
            (num_rows * num_pages, num_rows, num_rows - num_decodes + 1)
        )
        return cls(
            tables_BP=tables.view(num_rows, num_pages),
            lengths_B=lengths_B,
            starts_C1=starts_C1,
            num_decodes=num_decodes,
            max_chunk_tokens=int(counts[num_decodes:].max(initial=0)),
            max_context_tokens=int(lengths.max()),
        )
