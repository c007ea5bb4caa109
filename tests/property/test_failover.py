"""Whatever ends the replicas under a stream, and when: it has the tokens of a calm run, and one end."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from hypothesis import given, settings
from hypothesis import strategies as st

from protos import wattline_inference_pb2 as pb
from tests.fake_replica import FakeReplica, Fate, hash_token
from tests.router_fixture import (
    VOCAB_SIZE,
    collect,
    decode,
    make_config,
    make_request,
    run_test_router,
    spell,
)

WAIT_S = 60.0
CONFIG = make_config(router={"failover": {"freeze_s": 0.5, "wait_s": WAIT_S, "per_request": 3}})
ENDS = st.sampled_from([Fate.KILLED, Fate.DRAINED, Fate.DRAINED, Fate.FAILED, Fate.FROZEN])


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[Fate, int, int]]:
    """How up to three replicas end, after how many tokens, and their tokens a step; one death at most."""
    drawn = draw(st.lists(st.tuples(ENDS, st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=3))
    deaths = [index for index, (fate, _, _) in enumerate(drawn) if fate in (Fate.KILLED, Fate.FAILED)]
    return [
        (Fate.DRAINED if index in deaths[1:] else fate, after, per_step)
        for index, (fate, after, per_step) in enumerate(drawn)
    ]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(lives=lives(), num_streams=st.integers(1, 4), max_tokens=st.integers(1, 40))
def test_every_stream_is_whole(lives: list[tuple[Fate, int, int]], num_streams: int, max_tokens: int) -> None:
    asyncio.run(stream_through(lives, num_streams=num_streams, max_tokens=max_tokens))


async def stream_through(lives: list[tuple[Fate, int, int]], *, num_streams: int, max_tokens: int) -> None:
    texts = [f"prompt {index}" for index in range(num_streams)]
    async with asyncio.timeout(WAIT_S), run_test_router(CONFIG) as router, AsyncExitStack() as replicas:

        async def attach(number: int) -> FakeReplica:
            fate, after, per_step = lives[number] if number < len(lives) else (None, 0, 1)
            replica = router.replica(
                replica_id=str(number), tokens_per_step=per_step, fate=fate, fate_after=after, step_s=0.002
            )
            return await replicas.enter_async_context(replica)

        first = await attach(0)
        first.running.clear()
        calls = [router.inference.Generate(make_request(text, max_tokens=max_tokens)) for text in texts]
        await first.wait_command("submit", count=num_streams)
        for number in range(1, len(lives) + 1):
            await attach(number)
        first.running.set()
        answers = await asyncio.gather(*(collect(call) for call in calls))
    for text, answer in zip(texts, answers, strict=True):
        expected = [hash_token(spell(text), pos, vocab_size=VOCAB_SIZE) for pos in range(max_tokens)]
        assert answer.token_ids == expected
        assert answer.text == decode(expected)
        assert answer.deltas[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert answer.final.usage.completion_tokens == max_tokens
        offsets = list(answer.final.resumed_at)
        assert offsets == sorted(offsets) and answer.final.attempts == 1 + len(offsets)
