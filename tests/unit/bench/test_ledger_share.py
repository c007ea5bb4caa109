"""The bench of what joules cost: CPU time is found where it is spent, and pairs are compared as pairs."""

from __future__ import annotations

import signal

from bench.cpu_samples import CpuSamples, sampling
from bench.ledger_share import Turn, is_about_joules, summarize


def burn(samples: CpuSamples, num_looks: int) -> None:
    until = samples.num_looks + num_looks
    while samples.num_looks < until:
        pass


def burn_elsewhere(samples: CpuSamples, num_looks: int) -> None:
    until = samples.num_looks + num_looks
    while samples.num_looks < until:
        pass


def test_looks_hit_the_code_that_runs_and_no_other() -> None:
    before = signal.getsignal(signal.SIGPROF)
    with sampling(lambda file, function: file == __file__ and function == "burn") as samples:
        burn(samples, 20)
        num_hits = samples.num_hits
        burn_elsewhere(samples, 20)
    assert 20 <= num_hits <= samples.num_looks - 20
    assert samples.num_hits <= num_hits + 1, "a look may come between the two"
    assert signal.getsignal(signal.SIGPROF) is before


def test_joules_are_what_a_meter_brings() -> None:
    assert is_about_joules("/x/replicas/energy/ledger.py", "_close")
    assert is_about_joules("/x/replicas/supervisor/dispatcher.py", "settle_energy")
    assert not is_about_joules("/x/replicas/supervisor/dispatcher.py", "on_step")


def test_pairs_are_compared_as_pairs() -> None:
    def turn(tokens_per_s: float, *, joules_us: float = 0.0, agent_us: float = 0.0) -> Turn:
        cpu_us = {"rank": 300.0, "rest": 98.0, "agent": agent_us}
        return Turn(tokens_per_s=tokens_per_s, cpu_us=cpu_us, joules_us=joules_us)

    pairs = [
        {"metered": turn(99.0 * speed, joules_us=2.0, agent_us=2.0), "bare": turn(100.0 * speed)}
        for speed in (1, 2, 7)
    ]
    assert summarize(pairs) == {
        "pairs": 3,
        "slower_percent_p50": 1.0,
        "slower_percent_p25_p75": [1.0, 1.0],
        "joules_us_per_token_p50": 4.0,
        "joules_cpu_percent_p50": 1.0,
    }
