"""A replica in the `dispatch` layout, seen by a router and a scrape: lanes, tokens, and its experts' load."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path

import pytest

from cluster.link.messages import parse_heat
from replicas.config import EngineLimits, ParallelConfig, ReplicaConfig
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import Supervisor
from tests.checkpoints import make_granite_moe
from tests.small_router import WAIT_S, SmallRouter

pytestmark = pytest.mark.processes

NUM_TOKENS = 40
LIMITS = EngineLimits(max_sequences=4, step_tokens=64, block_tokens=8, num_blocks=64, context_tokens=100)
PARALLEL = ParallelConfig(expert=2, layout="dispatch", spare_experts=1, rebalance_steps=10)


async def scrape(address: str) -> dict[str, float]:
    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as answer:
            return str(answer.read(), "utf-8")

    text = await asyncio.to_thread(read)
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def expert_tokens(values: dict[str, float]) -> float:
    return sum(value for name, value in values.items() if name.startswith("wattline_expert_tokens_total"))


async def test_lanes_answer_and_the_load_of_the_experts_is_shown(tmp_path: Path) -> None:
    (tmp_path / "shm").mkdir()
    lost: list[str] = []
    async with SmallRouter() as router:
        config = ReplicaConfig(
            model="moe",
            source=str(make_granite_moe(tmp_path / "checkpoint", vocab_size=515, seed=13)),
            replica_id="moe/1",
            routers=(router.address,),
            parallel=PARALLEL,
            limits=LIMITS,
            meter="fake",
            runtime_dir=str(tmp_path / "run"),
            shared_dir=str(tmp_path / "shm"),
            stall_floor_s=WAIT_S,
        )
        ranks = SubprocessRankGroup(runtime_dir=tmp_path / "run")
        supervisor = Supervisor(config, ranks, lost.append, first_link_timeout_s=WAIT_S)
        try:
            await supervisor.start()
            link = await router.attached()
            assert (link.hello.layout, link.hello.lanes, link.hello.expert_parallel) == ("dispatch", 2, 2)
            assert len(link.hello.load.free_blocks) == 2
            for request_id, lane in ((1, 0), (2, 1), (3, 0)):
                link.submit(request_id, (20, 21, 22), max_tokens=NUM_TOKENS, lane=lane)
            for request_id in (1, 2, 3):
                await link.finished(request_id)
            assert link.token_ids(1) == link.token_ids(2) == link.token_ids(3)
            values = await scrape(link.hello.metrics_address)
            # The last report follows the last step; cached prompts are shorter than a block.
            while expert_tokens(values) < 2 * 2 * 3 * (3 + NUM_TOKENS - 1):
                await asyncio.sleep(0.05)
                values = await scrape(link.hello.metrics_address)
            await link.wait(
                lambda: link.heats and link.heats[-1].tokens >= 0.9 * expert_tokens(values),
                "the heat map of all tokens",
            )
        finally:
            await supervisor.stop()
    assert lost == []
    heat = parse_heat(link.heats[-1])
    assert (heat.num_layers, heat.num_ranks, len(heat.load_percent)) == (2, 2, 2 * heat.num_experts)
    assert heat.imbalance is not None and heat.num_copies > 0
    for layer in ("0", "1"):
        assert values[f'wattline_expert_copies{{layer="{layer}"}}'] > 0
        ours = values[f'wattline_expert_imbalance{{layer="{layer}"}}']
        assert 1.0 <= ours <= values[f'wattline_expert_imbalance_without_copies{{layer="{layer}"}}'] <= 2.0
