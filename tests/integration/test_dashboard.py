"""The dashboard of a running router: its files and headers, its events, and numbers equal to /metrics."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from http.client import HTTPConnection
from typing import Any

import pytest

from protos import wattline_cluster_pb2 as cluster_pb
from protos import wattline_link_pb2 as link
from tests.router_fixture import MODEL, TestRouter, collect, make_config, make_request, run_test_router

SECRET = "what the prompt says"
NS = 1_000_000_000


@pytest.fixture
async def router() -> AsyncIterator[TestRouter]:
    config = make_config(model={"slo": {"ttft_ms": 60_000, "tpot_ms": 60_000}})
    async with run_test_router(config) as running:
        yield running


async def get(router: TestRouter, path: str) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body; redirects are not followed."""

    def fetch() -> tuple[int, Mapping[str, str], bytes]:
        connection = HTTPConnection(router.addresses.http, timeout=60)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()

    return await asyncio.to_thread(fetch)


async def read_events(router: TestRouter, count: int) -> list[tuple[str, Any]]:
    """The first events of the stream."""
    host, _, port = router.addresses.http.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 24)
    writer.write(f"GET /dash/events HTTP/1.1\r\nHost: {router.addresses.http}\r\n\r\n".encode())
    events: list[tuple[str, Any]] = []
    name = ""
    try:
        async with asyncio.timeout(60):
            while len(events) < count:
                line = (await reader.readuntil()).decode().rstrip()
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    events.append((name, json.loads(line.removeprefix("data: "))))
    finally:
        writer.close()
    return events


def make_totals(
    *, until_s: int, prefill_mj: int, decode_mj: int, idle_mj: int, host_mj: int = 0
) -> link.LedgerTotals:
    return link.LedgerTotals(
        until_ns=until_s * NS,
        source="fake",
        confidence_factor=1.0,
        meter_mj=prefill_mj + decode_mj + idle_mj,
        prefill_mj=prefill_mj,
        decode_mj=decode_mj,
        idle_mj=idle_mj,
        static_mj=(prefill_mj + decode_mj) // 4,
        host_meter_mj=host_mj,
        host_requests_mj=host_mj // 4,
    )


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/dash", "text/html; charset=utf-8"),
        ("/dash/static/dash.css", "text/css; charset=utf-8"),
        ("/dash/static/icon.svg", "image/svg+xml"),
        ("/dash/static/dash.js", "text/javascript; charset=utf-8"),
        ("/dash/static/uplot-1.6.32.min.js", "text/javascript; charset=utf-8"),
        ("/dash/static/uplot-1.6.32.min.css", "text/css; charset=utf-8"),
        ("/dash/static/uplot-LICENSE.txt", "text/plain; charset=utf-8"),
        ("/dash/snapshot.json", "application/json"),
    ],
)
async def test_files_come_with_their_type_and_a_strict_policy(
    router: TestRouter, path: str, content_type: str
) -> None:
    status, headers, body = await get(router, path)
    assert (status, headers["content-type"]) == (200, content_type)
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert body


async def test_the_root_leads_to_the_dashboard(router: TestRouter) -> None:
    for path in ("/", "/dash/"):
        status, headers, _ = await get(router, path)
        assert (status, headers["location"]) == (307, "/dash")


@pytest.mark.parametrize("name", ["nothing.js", "..%2Froutes.py", "%2e%2e/feed.py", ""])
async def test_no_other_file_can_be_had(router: TestRouter, name: str) -> None:
    status, _, _ = await get(router, f"/dash/static/{name}")
    assert status == 404


async def test_the_page_names_nothing_outside_the_router(router: TestRouter) -> None:
    _, _, page = await get(router, "/dash")
    files = re.findall(r'(?:src|href)="([^"#]+)"', page.decode())
    assert files
    for name in files:
        assert name.startswith("/dash/static/") or name in ("/metrics", "/dash/snapshot.json")
        status, _, _ = await get(router, name)
        assert status == 200


async def test_the_stream_begins_with_history_and_goes_on_with_snapshots(router: TestRouter) -> None:
    events = await read_events(router, 3)
    assert [name for name, _ in events] == ["history", "snapshot", "snapshot"]
    assert [model["name"] for model in events[1][1]["models"]] == [MODEL, "absent"]


async def test_a_page_that_is_closed_frees_its_place(router: TestRouter) -> None:
    for _ in range(40):
        await read_events(router, 1)
    assert await read_events(router, 1)


async def test_an_open_page_does_not_hold_up_the_stop() -> None:
    async with run_test_router() as running:
        reading = asyncio.create_task(read_events(running, 1000))
        await read_events(running, 2)
    with pytest.raises(asyncio.IncompleteReadError):
        await reading


async def test_the_ledger_adds_up_and_requests_are_listed_without_their_text(
    router: TestRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.energy.ledger_book.RATE_AGE_S", 1e9)  # However slow the machine is.
    async with router.replica(host_mj=700) as replica:
        answer = await collect(router.inference.Generate(make_request(SECRET, energy_wait_ms=1000)))
        await replica.report_ledger(make_totals(until_s=1, prefill_mj=100, decode_mj=200, idle_mj=300))
        await replica.report_ledger(
            make_totals(until_s=3, prefill_mj=1100, decode_mj=2200, idle_mj=700, host_mj=9000)
        )
        snapshot = await settled(router, meter_mj=4000)
        status = await router.cluster.Status(cluster_pb.StatusRequest(last_requests=5))
    model = snapshot["models"][0]
    (ledger,) = model["energy"]["ledger"]
    assert ledger == {
        "source": "fake",
        "meter_mj": 4000,
        "prefill_mj": 1100,
        "decode_mj": 2200,
        "idle_mj": 700,
        "unattributed_mj": 0,
        "static_mj": 825,
        "wasted_mj": 0,
        "is_conserved": True,
    }
    assert model["power_w"]["meter_w"] == 1.7
    assert model["host"] == {"power_w": 4.5, "requests_mj": 2250, "rest_mj": 6750, "meter_mj": 9000}
    assert snapshot["models"][1]["host"] is None
    assert model["slo"] == {"ttft_ms": 60_000, "tpot_ms": 60_000, "met": 1, "missed": 0}
    (request,) = snapshot["requests"]
    assert (request["id"], request["trace_id"]) == (answer.final.request_id, answer.final.trace_id)
    assert (request["prompt_tokens"], request["output_tokens"]) == (20, 8)
    assert (request["energy_mj"], request["outcome"], request["is_final"]) == (3000, "length", True)
    assert request["host_mj"] == 700
    assert SECRET not in json.dumps(snapshot)
    assert_same(status, snapshot)
    assert SECRET not in str(status)


async def test_what_happened_to_replicas_is_told_with_its_reason(router: TestRouter) -> None:
    async with router.replica() as replica:
        await router.cluster.DrainReplica(cluster_pb.DrainReplicaRequest(replica_id=replica.replica_id))
        status = await router.cluster.Status(cluster_pb.StatusRequest())
        _, _, body = await get(router, "/dash/snapshot.json")
    snapshot = json.loads(body)
    told = [(event["kind"], event["reason"]) for event in snapshot["events"]]
    assert told == [
        ("draining", "an operator asked for it (DrainReplica)"),
        ("attached", "tp 1, ep 1 on cpu, float32"),
    ]
    assert snapshot["replicas"][0]["last_event"] == snapshot["events"][0]
    assert [(event.kind, event.reason) for event in status.events] == told
    assert status.models[0].replicas[0].last_event.kind == "draining"


async def test_the_heat_of_experts_is_drawn_and_a_map_that_cannot_be_is_not(router: TestRouter) -> None:
    heat = link.ExpertHeat(
        num_layers=2,
        num_experts=2,
        layers_per_row=1,
        experts_per_column=1,
        load_percent=(150, 50, 20, 180),
        copied_cells=(3,),
        tokens=400,
        num_ranks=2,
        num_copies=1,
        imbalance=1.25,
        imbalance_without_copies=1.65,
    )
    async with router.replica() as replica:
        for experts in (heat, link.ExpertHeat(num_layers=9)):
            await replica.send(
                link.FromReplica(heartbeat=link.Heartbeat(load=replica.load()), experts=experts)
            )
        await collect(router.inference.Generate(make_request()))
        status = await router.cluster.Status(cluster_pb.StatusRequest())
        _, _, body = await get(router, "/dash/snapshot.json")
    routed, absent = (model["experts"] for model in json.loads(body)["models"])
    assert absent is None
    assert routed["load_percent"] == [150, 50, 20, 180]
    assert (routed["imbalance"], routed["imbalance_without_copies"]) == (1.25, 1.65)
    assert routed["hottest"] == {"load": 1.8, "layer": 1, "expert": 1}
    assert status.models[0].experts.imbalance == 1.25
    assert not status.models[1].HasField("experts")


def assert_same(status: cluster_pb.StatusResponse, snapshot: dict[str, Any]) -> None:
    """What `wattline top` gets is what the page gets."""
    told, shown = status.models[0], snapshot["models"][0]
    assert (told.slo_met, told.slo_missed) == (shown["slo"]["met"], shown["slo"]["missed"])
    assert (told.ttft.p50_ms, told.tpot.p95_ms) == (shown["ttft_ms"]["p50"], shown["tpot_ms"]["p95"])
    assert told.joules_per_output_token == shown["j_per_output_token"]
    assert told.joules_per_total_token == shown["j_per_total_token"]
    assert told.power.meter_w == shown["power_w"]["meter_w"]
    assert (told.host.meter_mj, told.host.requests_mj) == (
        shown["host"]["meter_mj"],
        shown["host"]["requests_mj"],
    )
    assert told.host.power_w == shown["host"]["power_w"]
    for name in ("meter_mj", "prefill_mj", "decode_mj", "idle_mj", "unattributed_mj", "static_mj"):
        assert getattr(told.ledger[0], name) == shown["energy"]["ledger"][0][name]
    assert [request.request_id for request in status.last_requests] == [
        request["id"] for request in snapshot["requests"]
    ]
    assert status.last_requests[0].energy_mj == snapshot["requests"][0]["energy_mj"]


async def settled(router: TestRouter, *, meter_mj: int) -> dict[str, Any]:
    """The snapshot once the replica's last report is in it."""
    async with asyncio.timeout(60):
        while True:
            _, _, body = await get(router, "/dash/snapshot.json")
            snapshot: dict[str, Any] = json.loads(body)
            ledger = snapshot["models"][0]["energy"]["ledger"]
            if ledger and ledger[0]["meter_mj"] == meter_mj:
                return snapshot
            await asyncio.sleep(0.02)
