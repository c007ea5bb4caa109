"""The dashboard's feed: bounded history, bounded listeners, the newest snapshot for those who fall behind."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.dashboard.feed import MAX_LISTENERS, DashboardFeed, TooManyListeners, to_event
from cluster.dashboard.history import MAX_REPLICA_LINES, SERIES, History, point_of

NO_LATENCY = {"p50": None, "p95": None}


def make_snapshot(**model: Any) -> dict[str, Any]:
    one = {
        "name": "m",
        "replicas": {"ready": 1, "min": 2, "max": 2},
        "output_tokens_per_s": 12.3456789,
        "ttft_ms": {"p50": 20.0, "p95": 40.0},
        "tpot_ms": NO_LATENCY,
        "j_per_output_token": None,
        "j_per_total_token": None,
        "running": 3,
        "waiting": 0,
        "kv_used_ratio": 0.25,
        "slo": {"met": 2, "missed": 1},
        "experts": None,
        "power_w": {"meter_w": 100.0, "prefill_w": 30.0, "decode_w": 50.0, "idle_w": 20.0},
        "host": {"power_w": 42.0},
        **model,
    }
    return {"models": [one], "replicas": [], "events": [], "requests": []}


def test_a_point_holds_a_number_for_every_series() -> None:
    point = point_of(make_snapshot(), unix_s=1000.0)
    row = dict(zip(SERIES, point["models"]["m"], strict=True))
    assert (row["output_tokens_per_s"], row["ttft_p95_ms"], row["running"]) == (12.3457, 40.0, 3)
    assert (row["tpot_p50_ms"], row["unattributed_w"], row["meter_w"]) == (None, None, 100.0)
    assert row["host_w"] == 42.0
    assert (row["replicas_ready"], row["replicas_wanted"]) == (1, 2)
    assert point["t"] == 1000.0


def test_unknown_power_is_no_number() -> None:
    unmetered = make_snapshot(power_w=None, host=None)
    row = dict(zip(SERIES, point_of(unmetered, unix_s=0.0)["models"]["m"], strict=True))
    assert (row["meter_w"], row["idle_w"], row["host_w"]) == (None, None, None)


def test_only_the_replicas_that_draw_most_have_a_line() -> None:
    snapshot = make_snapshot()
    snapshot["replicas"] = [{"id": f"r{watts}", "power_w": float(watts) or None} for watts in range(40)]
    lines = point_of(snapshot, unix_s=0.0)["replicas_w"]
    assert len(lines) == MAX_REPLICA_LINES
    assert next(iter(lines.items())) == ("r39", 39.0)


def test_the_history_is_bounded() -> None:
    history = History(capacity=3)
    for second in range(5):
        history.add({"t": second})
    assert [point["t"] for point in history.points()] == [2, 3, 4]


def make_feed() -> DashboardFeed:
    return DashboardFeed(read=make_snapshot, router_id="router-1", version="1")


def parse(text: str) -> tuple[str, Any]:
    name, data, *rest = text.split("\n")
    assert rest == ["", ""]
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def test_a_listener_gets_the_past_then_the_present() -> None:
    feed = make_feed()
    for _ in range(3):
        feed.tick()
    events = feed.events(feed.join())
    assert await anext(events) == "retry: 1000\n\n"
    name, history = parse(await anext(events))
    assert (name, len(history["points"]), history["series"]) == ("history", 3, list(SERIES))
    name, snapshot = parse(await anext(events))
    assert (name, snapshot["router"]["id"], snapshot["models"][0]["name"]) == ("snapshot", "router-1", "m")


async def test_a_slow_listener_gets_the_newest_snapshot_only() -> None:
    feed = make_feed()
    listener = feed.join()
    feed.tick()
    feed.tick()
    assert listener.qsize() == 1
    feed.close()
    assert await listener.get() is None


def test_listeners_are_bounded_and_places_come_free() -> None:
    feed = make_feed()
    listeners = [feed.join() for _ in range(MAX_LISTENERS)]
    with pytest.raises(TooManyListeners):
        feed.join()
    feed.leave(listeners[0])
    feed.join()
    assert feed.num_listeners == MAX_LISTENERS


def test_an_event_is_one_line_of_strict_json() -> None:
    assert to_event("a", {"x": "1\n2"}) == 'event: a\ndata: {"x":"1\\n2"}\n\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_event("a", float("nan"))
