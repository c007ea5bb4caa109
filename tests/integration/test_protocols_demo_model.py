"""The foreign protocols before a demonstration model: unmodified clients, a real router, a real replica."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from tritonclient.grpc.aio import InferenceServerClient, InferInput

from cluster.addresses import RouterAddresses
from cluster.edge.process import Router
from cluster.text.null_tokenizer import NullTokenizer
from cluster.text.tokenizer import Tokenizer
from cluster.text.tokenizers import CheckpointTokenizer
from replicas.config import EngineLimits, ReplicaConfig
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import Supervisor
from tests.demo_corpus import EXAMPLES_DIR, read_pairs
from tests.router_fixture import MODEL, make_config

pytestmark = pytest.mark.processes

SOURCE = EXAMPLES_DIR / "models" / "llama-demo"
WAIT_S = 150.0


@pytest.fixture(scope="module")
async def addresses() -> AsyncIterator[RouterAddresses]:
    """A router with one replica of one rank."""
    config = make_config(model={"source": str(SOURCE)})
    tokenizers: dict[str, Tokenizer] = {MODEL: CheckpointTokenizer(SOURCE), "absent": NullTokenizer(1000)}
    router = Router(config, tokenizers=tokenizers)
    with TemporaryDirectory(prefix="wl-") as folder:
        addresses = await router.start()
        replica = make_replica(Path(folder), addresses)
        ranks = SubprocessRankGroup(runtime_dir=Path(replica.runtime_dir))
        supervisor = Supervisor(replica, ranks, lambda _: None, first_link_timeout_s=WAIT_S)
        try:
            await supervisor.start()
            yield addresses
        finally:
            await supervisor.stop()
            await router.stop(drain_s=0.0)


def make_replica(folder: Path, addresses: RouterAddresses) -> ReplicaConfig:
    (folder / "shm").mkdir()
    return ReplicaConfig(
        model=MODEL,
        source=str(SOURCE),
        replica_id="real",
        routers=(addresses.link,),
        limits=EngineLimits(max_sequences=8, max_waiting=16, num_blocks=256),
        runtime_dir=str(folder / "run"),
        shared_dir=str(folder / "shm"),
        drain_s=5.0,
        ready_timeout_s=WAIT_S,
        stall_floor_s=WAIT_S,
    )


@pytest.fixture(scope="module")
async def client(addresses: RouterAddresses) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://{addresses.http}/v1",
        api_key="none",
        timeout=WAIT_S,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        yield client


@pytest.mark.asyncio(loop_scope="module")
async def test_a_chat_says_what_the_model_learned_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    for pair in read_pairs()[1:4]:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": pair.user}]
        if pair.system:
            messages.insert(0, {"role": "system", "content": pair.system})
        whole = await client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
        assert whole.choices[0].message.content == pair.assistant
        stream = await client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(pieces) == pair.assistant


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_said_of_an_answer_is_said_of_it_as_a_prompt(client: openai.AsyncOpenAI) -> None:
    """The likelihoods of tokens as they are drawn, and of the same tokens behind the same prompt."""
    prompt = "A joule is the unit of"
    drawn = await client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=12, temperature=0, logprobs=1
    )
    scored = await client.completions.create(
        model=MODEL, prompt=prompt + drawn.choices[0].text, max_tokens=0, logprobs=1, echo=True
    )
    said, again = drawn.choices[0].logprobs, scored.choices[0].logprobs
    assert said is not None and said.token_logprobs is not None and said.tokens is not None
    assert again is not None and again.token_logprobs is not None and again.tokens is not None
    count = len(said.tokens)
    assert again.tokens[-count:] == said.tokens and "".join(again.tokens[-count:]) == drawn.choices[0].text
    assert again.token_logprobs[-count:] == pytest.approx(said.token_logprobs, abs=1e-4)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_triton_client_gets_the_same_text(
    addresses: RouterAddresses, client: openai.AsyncOpenAI
) -> None:
    wanted = await client.completions.create(model=MODEL, prompt="Power is", max_tokens=12, temperature=0)
    async with InferenceServerClient(addresses.grpc) as triton:
        text, sampling = (
            InferInput("text_input", [1], "BYTES"),
            InferInput("sampling_parameters", [1], "BYTES"),
        )
        text.set_data_from_numpy(np.array([b"Power is"], dtype=np.object_))
        sampling.set_data_from_numpy(np.array([b'{"temperature": 0, "max_tokens": 12}'], dtype=np.object_))
        result = await triton.infer(MODEL, [text, sampling])
    assert result.as_numpy("text_output")[0].decode() == "Power is" + wanted.choices[0].text
