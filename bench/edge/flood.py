"""Many streams at once against one system, watched for a window once all of them flow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc
import psutil

from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as pb_grpc

STREAMS_PER_CHANNEL = 64
START_TIMEOUT_S = 60.0
SETTLE_S = 0.5
CALM_CORES = 0.1
CALM_TIMEOUT_S = 60.0
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flood:
    """`streams` answers of `output_tokens` each, started again as they end, over `addresses` in turn."""

    addresses: tuple[str, ...]
    model: str
    streams: int
    output_tokens: int
    window_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What came in the window: tokens by stream, messages of all, CPU seconds by role."""

    tokens: tuple[int, ...]
    num_messages: int
    window_s: float
    cpu_s: Mapping[str, float]

    @property
    def tok_s(self) -> float:
        return sum(self.tokens) / self.window_s

    def row(self) -> dict[str, object]:
        """`progress_ratio` is of the fastest stream to the slowest; None: one had no token in the window."""
        total, least = sum(self.tokens), min(self.tokens)
        return {
            "streams": len(self.tokens),
            "tok_s": round(self.tok_s, 1),
            "tokens_per_message": round(total / max(1, self.num_messages), 2),
            "progress_ratio": round(max(self.tokens) / least, 2) if least else None,
            "starved_streams": sum(count == 0 for count in self.tokens),
            "cpu_us_per_token": {
                role: round(spent_s * 1e6 / max(1, total), 2) for role, spent_s in self.cpu_s.items()
            },
        }


class Counts:
    """What the streams of a flood have got so far; they add to it."""

    def __init__(self, streams: int) -> None:
        self.tokens = [0] * streams
        self.num_messages = 0


async def watch_flood(flood: Flood, pids: Mapping[str, int]) -> Watched:
    """Raises TimeoutError when a stream has no token after `START_TIMEOUT_S`, RpcError when one fails."""
    counts = Counts(flood.streams)
    async with flowing(flood, counts):
        return await _watch(counts, flood.window_s, pids)


async def _watch(counts: Counts, window_s: float, pids: Mapping[str, int]) -> Watched:
    await asyncio.sleep(SETTLE_S)
    before, messages, cpu_s = list(counts.tokens), counts.num_messages, cpu_by_role(pids)
    since_s = time.perf_counter()
    await asyncio.sleep(window_s)
    spent_s = time.perf_counter() - since_s
    after_s = cpu_by_role(pids)
    return Watched(
        tokens=tuple(now - then for now, then in zip(counts.tokens, before, strict=True)),
        num_messages=counts.num_messages - messages,
        window_s=spent_s,
        cpu_s={role: after_s[role] - cpu_s[role] for role in pids},
    )


@asynccontextmanager
async def flowing(flood: Flood, counts: Counts) -> AsyncIterator[None]:
    """The streams run inside the block, which begins when each has had a token."""
    async with AsyncExitStack() as stack:
        stubs = await _open(flood.addresses, flood.streams, stack)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_stream(stubs[index % len(stubs)], flood, index, counts))
                for index in range(flood.streams)
            ]
            async with asyncio.timeout(START_TIMEOUT_S):
                while not all(counts.tokens):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            yield
            for task in tasks:
                task.cancel()


async def _open(
    addresses: Sequence[str], streams: int, stack: AsyncExitStack
) -> list[pb_grpc.InferenceAsyncStub]:
    """As many connections to each address, one after another."""
    each = -(-streams // (STREAMS_PER_CHANNEL * len(addresses)))
    return [
        pb_grpc.InferenceStub(
            await stack.enter_async_context(grpc.aio.insecure_channel(address, options=OWN_CONNECTION))
        )
        for _ in range(each)
        for address in addresses
    ]


async def _stream(stub: pb_grpc.InferenceAsyncStub, flood: Flood, index: int, counts: Counts) -> None:
    request = make_request(flood, index)
    while True:
        async for response in stub.Generate(request):
            counts.tokens[index] += len(response.delta.token_ids)
            counts.num_messages += 1


def make_request(flood: Flood, index: int) -> pb.GenerateRequest:
    """A short prompt of its own for each stream. Joules are not waited for: nothing meters a null engine."""
    return pb.GenerateRequest(
        model=flood.model,
        tokens=pb.TokenIds(ids=[3 + index % 256, 3 + index // 256, 5, 6]),
        sampling=pb.Sampling(temperature=0.0),
        limits=pb.Limits(max_tokens=flood.output_tokens, ignore_eos=True),
        energy_wait_ms=0,
    )


async def until_calm(pids: Mapping[str, int]) -> None:
    """Return when these processes rest, or after a minute.

    A system may work off what it queued for long after its callers have left, at the cost of the next one.
    """
    give_up_s = time.monotonic() + CALM_TIMEOUT_S
    used_s = sum(cpu_by_role(pids).values())
    while time.monotonic() < give_up_s:
        await asyncio.sleep(SETTLE_S)
        before_s, used_s = used_s, sum(cpu_by_role(pids).values())
        if used_s - before_s < CALM_CORES * SETTLE_S:
            break


def cpu_by_role(pids: Mapping[str, int]) -> dict[str, float]:
    """CPU seconds so far of each process."""
    found = {}
    for role, pid in pids.items():
        times = psutil.Process(pid).cpu_times()
        found[role] = float(times.user + times.system)
    return found
