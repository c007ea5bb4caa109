"""What a replica says and cannot be true: it is taken out of a message before anything uses it. Pure.

Running sums of the router live for ever, and answers to others hold them in 32 or 64 bits: one absurd figure
would break them for as long as the router lives. A figure that is not a number would do so to predictions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import isfinite

from protos import wattline_link_pb2 as link
from replicas.energy.meter import Source

MAX_REQUESTS = 2**20
"""In one replica. A thousand such replicas add up to less than 32 bits."""
MAX_PREFILL_TOKENS = 2**40
MAX_REQUEST_MJ = 2**40
"""305 kWh. Eight million such requests add up to 63 bits."""
MAX_LIFE_MJ = 2**50
"""Of one life of a replica: 4 years at 8 kW. Eight thousand such lives add up to 63 bits."""
MAX_RATE = 1e12
MAX_SEQUENCE_US = 2**44
"""200 days. A span's times and numbers are 64 bits of nanoseconds, and an exporter fails on more."""
MAX_STEP = 2**53
MAX_TENANTS = 256
_SOURCES = frozenset(source.value for source in Source)


def strike_untrue(message: link.FromReplica) -> list[str]:
    """Take out of the message whatever cannot be true; returns what is wrong with each."""
    problems = []
    event = message.WhichOneof("event")
    if event in ("step", "heartbeat"):
        said = message.step if event == "step" else message.heartbeat
        if problem := load_problem(said.load):
            said.ClearField("load")
            problems.append(problem)
        timed = (delta for delta in message.step.deltas if delta.HasField("timing"))
        problems += filter(None, map(_strike_timing, timed))
    elif event == "energy":
        for index in reversed(range(len(message.energy.requests))):
            if problem := _energy_problem(message.energy.requests[index]):
                del message.energy.requests[index]
                problems.append(problem)
    if message.ledger and (problem := _first(map(_ledger_problem, message.ledger))):
        message.ClearField("ledger")
        problems.append(problem)
    return problems


def load_problem(load: link.LoadSnapshot) -> str:
    """What cannot be true of it; empty: nothing."""
    return _first(
        (
            _over("load.running", sum(load.running), MAX_REQUESTS),
            _over("load.waiting", sum(load.waiting), MAX_REQUESTS),
            _over("load.waiting_prefill_tokens", sum(load.waiting_prefill_tokens), MAX_PREFILL_TOKENS),
            _unreal("load.step_ms", load.step_ms),
            _unreal("load.prefill_tokens_per_s", load.prefill_tokens_per_s),
            _unreal("load.decode_tokens_per_s", load.decode_tokens_per_s),
            _unreal("load.joules_per_token", load.joules_per_token),
            _unreal("load.power_w", load.power_w),
            _unreal("load.idle_power_w", load.idle_power_w),
            _unreal("load.active_power_w", load.active_power_w),
        )
    )


def _strike_timing(delta: link.SequenceDelta) -> str:
    """Takes out the times, or the trail alone, if it cannot be true; returns what is wrong."""
    timing = delta.timing
    longest_us = max(timing.queue_us, timing.prefill_us, timing.decode_us)
    if problem := _over("timing", longest_us, MAX_SEQUENCE_US):
        delta.ClearField("timing")
    elif timing.HasField("trail") and (problem := _trail_problem(timing.trail, timing.decode_us)):
        timing.ClearField("trail")
    return problem


def _trail_problem(trail: link.StepTrail, decode_us: int) -> str:
    """Steps are counted from 1. Without a first token there is nothing behind it."""
    gap, has_gap = trail.longest_gap, trail.HasField("longest_gap")
    first, first_token, last = trail.first_step, trail.first_token_step, trail.last_step
    num_steps = trail.prefill_steps + trail.decode_steps
    is_true = (
        1 <= first <= (first_token or first) <= last <= MAX_STEP
        and 1 <= trail.prefill_steps <= num_steps <= last - first + 1
        and (first_token > 0 or not (trail.decode_steps or has_gap))
        and (not has_gap or first_token < gap.step <= last)
        and gap.duration_us <= gap.end_us <= decode_us
    )
    said = f"{num_steps} steps from {first} to {last}, the first token in {first_token}"
    return "" if is_true else f"timing.trail contradicts itself: {said}, gap {str(gap).split()}"


def _energy_problem(entry: link.RequestEnergy) -> str:
    if not entry.source:
        return ""  # It says that nothing is known.
    amounts_mj = (entry.prefill_mj, entry.decode_mj, entry.static_mj, entry.wasted_mj, entry.host_mj)
    return _first(
        (
            _unknown("energy.source", entry.source),
            _over("energy", max(amounts_mj), MAX_REQUEST_MJ),
            _unreal("energy.window_ms", entry.window_ms),
            _unreal("energy.confidence_factor", entry.confidence_factor),
        )
    )


def _ledger_problem(entry: link.LedgerTotals) -> str:
    return _first(
        (
            _unknown("ledger.source", entry.source),
            _over("ledger", max(_amounts_mj(entry)), MAX_LIFE_MJ),
            _over("ledger.tenants", len(entry.tenants), MAX_TENANTS),
            _unreal("ledger.confidence_factor", entry.confidence_factor),
        )
    )


def _amounts_mj(entry: link.LedgerTotals) -> Iterator[int]:
    yield from (entry.meter_mj, entry.prefill_mj, entry.decode_mj, entry.idle_mj, entry.unattributed_mj)
    yield from (entry.static_mj, entry.wasted_mj, entry.host_meter_mj, entry.host_requests_mj)
    for each in entry.tenants:
        yield from (each.prefill_mj, each.decode_mj)


def _first(problems: Iterable[str]) -> str:
    return next(filter(None, problems), "")


def _over(name: str, value: int, limit: int) -> str:
    return f"{name} says {value}; {limit} is the limit" if value > limit else ""


def _unreal(name: str, value: float) -> str:
    return "" if isfinite(value) and 0.0 <= value <= MAX_RATE else f"{name} says {value}"


def _unknown(name: str, source: str) -> str:
    return "" if source in _SOURCES else f"{name} says {source[:32]!r}; it is none of {', '.join(Source)}"
