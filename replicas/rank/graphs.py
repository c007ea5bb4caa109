"""Decode steps as graphs: captured once per batch size, replayed on static buffers.

A decode step of a small batch is hundreds of short kernels, and launching them one by one costs more than
they do. `DecodeGraphs` owns the buffers a captured step reads and writes; which sizes there are and how a
batch is padded is decided in `buckets.py`. A `GraphBackend` is how a device captures: `CudaGraphBackend`, or
`EagerBackend` for devices and configurations without graphs, which runs the same step on the same buffers.
Shape letters: B rows of a bucket, V local vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from replicas.rank.buckets import NUM_WORDS

_WARM_RUNS = 2
"""Before a capture: in the first, libraries make their handles and kernels are compiled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What a decode step leaves. In a replay's answer, static memory that the next replay overwrites."""

    logits_BV: torch.Tensor
    ids_B: torch.Tensor
    experts_hit: torch.Tensor | int


DecodeStep = Callable[[torch.Tensor], Decoded]
"""From the words of a bucket, int64 [6, B] on the device, to what the step leaves there."""


class GraphBackend(Protocol):
    """How a device records a run of fixed shapes on fixed memory."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run it, perhaps several times, and return what does it again."""


class EagerBackend:
    """Does it again by running it."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run


class CudaGraphBackend:
    """CUDA graphs that share one memory pool. Sharing is safe because replays never overlap."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, as that of NCCL, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


class DecodeGraphs:
    """The static buffers of all buckets and their replays. One replay at a time, on one stream."""

    def __init__(
        self,
        step: DecodeStep,
        sizes: Sequence[int],
        backend: GraphBackend,
        *,
        vocab_rows: int,
        device: torch.device,
    ) -> None:
        self._step = step
        self._backend = backend
        self.sizes = tuple(sizes)
        self._words = {
            size: torch.zeros((NUM_WORDS, size), dtype=torch.int64, device=device) for size in self.sizes
        }
        self._outputs = {size: torch.zeros(size + 1, dtype=torch.int64, device=device) for size in self.sizes}
        # One for all buckets: captured memory that is still referred to cannot serve the next capture.
        self._logits_BV = torch.zeros((self.sizes[-1], vocab_rows), dtype=torch.float32, device=device)
        self._replays: dict[int, Callable[[], None]] = {}

    @property
    def is_captured(self) -> bool:
        return bool(self._replays)

    def capture(self) -> None:
        """Record every bucket, the largest first, so that the others fit into its memory.

        All ranks of a group call it together. Words of zeros: every row writes to scratch, and reads there.
        """
        for size in reversed(self.sizes):
            self._replays[size] = self._backend.capture(partial(self._run, size))

    def replay(self, words_6B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the bucket of `words_6B.shape[1]` rows: logits [B, V], and the ids with the experts hit [B+1].

        Before the capture the step is run as it is. Both tensors are overwritten by the next replay.
        """
        size = words_6B.shape[1]
        self._words[size].copy_(words_6B)
        self._replays.get(size, partial(self._run, size))()
        return self._logits_BV[:size], self._outputs[size]

    def _run(self, size: int) -> None:
        decoded = self._step(self._words[size])
        self._logits_BV[:size].copy_(decoded.logits_BV)
        self._outputs[size][:size].copy_(decoded.ids_B)
        if isinstance(decoded.experts_hit, torch.Tensor):
            self._outputs[size][size:].copy_(decoded.experts_hit.view(1))
        else:
            self._outputs[size][size:].fill_(decoded.experts_hit)
