"""How long a model is away when one of its ranks is killed: told, replaced, serving."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.record import write_results
from bench.suites import console, serving
from cluster.client import Ask, CallError
from cluster.config import load_config
from cluster.replies import Final, ReplicaState

if TYPE_CHECKING:
    from cluster.serving.stack import Stack

RECOVERY_TIMEOUT_S = 120.0
POLL_S = 0.05
LONG_ANSWER = Ask(max_tokens=1500, ignore_eos=True, temperature=0.0, resume=False)
SHORT_ANSWER = Ask(max_tokens=2, temperature=0.0, energy_wait_ms=0)


def run_recovery_suite(config_path: Path, repeats: int, path: Path | None) -> None:
    """SIGKILL one rank of every model in turn while a stream runs, `repeats` times, and write one file."""
    config = load_config(config_path)
    rows: list[dict[str, object]] = []
    with serving(config) as stack:
        for index in range(repeats):
            for section in config.models:
                rows.append(
                    measure_rank_kill(
                        stack, section.name, rank=index % section.parallel.to_parallel().num_ranks
                    )
                )
                console.print(
                    "  ".join(f"{key} [bold]{value}[/]" for key, value in rows[-1].items()), highlight=False
                )
    console.print(f"written to {write_results('recovery', rows, path)}")


def measure_rank_kill(stack: Stack, model: str, *, rank: int) -> dict[str, object]:
    """Seconds from SIGKILL to the caller's status, and to the first answer of the new replica."""
    lost = the_replica(stack, model)
    stream = stack.client.generate(model, "Once upon a time", LONG_ANSWER)
    next(stream)
    killed_s = time.monotonic()
    os.kill(lost.ranks[rank].pid, signal.SIGKILL)
    code = "OK"
    try:
        for _ in stream:
            pass
    except CallError as error:
        code = error.code
    told_s = time.monotonic() - killed_s
    while not answers(stack, model):
        if time.monotonic() - killed_s > RECOVERY_TIMEOUT_S:
            raise RuntimeError(f"{model} is not back after {RECOVERY_TIMEOUT_S:g} s")
        time.sleep(POLL_S)
    return {
        "model": model,
        "killed_rank": rank,
        "caller_code": code,
        "told_s": round(told_s, 3),
        "recovery_s": round(time.monotonic() - killed_s, 2),
    }


def answers(stack: Stack, model: str) -> bool:
    try:
        return isinstance(list(stack.client.generate(model, "x", SHORT_ANSWER))[-1], Final)
    except CallError:
        return False


def the_replica(stack: Stack, model: str) -> ReplicaState:
    state = stack.status()
    assert state is not None
    (replica,) = next(one for one in state.models if one.name == model).replicas
    return replica
