"""One trace id, all the way: client, router, link, supervisor, rank 0 and its steps, none of them faked."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

import pytest

from cluster.config import Config
from protos import wattline_cluster_pb2 as cluster_pb
from replicas.config import EngineLimits, NullEngineConfig, ParallelConfig, ReplicaConfig
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import Supervisor
from tests.collector import Collector, attributes, run_collector
from tests.router_fixture import (
    MODEL,
    VOCAB_SIZE,
    TestRouter,
    collect,
    fail,
    make_config,
    make_request,
    run_test_router,
    spell,
)

pytestmark = pytest.mark.processes

WAIT_S = 150.0
TRACE_ID, LAST_TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "00f067aa0ba902b7"
CHUNK_TOKENS = 32
PROMPT = "x" * 80
NUM_TOKENS = 20
POISON = "!"
"""The engine fails in the step that is given it."""


def make_router_config(endpoint: str) -> Config:
    """No replica counts as frozen, however busy the machine is."""
    return make_config(telemetry={"otlp_endpoint": endpoint}, router={"failover": {"freeze_s": WAIT_S}})


def make_replica(folder: Path, router: TestRouter) -> ReplicaConfig:
    (poison,) = spell(POISON)
    (folder / "shm").mkdir()
    return ReplicaConfig(
        model=MODEL,
        source="null",
        replica_id="real",
        routers=(router.addresses.link,),
        # One rank: of two, the other might be the first to fail, and rank 0 be killed before its last words.
        parallel=ParallelConfig(),
        limits=EngineLimits(max_sequences=8, max_waiting=16, num_blocks=256, step_tokens=CHUNK_TOKENS),
        null=NullEngineConfig(
            step_ms=1.0, vocab_size=VOCAB_SIZE, context_tokens=512, fail_at_token=poison, eos_every=0
        ),
        runtime_dir=str(folder / "run"),
        shared_dir=str(folder / "shm"),
        drain_s=25.0,
        ready_timeout_s=WAIT_S,
        stall_floor_s=WAIT_S,
    )


@asynccontextmanager
async def running(folder: Path, router: TestRouter) -> AsyncIterator[asyncio.Event]:
    """A replica in a process of its own, attached. The event: it lost its rank."""
    lost = asyncio.Event()
    config = make_replica(folder, router)
    ranks = SubprocessRankGroup(runtime_dir=Path(config.runtime_dir))
    supervisor = Supervisor(config, ranks, lambda _: lost.set(), first_link_timeout_s=WAIT_S)
    try:
        await supervisor.start()
        yield lost
    finally:
        await supervisor.stop()


def call(router: TestRouter, prompt: str, trace_id: str) -> Any:
    """Of a client that has a trace."""
    request = make_request(prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
    metadata = (("traceparent", f"00-{trace_id}-{PARENT_ID}-01"),)
    return router.inference.Generate(request, metadata=metadata)


async def test_a_clients_trace_leads_to_the_steps_and_the_log_of_a_step_back_to_the_trace(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with TemporaryDirectory(prefix="wl-") as name:
        folder = Path(name)
        async with asyncio.timeout(WAIT_S), run_collector() as (collector, endpoint):
            async with (
                run_test_router(make_router_config(endpoint)) as router,
                running(folder, router) as lost,
            ):
                await collect(call(router, PROMPT, TRACE_ID))
                page = await read_metrics(router)
                await fail(call(router, POISON, LAST_TRACE_ID))
                await lost.wait()
            last_step = check_spans(collector)
        (rank_log,) = (path.read_text() for path in folder.glob("run/*rank0.log"))
    assert set(re.findall(r'wattline_step_seconds_bucket.*# \{trace_id="(\w+)"\}', page)) == {TRACE_ID}
    assert f"step_failed step={last_step + 1} sequences=1 traces={LAST_TRACE_ID}\n" in rank_log
    (told,) = [text for text in caplog.messages if text.startswith("group_lost")]
    assert told.endswith(f" traces={LAST_TRACE_ID}")


async def read_metrics(router: TestRouter) -> str:
    """The page of the only replica, found as an operator finds it."""
    (replica,) = (await router.cluster.Status(cluster_pb.StatusRequest())).models[0].replicas
    url, accept = f"http://{replica.hello.metrics_address}/metrics", "application/openmetrics-text"

    def fetch() -> str:
        with urlopen(Request(url, headers={"Accept": accept}), timeout=60) as answer:
            return str(answer.read(), "utf-8")

    return await asyncio.to_thread(fetch)


def check_spans(collector: Collector) -> int:
    """One trace, from the caller's span down to the steps. Returns the last step."""
    spans = [span for span in collector.spans if span.trace_id.hex() == TRACE_ID]
    by_name = {span.name: span for span in spans}
    rpc, inference = by_name["wattline.v1.Inference/Generate"], by_name[f"text_completion {MODEL}"]
    prefill, decode = by_name["prefill"], by_name["decode"]
    assert (rpc.parent_span_id.hex(), inference.parent_span_id) == (PARENT_ID, rpc.span_id)
    assert prefill.parent_span_id == decode.parent_span_id == inference.span_id
    assert attributes(inference)["wattline.replica.id"] == "real"
    chunks = -(-len(PROMPT) // CHUNK_TOKENS)
    assert attributes(prefill)["wattline.step.count"] == chunks
    assert attributes(decode)["wattline.step.count"] == NUM_TOKENS - 1
    whole = attributes(inference)
    first, last = int(whole["wattline.step.first"]), int(whole["wattline.step.last"])
    # It was alone: in every step from its first to its last.
    assert last - first + 1 == whole["wattline.step.count"] == chunks + NUM_TOKENS - 1
    (gap,) = decode.events
    assert first + chunks <= attributes(gap)["wattline.token_gap.step"] <= last
    assert decode.start_time_unix_nano < gap.time_unix_nano <= decode.end_time_unix_nano
    return last
