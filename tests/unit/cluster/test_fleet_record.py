"""What happened to replicas: an event per change of standing, with its reason, in a bounded record."""

from __future__ import annotations

from cluster.link.fleet_record import LAST_EVENTS, MAX_REASON_CHARS, FleetRecord, Stand, Standing


def make_record() -> FleetRecord:
    return FleetRecord(clock_s=lambda: 7.0, wall_s=lambda: 1000.0)


def see(record: FleetRecord, stand: Stand, reason: str = "", *, epoch: int = 1) -> None:
    record.observe(model="m", replica_id="r", epoch=epoch, standing=Standing(stand=stand, reason=reason))


def attach(record: FleetRecord, *, epoch: int = 1) -> None:
    record.attach(model="m", replica_id="r", epoch=epoch, what="tp 2, ep 1")


def told(record: FleetRecord) -> list[tuple[str, str]]:
    """Kind and reason, oldest first."""
    return [(event.kind, event.reason) for event in reversed(record.events)]


def test_each_change_is_told_once_with_its_reason() -> None:
    record = make_record()
    attach(record)
    see(record, Stand.READY)
    see(record, Stand.FROZEN, "silent for 2.0 s with 3 in flight")
    see(record, Stand.FROZEN, "silent for 2.1 s with 3 in flight")
    see(record, Stand.READY)
    see(record, Stand.DRAINING, "the replica is being replaced")
    last = record.last_of("r")
    assert last is not None and (last.kind, last.at_s, last.at_unix_s) == ("draining", 7.0, 1000.0)
    see(record, Stand.DRAINED, "the replica is being replaced")
    assert record.last_of("r") is None
    assert told(record) == [
        ("attached", "tp 2, ep 1"),
        ("frozen", "silent for 2.0 s with 3 in flight"),
        ("recovered", "it was frozen and speaks again"),
        ("draining", "the replica is being replaced"),
        ("drained", "the replica is being replaced"),
    ]


def test_silence_counts_at_the_second_look() -> None:
    record = make_record()
    attach(record)
    for stand in (Stand.SILENT, Stand.READY, Stand.SILENT, Stand.SILENT, Stand.READY):
        see(record, stand)
    assert [kind for kind, _ in told(record)] == ["attached", "silent", "recovered"]


def test_silence_again_and_again_does_not_push_out_what_matters() -> None:
    record = make_record()
    attach(record)
    see(record, Stand.FROZEN, "silent for 2.0 s with 3 in flight")
    see(record, Stand.READY)
    for _ in range(LAST_EVENTS):
        for stand in (Stand.SILENT, Stand.SILENT, Stand.READY):
            see(record, stand, "nothing heard for 2 s")
    assert told(record) == [
        ("attached", "tp 2, ep 1"),
        ("frozen", "silent for 2.0 s with 3 in flight"),
        ("recovered", "it was frozen and speaks again"),
        ("silent", f"nothing heard for 2 s ({LAST_EVENTS} times since it attached)"),
        ("recovered", "it was silent and speaks again"),
    ]


def test_one_that_comes_back_is_told_apart_from_a_new_group() -> None:
    record = make_record()
    for epoch in (1, 1, 2):
        attach(record, epoch=epoch)
        see(record, Stand.LOST, "its link ended without a word", epoch=epoch)
    assert [reason for kind, reason in told(record) if kind == "attached"] == [
        "tp 2, ep 1",
        "its link is back; the group went on",
        "a new group: tp 2, ep 1",
    ]


def test_the_record_is_bounded_and_so_is_a_reason() -> None:
    record = make_record()
    for _ in range(LAST_EVENTS):
        attach(record)
        see(record, Stand.LOST, "x" * 1000)
    assert len(record.events) == LAST_EVENTS
    assert record.events[0].reason == "x" * MAX_REASON_CHARS
