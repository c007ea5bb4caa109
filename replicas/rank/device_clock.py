"""How long a device takes for a run: what a rank times while it starts. CUDA only."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from replicas.rank.graphs import CudaGraphBackend

_ROUNDS = 5
_RUNS_PER_ROUND = 10


class DeviceClock:
    """Runs back to back between two CUDA events: what the host cannot launch in time counts."""

    def __init__(self, *, has_graphs: bool) -> None:
        self._has_graphs = has_graphs

    def time_ns(self, run: Callable[[], object], *, is_decode: bool) -> int:
        """Of one run, the median of some rounds; decode is taken as it is served, from a graph if there are
        graphs."""

        def run_once() -> None:
            run()

        # A backend of its own: into a pool whose graphs are all gone, nothing can be captured again.
        again = CudaGraphBackend().capture(run_once) if is_decode and self._has_graphs else run_once
        again()
        return round(1e6 * statistics.median(_round_ms(again) for _ in range(_ROUNDS)) / _RUNS_PER_ROUND)


def _round_ms(run: Callable[[], None]) -> float:
    began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    began.record()
    for _ in range(_RUNS_PER_ROUND):
        run()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended))
