"""How fast an engine has been lately: exponential averages over its steps. Pure; owned by the engine."""

from __future__ import annotations

from replicas.request import StepRecord

NEWEST_WEIGHT = 0.1
"""Share of the newest step; an average forgets nine tenths of its past in 22 steps."""
NS_PER_MS = 1e6
NS_PER_S = 1e9


class LoadAverages:
    """Step time over all steps; each token rate over the steps that had such tokens."""

    def __init__(self) -> None:
        self.step_ms = 0.0
        self.prefill_tokens_per_s = 0.0
        self.decode_tokens_per_s = 0.0

    def observe(self, record: StepRecord) -> None:
        duration_ns = max(record.end_ns - record.start_ns, 1)
        num_prefill = record.rows.num_prompt_tokens
        num_decode = record.rows.num_new_tokens - num_prefill
        self.step_ms = _average(self.step_ms, duration_ns / NS_PER_MS)
        if num_prefill:
            rate = num_prefill * NS_PER_S / duration_ns
            self.prefill_tokens_per_s = _average(self.prefill_tokens_per_s, rate)
        if num_decode:
            rate = num_decode * NS_PER_S / duration_ns
            self.decode_tokens_per_s = _average(self.decode_tokens_per_s, rate)


def _average(average: float, newest: float) -> float:
    """The first value is its own average."""
    return average + NEWEST_WEIGHT * (newest - average) if average else newest
