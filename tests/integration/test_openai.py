"""The router's OpenAI protocol, spoken by the unmodified `openai` client and by plain HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest

from cluster.router.choices import choice_seed
from protos import wattline_link_pb2 as link
from tests.fake_replica import MJ_PER_TOKEN, EnergyMode, Fate, hash_token
from tests.router_fixture import (
    MODEL,
    VOCAB_SIZE,
    TestRouter,
    decode,
    make_config,
    run_test_router,
    script,
    spell,
)

WAIT_S = 150.0


@pytest.fixture
async def router() -> AsyncIterator[TestRouter]:
    async with run_test_router() as running:
        yield running


@pytest.fixture
async def client(router: TestRouter) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://{router.addresses.http}/v1",
        api_key="none",
        max_retries=0,
        timeout=WAIT_S,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        yield client


def expected(text: str, count: int) -> str:
    return decode([hash_token(spell(text), pos, vocab_size=VOCAB_SIZE) for pos in range(count)])


async def post(router: TestRouter, path: str, body: Any) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of a plain request; `body` is JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def ask() -> tuple[int, dict[str, str], str]:
        url = f"http://{router.addresses.http}{path}"
        try:
            with urlopen(Request(url, data=content, method="POST"), timeout=WAIT_S) as answer:
                return answer.status, dict(answer.headers), answer.read().decode()
        except HTTPError as error:
            return error.code, dict(error.headers), error.read().decode()

    return await asyncio.to_thread(ask)


async def test_models_are_listed_and_shown(router: TestRouter, client: openai.AsyncOpenAI) -> None:
    async with router.replica():
        assert [model.id async for model in client.models.list()] == [MODEL, "absent"]
        model = await client.models.retrieve(MODEL)
    assert (model.object, model.owned_by) == ("model", "wattline")
    told = "model: got 'other/model'; allowed: tiny, absent; name one that is served here"
    with pytest.raises(openai.NotFoundError, match=told) as caught:
        await client.models.retrieve("other/model")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


async def test_a_chat_answers_with_usage_and_joules(router: TestRouter, client: openai.AsyncOpenAI) -> None:
    async with router.replica():
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hello"}],
            max_completion_tokens=4,
            temperature=0,
            extra_body={"energy_wait_ms": 1000},
        )
        answer = raw.parse()
    prompt = "<system>be brief\n<user>hello\n<assistant>"
    (choice,) = answer.choices
    assert choice.message.content == expected(prompt, 4)
    assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 4)
    joules = (1000 + 4 * MJ_PER_TOKEN) / 1e3
    energy = (answer.usage.model_extra or {})["energy"]
    assert (energy["joules"], energy["joules_per_output_token"]) == (joules, joules / 4)
    assert (energy["source"], energy["state"]) == ("fake", "final")
    assert raw.headers["x-wattline-energy-joules"] == f"{joules:.3f}"
    assert raw.headers["x-wattline-energy-state"] == "final"
    assert answer.id == f"chatcmpl-{raw.headers['x-request-id']}"
    assert len(raw.headers["x-wattline-trace-id"]) == 32


async def test_a_chat_streams_and_ends_with_usage_and_joules(
    router: TestRouter, client: openai.AsyncOpenAI
) -> None:
    async with router.replica():
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
                max_tokens=5,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"energy_wait_ms": 1000},
            )
        ]
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == expected("<user>hi\n<assistant>", 5)
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all(piece.usage is None for piece in pieces) and last.choices == []
    assert last.usage is not None and last.usage.completion_tokens == 5
    assert (last.usage.model_extra or {})["energy"]["joules"] == (1000 + 5 * MJ_PER_TOKEN) / 1e3


def of_seed(submit: link.Submit, pos: int) -> int:
    return hash_token([submit.sampling.seed % 2**32], pos, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_prompts_and_choices_have_numbers_of_their_own(
    router: TestRouter, client: openai.AsyncOpenAI, is_stream: bool
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": ["a", "bb"], "n": 2, "seed": -1, "max_tokens": 3}
    async with router.replica(tokens=of_seed):
        if is_stream:
            texts = [""] * 4
            async for chunk in await client.completions.create(**asked, stream=True):
                for piece in chunk.choices:
                    texts[piece.index] += piece.text
        else:
            answer = await client.completions.create(**asked)
            texts = [choice.text for choice in answer.choices]
            assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
            assert answer.usage is not None
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 12)
    seeds = [choice_seed(2**64 - 1, index) % 2**32 for index in (0, 1)]
    both = [decode([hash_token([seed], pos, vocab_size=VOCAB_SIZE) for pos in range(3)]) for seed in seeds]
    assert texts == both * 2


async def test_token_prompts_echo_and_the_default_length(
    router: TestRouter, client: openai.AsyncOpenAI
) -> None:
    async with router.replica():
        answer = await client.completions.create(model=MODEL, prompt=list(spell("tell")), echo=True)
        nothing = await client.completions.create(model=MODEL, prompt="tell", echo=True, max_tokens=0)
    assert answer.choices[0].text == "tell" + expected("tell", 16)
    assert nothing.choices[0].text == "tell"
    assert nothing.usage is not None and nothing.usage.completion_tokens == 0


async def test_an_echo_with_logprobs_says_those_of_the_prompt(
    router: TestRouter, client: openai.AsyncOpenAI
) -> None:
    """As lm-evaluation-harness asks for log-likelihoods: token ids, echo, one alternative, one token."""
    async with router.replica(tokens=script(*spell("!"))) as replica:
        answer = await client.completions.create(
            model=MODEL,
            prompt=[list(spell("abc")), list(spell("d"))],
            max_tokens=1,
            temperature=0,
            logprobs=1,
            echo=True,
            seed=1234,
        )
        several = await client.completions.create(
            model=MODEL, prompt="abc", max_tokens=1, logprobs=0, echo=True, n=2
        )
        asked = [command.submit.prompt_logprobs for command in replica.received("submit")]
    first, second = (choice.logprobs for choice in answer.choices)
    assert first is not None and second is not None
    assert (first.tokens, first.text_offset) == (["a", "b", "c", "!"], [0, 1, 2, 3])
    assert first.token_logprobs == [None, -1.0, -2.0, 0.0]
    assert first.top_logprobs is not None and list(map(bool, first.top_logprobs)) == [False, True, True, True]
    assert second.token_logprobs == [None, 0.0]
    for choice in several.choices:
        assert choice.logprobs is not None and choice.logprobs.token_logprobs == [None, -1.0, -2.0, 0.0]
    assert asked == [True, True, True, False]


async def test_an_echo_outlives_a_replica_that_had_said_nothing(
    router: TestRouter, client: openai.AsyncOpenAI
) -> None:
    """Its loss is told beside the answer, in a new resume token, before there is anything of the prompt."""
    async with router.replica(replica_id="old") as old, asyncio.timeout(WAIT_S):
        old.running.clear()
        asking = asyncio.create_task(
            client.completions.create(
                model=MODEL,
                prompt="abc",
                max_tokens=1,
                logprobs=0,
                echo=True,
                extra_body={"return_token_ids": True},
            )
        )
        await old.wait_command("submit")
        async with router.replica(replica_id="new", tokens=script(*spell("!"))):
            await old.end(Fate.FAILED)
            (choice,) = (await asking).choices
    assert choice.text == "abc!"
    assert choice.logprobs is not None and choice.logprobs.token_logprobs == [None, -1.0, -2.0, 0.0]


async def test_a_token_without_text_moves_none_behind_it(
    router: TestRouter, client: openai.AsyncOpenAI
) -> None:
    """As the beginning of text, which is the first token of many a prompt."""
    async with router.replica(tokens=script(*spell("!"))):
        answer = await client.completions.create(
            model=MODEL, prompt=[1, *spell("aé")], max_tokens=1, logprobs=0, echo=True
        )
    (choice,) = answer.choices
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert (choice.text, choice.logprobs.tokens[:2]) == ("aé!", ["token_id:1", "a"])
    assert choice.logprobs.text_offset == [0, 0, 1, 1, 2]


async def test_a_replica_that_says_nothing_of_prompts_is_a_fault(
    router: TestRouter, client: openai.AsyncOpenAI
) -> None:
    async with router.replica(scores_prompts=False):
        with pytest.raises(openai.InternalServerError, match="did not say the logprobs of the prompt"):
            await client.completions.create(model=MODEL, prompt="abc", logprobs=0, echo=True)


async def test_stop_texts_end_an_answer_before_them(router: TestRouter, client: openai.AsyncOpenAI) -> None:
    async with router.replica(tokens=script(*spell("one END two"))):
        answer = await client.completions.create(model=MODEL, prompt="x", stop="END", max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one ", "stop")


async def test_logprobs_come_in_the_shape_of_each_kind(
    router: TestRouter, client: openai.AsyncOpenAI
) -> None:
    async with router.replica(tokens=script(*spell("é!"))):
        chat = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "x"}],
            max_tokens=3,
            logprobs=True,
            top_logprobs=2,
        )
        text = await client.completions.create(model=MODEL, prompt="x", max_tokens=3, logprobs=1)
    said = chat.choices[0].logprobs
    assert said is not None and said.content is not None
    assert [entry.logprob for entry in said.content] == [0.0, -1.0, -2.0]
    assert [entry.bytes for entry in said.content] == [None, None, [33]]
    assert [top.logprob for top in said.content[1].top_logprobs] == [-1.0, -2.0]
    lists = text.choices[0].logprobs
    assert lists is not None
    assert (lists.token_logprobs, lists.text_offset) == ([0.0, -1.0, -2.0], [0, 0, 1])
    assert lists.top_logprobs is not None
    assert lists.top_logprobs[2] == {"token_id:0": -2.0, "!": -2.0}


async def test_a_stream_without_usage_says_its_joules_in_a_comment(router: TestRouter) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 2, "stream": True, "energy_wait_ms": 1000}
    async with router.replica():
        status, headers, text = await post(router, "/v1/completions", body)
    *_, comment, done, rest = text.split("\n\n")
    assert (status, done, rest) == (200, "data: [DONE]", "")
    assert headers["content-type"].startswith("text/event-stream")
    name, _, document = comment.removeprefix(": ").partition(" ")
    assert (name, json.loads(document)["joules"]) == ("energy", (1000 + 2 * MJ_PER_TOKEN) / 1e3)


async def test_joules_that_are_not_known_are_null(router: TestRouter) -> None:
    async with router.replica(energy=EnergyMode.UNKNOWN):
        _, _, text = await post(router, "/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 2})
    energy = json.loads(text)["usage"]["energy"]
    assert energy["joules"] is None


BAD: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt[1]", {"prompt": ["a", ""]}),
    ("prompt", {"prompt": ["a"] * 65}),
    ("prompt", {"prompt": [VOCAB_SIZE]}),
    ("temperature", {"temperature": 3}),
    ("temperature", {"temperature": "hot"}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 10**6}),
    ("n", {"n": 9}),
    ("stop[0]", {"stop": [""]}),
    ("logit_bias", {"logit_bias": {"a": 1}}),
    ("logit_bias[7]", {"logit_bias": {"7": 101}}),
    ("best_of", {"best_of": 3}),
    ("logprobs", {"logprobs": 6, "echo": True}),
    ("suffix", {"suffix": "end"}),
    ("tools", {"tools": [{"type": "function"}]}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("temprature", {"temprature": 1}),
    ("stream_options.chunks", {"stream_options": {"chunks": 1}}),
]


@pytest.mark.parametrize(("param", "fields"), BAD, ids=[f"{param}-{i}" for i, (param, _) in enumerate(BAD)])
async def test_bad_fields_are_named_in_openai_s_shape(
    router: TestRouter, param: str, fields: dict[str, Any]
) -> None:
    async with router.replica():
        status, _, text = await post(
            router, "/v1/completions", {"model": MODEL, "prompt": "secret", **fields}
        )
    error = json.loads(text)["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"].startswith(f"{param}: got ") and "secret" not in text


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"role": "tool", "content": "x"}]}),
        (
            "messages[0].content[0].image_url",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        ),
        ("messages[0].tool_calls", {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}),
        ("top_logprobs", {"top_logprobs": 2}),
    ],
)
async def test_bad_chats_are_named_too(router: TestRouter, param: str, fields: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], **fields}
    async with router.replica():
        status, _, text = await post(router, "/v1/chat/completions", body)
    assert (status, json.loads(text)["error"]["param"]) == (400, param)


async def test_labels_and_nothings_are_ignored(router: TestRouter) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x", "name": None}],
        "max_tokens": 1,
        "user": "somebody",
        "metadata": {"a": "b"},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
    }
    async with router.replica():
        assert (await post(router, "/v1/chat/completions", body))[0] == 200


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"[" * 10_000])
async def test_what_is_no_request_is_refused(router: TestRouter, body: bytes) -> None:
    status, _, text = await post(router, "/v1/completions", body)
    assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")


async def test_a_body_that_is_too_large_is_not_read_to_its_end() -> None:
    async with run_test_router(make_config(router={"max_prompt_bytes": 1024})) as router:
        status, _, text = await post(router, "/v1/completions", b" " * (2**20 + 4097))
    assert status == 413
    assert "larger than 1052672 bytes" in json.loads(text)["error"]["message"]


async def test_no_replica_is_503_and_a_full_router_429_with_a_time_to_come_back() -> None:
    async with run_test_router(make_config(router={"max_streams": 1})) as router:
        body = {"model": MODEL, "prompt": "x"}
        status, headers, text = await post(router, "/v1/completions", body)
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(text)["error"]["type"] == "server_error"
        async with router.replica() as replica:
            replica.running.clear()
            first = asyncio.create_task(post(router, "/v1/completions", body))
            await replica.wait_command("submit")
            status, headers, text = await post(router, "/v1/completions", body)
            assert (status, json.loads(text)["error"]["type"]) == (429, "rate_limit_error")
            assert int(headers["retry-after-ms"]) > 0
            replica.running.set()
            assert (await first)[0] == 200


async def test_an_error_behind_the_first_token_is_the_last_event(
    router: TestRouter, client: openai.AsyncOpenAI
) -> None:
    async with router.replica() as replica, asyncio.timeout(WAIT_S):
        replica.running.clear()
        asking = asyncio.create_task(
            client.completions.create(model=MODEL, prompt="x", max_tokens=50, stream=True)
        )
        await replica.wait_command("submit")
        await replica.step()
        stream = await asking
        assert (await anext(stream)).choices[0].text == expected("x", 1)
        await replica.refuse(1, link.SequenceError(code="INTERNAL", message="not finite"))
        with pytest.raises(openai.APIError, match="the engine failed this request"):
            await anext(stream)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_caller_that_hangs_up_cancels_the_request(router: TestRouter, is_stream: bool) -> None:
    async with router.replica() as replica, asyncio.timeout(WAIT_S):
        replica.running.clear()
        host, _, port = router.addresses.http.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        content = json.dumps({"model": MODEL, "prompt": "x", "stream": is_stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await replica.wait_command("submit")
        if is_stream:
            await replica.step()
            await reader.readuntil(b"data: ")
        writer.close()
        await replica.wait_command("cancel")
        await router.router._streams.idle.wait()


async def test_the_trace_of_the_caller_goes_on(router: TestRouter, client: openai.AsyncOpenAI) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with router.replica() as replica:
        raw = await client.completions.with_raw_response.create(
            model=MODEL,
            prompt="x",
            extra_headers={"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"},
        )
        submit = (await replica.wait_command("submit")).submit
    assert raw.headers["x-wattline-trace-id"] == trace_id
    assert submit.traceparent.split("-")[1] == trace_id


async def test_other_addresses_and_a_switched_off_protocol_are_not_found(router: TestRouter) -> None:
    status, _, text = await post(router, "/v1/embeddings", {})
    assert (status, json.loads(text)["error"]["type"]) == (404, "not_found_error")
    async with run_test_router(make_config(router={"protocols": {"openai": False}})) as silent:
        assert (await post(silent, "/v1/completions", {}))[0] == 404


async def test_an_answer_goes_on_at_another_router(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s" * 64)
    config = make_config(router={"secret_file": str(tmp_path / "secret")})
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "stream": True}
    body |= {"return_token_ids": True}
    async with run_test_router(config) as first, run_test_router(config) as second:
        async with first.replica():
            whole = events(await post(first, "/v1/chat/completions", body))
        (token,) = [choice["resume_token"] for choice in whole if "resume_token" in choice]
        ids = [token_id for choice in whole for token_id in choice["token_ids"]]
        async with second.replica() as new:
            rest = body | {"resume": {"token": token, "token_ids": ids[:5]}}
            resumed = events(await post(second, "/v1/chat/completions", rest))
            assert ids[:5] + [token_id for choice in resumed for token_id in choice["token_ids"]] == ids
            assert decode(ids[:5]) + said(resumed) == said(whole)
            assert new.received("submit")[0].submit.first_offset == 5
            for wrong, status in (
                ({"token": "?", "token_ids": []}, 400),
                ({"token": token, "token_ids": ids}, 412),
            ):
                answered = await post(second, "/v1/chat/completions", body | {"resume": wrong})
                assert answered[0] == status, answered


def events(answered: tuple[int, dict[str, str], str]) -> list[dict[str, Any]]:
    """The choice of every event that has one."""
    lines = [line.removeprefix("data: ") for line in answered[2].splitlines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


def said(choices: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for choice in choices)
