"""One parallel group over two hosts, through the whole line: two nodes of one Ray, on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from cluster.client import Ask
from cluster.replies import Delta, Final
from tests.demo_corpus import EXAMPLES_DIR, read_pairs
from tests.ray_nodes import NODE_CPUS, RayNodes, free_port, ray_nodes
from tests.running_up import Running, running_up

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

MODEL = "llama-demo"
NUM_PAIRS = 40
OTHER_ADDRESS = "127.0.0.2"
"""Of this machine, too, so that both nodes can have an energy agent at one port."""
STATIC_W = 16.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with (
        TemporaryDirectory(prefix="wl-", dir="/tmp") as name,
        ray_nodes(Path(name), head_cpus=NODE_CPUS) as started,
    ):
        started.tell(f"add {OTHER_ADDRESS}")
        yield started


@pytest.fixture(scope="module")
def running(nodes: RayNodes) -> Iterator[Running]:
    def make_config(folder: Path) -> dict[str, object]:
        model = {
            "name": MODEL,
            "source": str(EXAMPLES_DIR / "models" / MODEL),
            "parallel": {"tensor": 2, "hosts": 2},
            "cpus_per_rank": 0.5,
        }
        return {
            "models": [model],
            "router": {"grpc_port": 0, "http_port": 0, "link_port": 0},
            "energy": {"cpu_static_w": STATIC_W, "cpu_core_w": 0.0, "agent_port": free_port()},
            "ray": {"address": nodes.address},
            "runtime_dir": str(folder),
        }

    with running_up(make_config, nodes.environment) as up:
        yield up


def raylet_of(pid: int) -> int:
    (raylet,) = (parent.pid for parent in psutil.Process(pid).parents() if parent.name() == "raylet")
    return raylet


def test_a_model_over_two_nodes_answers_every_prompt_exactly(running: Running) -> None:
    replica = running.replica(MODEL)
    assert replica.tensor_parallel == 2
    first, second = (raylet_of(rank.pid) for rank in replica.ranks)
    assert first == raylet_of(replica.supervisor_pid) != second
    pairs = read_pairs()[:NUM_PAIRS]

    def answer(index: int) -> str:
        replies = running.client.chat(MODEL, pairs[index].messages, Ask(temperature=0.0, energy_wait_ms=0))
        return "".join(reply.text for reply in replies if isinstance(reply, Delta))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, range(NUM_PAIRS))) == [pair.assistant for pair in pairs]


def test_its_energy_is_that_of_both_hosts(running: Running) -> None:
    """Each agent estimates the same constant draw, so twice as much means that both were read."""
    ask = Ask(max_tokens=4, temperature=0.0, energy_wait_ms=0)
    *_, final = running.client.chat(MODEL, read_pairs()[0].messages, ask)
    assert isinstance(final, Final)
    energy = running.final_energy(final)
    assert energy.source == "tdp"
    assert energy.prefill_j
    assert running.replica(MODEL).power_w == pytest.approx(2 * STATIC_W, rel=0.02)
