"""A real Prometheus scrapes a router and a replica by the files that `wattline monitoring` writes.

Every panel of the dashboard has a series while there is load. Skipped where Prometheus is not installed.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cluster.monitoring.grafana import build_dashboard
from cluster.monitoring.panels import EXPERTS, ROWS
from cluster.monitoring.write import write_all
from protos import wattline_inference_pb2 as pb
from replicas.config import EngineLimits, MetricsAccess, NullEngineConfig, ReplicaConfig
from replicas.energy.agent import EnergyAgent
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import Supervisor
from tests.router_fixture import MODEL, VOCAB_SIZE, TestRouter, collect, make_config, run_test_router

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed"),
]

WAIT_S = 150.0
SCRAPE_S = 0.2
LISTENS = re.compile(r'msg="Listening on".*address=(127\.0\.0\.1:[1-9]\d*)')
"""What Prometheus says of the free port that it took."""
NULL = NullEngineConfig(step_ms=2.0, vocab_size=VOCAB_SIZE, context_tokens=512)


@asynccontextmanager
async def running_prometheus(folder: Path) -> AsyncIterator[str]:
    """Its address; its files and its log are in `folder`."""
    log_path = folder / "prometheus.log"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        async with asyncio.timeout(WAIT_S):
            while not (found := LISTENS.search(log_path.read_text())):
                assert process.returncode is None, log_path.read_text()
                await asyncio.sleep(0.05)
        yield found[1]
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


def ask(address: str, path: str, **parameters: str) -> Any:
    """One answer of Prometheus' API; None while it starts."""
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            return json.load(answer)["data"]
    except OSError:
        return None


def panel_queries(*, has_experts: bool) -> dict[str, str]:
    """The expressions of the dashboard with their variables filled in, by panel and letter: of the row that
    only a model with experts fills, or of all others."""
    panels: Any = build_dashboard()["panels"]
    names = {panel.title for panel in ROWS[EXPERTS]}
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        .replace("$__rate_interval", "10s")
        .replace("$__range", "1m")
        .replace("$model", ".+")
        for panel in panels
        for target in panel.get("targets", ())
        if (panel["title"] in names) is has_experts
    }


async def ask_for_text(router: TestRouter) -> None:
    request = pb.GenerateRequest(
        model=MODEL, tokens=pb.TokenIds(ids=range(10, 50)), limits=pb.Limits(max_tokens=20, ignore_eos=True)
    )
    while True:
        await collect(router.inference.Generate(request))


ENERGY_QUERIES = {
    "what the alert WattlineMeterStale reads": 'wattline_meter_state{job="wattline-agent",state="stale"}',
    "joules by tenant": 'wattline_energy_joules_total{ledger="request",tenant="default"} > 0',
    "the rows that add up to the meter": (
        "abs(sum by (model, source) (wattline_energy_joules_total) "
        "- on (model, source) wattline_energy_meter_joules_total) < 1e-6"
    ),
    "joules of the meter": 'hw_energy_joules_total{job="wattline-agent",source="fake"}',
    "the agent's own cost": 'rate(wattline_energy_agent_cpu_seconds_total{job="wattline-agent"}[10s])',
}


async def without_a_series(prometheus: str, queries: Mapping[str, str]) -> dict[str, str]:
    """The queries that stay empty, however long one waits."""
    missing = dict(queries)
    with suppress(TimeoutError):
        async with asyncio.timeout(WAIT_S):
            while missing:
                await asyncio.sleep(SCRAPE_S)
                for panel, query in list(missing.items()):
                    found = await asyncio.to_thread(ask, prometheus, "query", query=query)
                    if found and found["result"]:
                        del missing[panel]
    return missing


@asynccontextmanager
async def running_agent(folder: Path) -> AsyncIterator[str]:
    """An energy agent that shows its metrics on a free port, on a host whose CPU package draws 2 W."""
    powercap = folder / "powercap"
    package = powercap / "intel-rapl:0"
    package.mkdir(parents=True)
    for name, text in (("name", "package-0"), ("max_energy_range_uj", "262143328850"), ("energy_uj", "0")):
        (package / name).write_text(text)
    agent = EnergyAgent(powercap_dir=powercap)
    agent.serve_metrics(MetricsAccess())
    (address,) = await agent.start(f"unix:{folder}/energy.sock")
    drawing = asyncio.create_task(draw(package / "energy_uj"))
    try:
        yield address
    finally:
        drawing.cancel()
        await agent.stop()


async def draw(counter: Path) -> None:
    """Microjoules that never become fewer digits: the agent may read at any time."""
    with counter.open("r+") as file:
        for tenths in count(1):
            file.seek(0)
            file.write(f"{200_000 * tenths}")
            file.flush()
            await asyncio.sleep(0.1)


async def test_every_panel_has_a_series_under_load(tmp_path: Path) -> None:
    """And the energy agent of the replica's host is scraped, so that the alert on its meter can fire."""
    config = make_config(model={"slo": {"ttft_ms": 500.0}})
    async with run_test_router(config) as router, running_agent(tmp_path) as energy_agent:
        supervisor = Supervisor(
            ReplicaConfig(
                model=MODEL,
                source="null",
                replica_id="one",
                routers=(router.addresses.link,),
                limits=EngineLimits(num_blocks=256),
                null=NULL,
                runtime_dir=str(tmp_path),
                energy_agent=energy_agent,
                meter="fake",
                stall_floor_s=WAIT_S,
            ),
            SubprocessRankGroup(runtime_dir=tmp_path),
            lambda _: None,
            first_link_timeout_s=WAIT_S,
        )
        try:
            await supervisor.start()
            write_all(tmp_path, routers=(router.addresses.http,), scrape_s=SCRAPE_S)
            async with running_prometheus(tmp_path) as prometheus:
                load = asyncio.create_task(ask_for_text(router))
                missing = await without_a_series(
                    prometheus, {**panel_queries(has_experts=False), **ENERGY_QUERIES}
                )
                load.cancel()
                await asyncio.gather(load, return_exceptions=True)
                for panel, query in panel_queries(has_experts=True).items():
                    found = await asyncio.to_thread(ask, prometheus, "query", query=query)
                    assert found is not None and found["result"] == [], f"{panel} is no PromQL: {query}"
                targets = await asyncio.to_thread(ask, prometheus, "targets")
        finally:
            await supervisor.stop()
    assert not missing
    up = {target["labels"]["job"]: target["labels"] for target in targets["activeTargets"]}
    assert up["wattline-replica"]["replica"] == "one"
    assert up["wattline-replica"]["model"] == MODEL
    assert set(up) == {"wattline-router", "wattline-replica", "wattline-agent"}


def test_the_rules_are_right_by_their_own_tests(tmp_path: Path) -> None:
    write_all(tmp_path, routers=("127.0.0.1:8100",))
    for command in (("check", "config", "prometheus.yml"), ("test", "rules", "rules_test.yaml")):
        done = subprocess.run(
            ["promtool", *command], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
