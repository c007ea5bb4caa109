"""While a router does not read, what waits for it merges; nothing is lost, and too much is noticed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from replicas.energy.bill import METHOD, RequestJoules
from replicas.energy.meter import Source
from replicas.link.messages import EnergyStatement
from replicas.link.outbox import TOKEN_BYTES, Outbox, Parcel
from replicas.request import FinishReason, SequenceDelta, SequenceTiming, TokenLogprobs
from replicas.step_report import TokenColumns
from replicas.wire.deltas import delta_to_wire

TIMING = SequenceTiming(
    queue_us=1, prefill_us=2, decode_us=3, cached_tokens=0, wasted_tokens=0, preemptions=0
)


def make_delta(
    request_id: int, first_offset: int, token_ids: tuple[int, ...], finish: FinishReason | None = None
) -> SequenceDelta:
    timing = None if finish is None else TIMING
    return SequenceDelta(
        request_id=request_id,
        attempt=1,
        first_offset=first_offset,
        token_ids=token_ids,
        finish=finish,
        timing=timing,
    )


def make_statement(request_id: int, *, prefill_mj: int, final: bool) -> EnergyStatement:
    joules = RequestJoules(
        request_id=request_id,
        prefill_mj=prefill_mj,
        decode_mj=0,
        static_mj=0,
        wasted_mj=0,
        source=Source.FAKE,
        method=METHOD,
        window_ms=30.0,
        confidence_factor=1.0,
        final=final,
    )
    return EnergyStatement(request_id=request_id, attempt=1, joules=joules)


async def test_one_step_is_one_parcel() -> None:
    outbox = Outbox()
    outbox.add_tokens(3, [(1, 1, 0, (7,)), (2, 1, 4, (8,))])
    end = make_delta(3, 4, (8,), FinishReason.LENGTH)
    outbox.add_deltas(3, [end])
    columns = TokenColumns(
        request_ids=[1, 2], attempts=[1, 1], first_offsets=[0, 4], counts=[], token_ids=[7, 8]
    )
    assert await outbox.take() == Parcel(
        step=3, tokens=columns, deltas=(end,), energy=(), draining=None, goodbye=None
    )
    outbox.add_energy([make_statement(1, prefill_mj=90, final=False)])
    assert not (await outbox.take()).tokens


async def test_missed_steps_travel_as_one() -> None:
    outbox = Outbox()
    outbox.add_tokens(1, [(1, 1, 0, (7,)), (2, 1, 0, (1,))])
    outbox.add_tokens(2, [(1, 1, 1, (8, 9))])
    outbox.add_deltas(3, [make_delta(1, 3, (), FinishReason.STOP)])
    parcel = await outbox.take()
    assert parcel.step == 3
    assert list(parcel.tokens.runs()) == [(1, 1, 0, (7, 8, 9)), (2, 1, 0, (1,))]
    assert parcel.deltas == (make_delta(1, 3, (), FinishReason.STOP),)


async def test_a_final_bill_replaces_the_estimate_that_still_waits() -> None:
    outbox = Outbox()
    outbox.add_energy([make_statement(1, prefill_mj=90, final=False)])
    outbox.add_energy([make_statement(1, prefill_mj=100, final=True)])
    assert (await outbox.take()).energy == (make_statement(1, prefill_mj=100, final=True),)


async def test_a_nudge_is_a_parcel_with_nothing_in_it() -> None:
    outbox = Outbox()
    outbox.nudge()
    assert await outbox.take() == Parcel(
        step=0,
        tokens=TokenColumns(request_ids=[], attempts=[], first_offsets=[], counts=[], token_ids=[]),
        deltas=(),
        energy=(),
        draining=None,
        goodbye=None,
    )


async def test_taken_things_are_gone() -> None:
    outbox = Outbox()
    outbox.add_draining("rolling update")
    assert (await outbox.take()).draining == "rolling update"
    outbox.nudge()
    assert (await outbox.take()).draining is None


async def test_too_many_tokens_overflow() -> None:
    outbox = Outbox(max_pending_bytes=3 * TOKEN_BYTES)
    overflow = asyncio.create_task(outbox.overflow())
    outbox.add_tokens(1, [(1, 1, 0, (1, 2, 3))])
    await asyncio.sleep(0)
    assert not overflow.done()
    outbox.add_tokens(2, [(1, 1, 3, (4,))])
    await asyncio.wait_for(overflow, timeout=5.0)


async def test_too_many_logprobs_overflow() -> None:
    """What was estimated is what is sent, within a third."""
    likely = tuple((100_000 + index, -1.5) for index in range(20))
    said = TokenLogprobs(logprob=-0.5, top=likely)
    delta = replace(make_delta(1, 0, (100_000,) * 50), logprobs=(said,) * 50)
    size_bytes = delta_to_wire(delta).ByteSize()
    assert not await has_overflown(Outbox(max_pending_bytes=size_bytes * 4 // 3), delta)
    assert await has_overflown(Outbox(max_pending_bytes=size_bytes * 2 // 3), delta)


async def has_overflown(outbox: Outbox, delta: SequenceDelta) -> bool:
    overflow = asyncio.create_task(outbox.overflow())
    outbox.add_deltas(1, [delta])
    await asyncio.sleep(0)
    has_ended = overflow.done()
    overflow.cancel()
    return has_ended


async def test_too_many_entries_overflow() -> None:
    outbox = Outbox(max_pending_entries=1)
    outbox.add_energy(
        [make_statement(1, prefill_mj=1, final=True), make_statement(2, prefill_mj=1, final=True)]
    )
    await asyncio.wait_for(outbox.overflow(), timeout=5.0)


async def test_logprobs_merge_with_their_tokens() -> None:
    outbox = Outbox()
    said = [TokenLogprobs(logprob=-float(index)) for index in range(4)]
    outbox.add_deltas(1, (replace(make_delta(1, 0, (7,)), logprobs=(said[0],), prompt_logprobs=(said[3],)),))
    outbox.add_deltas(2, (replace(make_delta(1, 1, (8,)), logprobs=(said[1],)),))
    outbox.add_deltas(3, (replace(make_delta(1, 2, (9,), FinishReason.LENGTH), logprobs=(said[2],)),))
    (delta,) = (await outbox.take()).deltas
    assert (delta.token_ids, delta.finish) == ((7, 8, 9), FinishReason.LENGTH)
    assert (delta.logprobs, delta.prompt_logprobs) == (tuple(said[:3]), (said[3],))


async def test_tokens_stay_behind_a_delta_that_waits() -> None:
    outbox = Outbox()
    said = TokenLogprobs(logprob=-1.0)
    outbox.add_deltas(1, (replace(make_delta(1, 0, (7,)), prompt_logprobs=(said,)),))
    outbox.add_tokens(2, [(1, 1, 1, (8,))])
    parcel = await outbox.take()
    assert not parcel.tokens
    assert parcel.deltas == (replace(make_delta(1, 0, (7, 8)), prompt_logprobs=(said,)),)
