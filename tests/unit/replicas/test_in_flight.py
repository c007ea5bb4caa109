"""Requests find their way back to the link they came from, and to no other."""

from __future__ import annotations

from replicas.supervisor.in_flight import MAX_UNBILLED, PROOF_TOKENS, InFlight


def test_two_routers_may_use_the_same_number() -> None:
    flights: InFlight[str] = InFlight()
    a = flights.open("a", request_id=1, attempt=1)
    b = flights.open("b", request_id=1, attempt=1)
    assert a.engine_id != b.engine_id
    assert flights.listener(a.engine_id) is a
    assert flights.find("b", 1) is b
    assert len(flights) == 2


def test_a_muted_request_is_heard_no_more_but_stays_in_the_engine() -> None:
    flights: InFlight[str] = InFlight()
    flight = flights.open("a", request_id=1, attempt=1)
    flights.mute(flight)
    assert flights.listener(flight.engine_id) is None
    assert flights.find("a", 1) is None
    assert len(flights) == 1


def test_a_new_attempt_takes_the_number_of_a_muted_one() -> None:
    flights: InFlight[str] = InFlight()
    first = flights.open("a", request_id=1, attempt=1)
    flights.mute(first)
    second = flights.open("a", request_id=1, attempt=2)
    flights.land(first.engine_id)
    assert flights.listener(second.engine_id) is second
    assert flights.settle(first.engine_id) is first


def test_stop_counts_once() -> None:
    flights: InFlight[str] = InFlight()
    flight = flights.open("a", request_id=1, attempt=1)
    assert flights.stop("a", 1) is flight
    assert flights.stop("a", 1) is None
    assert flights.stop("a", 2) is None


def test_a_landed_request_waits_for_its_energy_once() -> None:
    flights: InFlight[str] = InFlight()
    flight = flights.open("a", request_id=1, attempt=1)
    flights.land(flight.engine_id)
    flights.land(flight.engine_id)
    assert (len(flights), flights.num_unbilled) == (0, 1)
    assert flights.settle(flight.engine_id) is flight
    assert flights.settle(flight.engine_id) is None


def test_a_lost_link_orphans_its_own_requests_alone() -> None:
    flights: InFlight[str] = InFlight()
    live = flights.open("a", request_id=1, attempt=1)
    landed = flights.open("a", request_id=2, attempt=1)
    other = flights.open("b", request_id=1, attempt=1)
    flights.land(landed.engine_id)
    assert flights.drop_link("a") == (live.engine_id,)
    assert flights.settle(landed.engine_id) is None
    assert flights.listener(live.engine_id) is None
    assert flights.listener(other.engine_id) is other


def test_unbilled_requests_are_bounded() -> None:
    flights: InFlight[str] = InFlight()
    for request_id in range(MAX_UNBILLED + 1):
        flights.land(flights.open("a", request_id=request_id, attempt=1).engine_id)
    assert flights.num_unbilled == MAX_UNBILLED
    assert flights.settle(1) is None


def test_what_another_replica_had_is_unproven_until_it_gave_a_few_tokens_or_is_gone() -> None:
    flights: InFlight[str] = InFlight()
    moved = [flights.open(link, request_id=1, attempt=1, is_moved=True) for link in ("a", "b", "c")]
    new = flights.open("a", request_id=2, attempt=0)
    assert flights.num_unproven == 3
    flights.note_tokens(new.engine_id, PROOF_TOKENS)
    flights.note_tokens(moved[0].engine_id, PROOF_TOKENS - 1)
    assert flights.num_unproven == 3
    flights.note_tokens(moved[0].engine_id, 1)
    flights.land(moved[1].engine_id)
    flights.drop_link("c")
    assert flights.num_unproven == 0


def test_a_request_is_known_by_its_trace_while_the_engine_holds_it() -> None:
    flights: InFlight[str] = InFlight()
    flight = flights.open("a", request_id=1, attempt=1, trace_id="t")
    flights.mute(flight)
    assert flights.trace_of(flight.engine_id) == "t"
    flights.land(flight.engine_id)
    assert flights.trace_of(flight.engine_id) == ""
