"""Replicas that die under callers who know nothing of us: unmodified clients of OpenAI and of Triton.

Cases 1 and 2 for the foreign protocols, and for several choices.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openai
import pytest
from tritonclient.grpc.aio import InferenceServerClient, InferInput

from cluster.router.choices import choice_seed
from replicas.rank.null_runner import null_continuation
from replicas.request import SamplingParams
from tests.crawling_rank import crawl_file
from tests.integration.test_failover_processes import NULL, WAIT_S, running, until
from tests.router_fixture import MODEL, TestRouter, decode, make_config, run_test_router, spell

pytestmark = [pytest.mark.processes, pytest.mark.chaos]

NUM_TOKENS = 300
NUM_CHOICES = 2
SEED = 7
PROMPT = "hello"
SEQUENCES = NUM_CHOICES + 2
"""Of all callers: a completion of two choices, a chat, and a tensor."""


def expected(prompt: str = PROMPT, index: int | None = None) -> str:
    """The text of an undisturbed answer: greedy, or this choice of the seeded ones."""
    seeded = None if index is None else SamplingParams(temperature=1.0, seed=choice_seed(SEED, index))
    return decode(null_continuation(spell(prompt), NUM_TOKENS, NULL, seeded))


async def complete(client: openai.AsyncOpenAI) -> dict[int, str]:
    """The texts of several choices."""
    texts: defaultdict[int, str] = defaultdict(str)
    stream = await client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        n=NUM_CHOICES,
        seed=SEED,
        max_tokens=NUM_TOKENS,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    return dict(texts)


async def chat(client: openai.AsyncOpenAI) -> str:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        max_tokens=NUM_TOKENS,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])


async def infer(address: str) -> str:
    """The pieces of a streamed tensor."""
    sampling = json.dumps({"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True})
    inputs = [
        make_input("text_input", PROMPT.encode(), "BYTES"),
        make_input("sampling_parameters", sampling.encode(), "BYTES"),
        make_input("stream", True, "BOOL"),
    ]

    async def asked() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": MODEL, "inputs": inputs}

    pieces = []
    async with InferenceServerClient(address) as client:
        async for result, error in client.stream_infer(asked()):
            assert error is None
            pieces += [element.decode() for element in result.as_numpy("text_output")]
    return "".join(pieces)


def make_input(name: str, value: object, datatype: str) -> InferInput:
    made = InferInput(name, [1], datatype)
    made.set_data_from_numpy(np.array([value], dtype=np.object_ if datatype == "BYTES" else np.bool_))
    return made


async def test_no_foreign_stream_notices_a_killed_replica() -> None:
    """Promise: every choice goes on by itself, with all its tokens, and clients see no error."""
    config = make_config(router={"failover": {"wait_s": WAIT_S}})
    async with asyncio.timeout(WAIT_S), run_test_router(config) as router, AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="wl-")))
        old = await stack.enter_async_context(running(folder, router, "one"))
        client = await stack.enter_async_context(make_client(router))
        crawl_file(folder).touch()
        asking = asyncio.gather(complete(client), chat(client), infer(router.addresses.grpc))
        await until(router, lambda found: sum(found[0].load.running) == SEQUENCES)
        os.kill(old.processes[0].pid, signal.SIGKILL)
        crawl_file(folder).unlink()
        await stack.enter_async_context(running(folder, router, "two"))
        completed, chatted, inferred = await asking
    assert completed == {index: expected(index=index) for index in range(NUM_CHOICES)}
    assert chatted == expected(f"<user>{PROMPT}\n<assistant>")
    assert inferred == expected()


def make_client(router: TestRouter) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"http://{router.addresses.http}/v1",
        api_key="none",
        max_retries=0,
        timeout=WAIT_S,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    )
