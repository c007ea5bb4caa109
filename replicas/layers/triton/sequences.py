"""The sequences of a step as device kernels read them: tensors that never leave the device, and three bounds.

Made by the rank's batch builder, once per step or once per captured graph; needs torch alone. Shape letters:
B sequences, P pages of the longest table, C prefill chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSequences:
    """Decode rows come first, and row b of them is flat token b; then the prefill chunks.

    `tables_BP` int32: the blocks of every sequence; what is beyond a length is never read. `lengths_B` int32:
    the cached tokens of a sequence, those of this step included; 0 gives an output of zeros. `starts_C1`
    int32: the first flat token of each chunk, and the end of the last. The integers are known to the host and
    fixed in a captured graph: `max_context_tokens` is then the longest sequence the graph may ever serve. A
    padding row has table 0 (the scratch block), length 1 and slot 0.
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
