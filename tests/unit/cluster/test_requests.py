"""Validation of requests: what passes keeps its values, what does not is named with value, limit and fix."""

from __future__ import annotations

import pytest

from cluster.request.completion import ChatPrompt, Completion, Operation, TextPrompt, TokenPrompt, Turn
from cluster.request.errors import InvalidRequest
from cluster.request.validation import RequestBounds, output_tokens_allowed, parse_chat, parse_generate
from protos import wattline_inference_pb2 as pb
from replicas.request import SamplingParams

BOUNDS = RequestBounds(max_prompt_bytes=100, max_output_tokens=64, vocab_size=50, has_chat_template=True)
SEED = 7


def generate(**fields: object) -> Completion:
    request = pb.GenerateRequest(**{"model": "m", "text": "hello", **fields})  # type: ignore[arg-type]
    return parse_generate(request, BOUNDS, lambda: SEED)


def chat(*messages: tuple[str, str], bounds: RequestBounds = BOUNDS) -> Completion:
    turns = [pb.Message(role=role, content=content) for role, content in messages]
    return parse_chat(pb.ChatRequest(model="m", messages=turns), bounds, lambda: SEED)


def refusal(**fields: object) -> str:
    with pytest.raises(InvalidRequest) as caught:
        generate(**fields)
    assert str(caught.value).startswith(f"{caught.value.field}: got ")
    return str(caught.value)


def test_defaults_are_sampling_at_one_with_a_drawn_seed() -> None:
    assert generate() == Completion(
        model="m",
        prompt=TextPrompt(text="hello"),
        sampling=SamplingParams(temperature=1.0, top_p=1.0, top_k=0, seed=SEED),
    )


def test_given_values_are_kept_and_zero_is_a_value() -> None:
    completion = generate(
        sampling=pb.Sampling(temperature=0.0, top_p=0.5, top_k=3, seed=0),
        limits=pb.Limits(max_tokens=5, stop=["x"], stop_token_ids=[4, 4], ignore_eos=True),
        priority=-100,
        energy_wait_ms=0,
    )
    assert completion.sampling == SamplingParams(temperature=0.0, top_p=0.5, top_k=3, seed=0)
    assert (completion.max_tokens, completion.stop_texts) == (5, ("x",))
    assert (completion.stop_token_ids, completion.ignore_eos) == (frozenset({4}), True)
    assert (completion.priority, completion.energy_wait_ms) == (-100, 0)


def test_values_that_ask_for_nothing_pass() -> None:
    generate(
        sampling=pb.Sampling(
            min_p=0, repetition_penalty=1, presence_penalty=0, frequency_penalty=0, logprobs=0, n=1
        )
    )


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (pb.Sampling(min_p=-0.1), "sampling.min_p: got -0.1"),
        (pb.Sampling(min_p=1.5), "sampling.min_p: got 1.5; allowed: 0.0 to 1.0"),
        (pb.Sampling(min_p=NAN), "sampling.min_p: got nan"),
        (pb.Sampling(repetition_penalty=0.0), "sampling.repetition_penalty: got 0.0; allowed: 0.1 to 10.0"),
        (pb.Sampling(repetition_penalty=INF), "sampling.repetition_penalty: got inf"),
        (pb.Sampling(presence_penalty=2.5), "sampling.presence_penalty: got 2.5; allowed: -2.0 to 2.0"),
        (pb.Sampling(presence_penalty=NAN), "sampling.presence_penalty: got nan"),
        (pb.Sampling(frequency_penalty=-INF), "sampling.frequency_penalty: got -inf"),
        (pb.Sampling(n=0), "sampling.n: got 0; allowed: 1 to 8"),
        (pb.Sampling(n=9), "sampling.n: got 9"),
        (pb.Sampling(logprobs=21), "sampling.logprobs: got 21; allowed: 0 to 20"),
        (pb.Sampling(logit_bias={50: 1.0}), "sampling.logit_bias: got token 50; allowed: 0 to 49"),
        (pb.Sampling(logit_bias={3: 101.0}), "sampling.logit_bias[3]: got 101.0; allowed: -100.0 to 100.0"),
        (pb.Sampling(logit_bias={3: NAN}), "sampling.logit_bias[3]: got nan"),
        (pb.Sampling(logit_bias=dict.fromkeys(range(301), 1.0)), "sampling.logit_bias: got 301 tokens"),
    ],
)
def test_what_edits_logits_is_finite_and_bounded(sampling: pb.Sampling, words: str) -> None:
    assert refusal(sampling=sampling).startswith(words)


def test_what_edits_logits_reaches_the_engine() -> None:
    sampling = pb.Sampling(
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias={7: -100.0, 3: 0.5},
        logprobs=0,
        seed=1,
    )
    assert generate(sampling=sampling).sampling == SamplingParams(
        temperature=1.0,
        seed=1,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=((3, 0.5), (7, -100.0)),
        num_logprobs=0,
    )


@pytest.mark.parametrize("temperature", [-0.01, 2.01, float("nan"), float("inf")])
def test_a_temperature_out_of_range_is_refused(temperature: float) -> None:
    assert "allowed: 0 to 2.0; use 0 for greedy" in refusal(sampling=pb.Sampling(temperature=temperature))


@pytest.mark.parametrize("top_p", [0.0, -1.0, 1.5, float("nan")])
def test_a_top_p_out_of_range_is_refused(top_p: float) -> None:
    assert refusal(sampling=pb.Sampling(top_p=top_p)).startswith("sampling.top_p: got ")


def test_a_top_k_that_no_plan_can_hold_is_refused() -> None:
    assert generate(sampling=pb.Sampling(top_k=2**31 - 1)).sampling.top_k == 2**31 - 1
    assert refusal(sampling=pb.Sampling(top_k=2**31)).startswith("sampling.top_k: got 2147483648; allowed: 0")


def test_limits_are_named_with_value_and_limit() -> None:
    assert refusal(limits=pb.Limits(max_tokens=65)) == (
        "limits.max_tokens: got 65; allowed: 1 to 64; choose a value in this range"
    )
    assert refusal(limits=pb.Limits(stop=["x" * 65])) == (
        "limits.stop[0]: got 65 bytes; allowed: 1 to 64 bytes; shorten it"
    )
    assert refusal(limits=pb.Limits(stop=["é" * 33])).startswith("limits.stop[0]: got 66 bytes")
    assert refusal(limits=pb.Limits(stop=["x"] * 17)).startswith("limits.stop: got 17 texts; allowed: 16")
    assert refusal(limits=pb.Limits(stop_token_ids=[1] * 65)).startswith("limits.stop_token_ids: got 65 ids")
    assert refusal(limits=pb.Limits(stop_token_ids=[50])).startswith("limits.stop_token_ids: got token 50")
    assert refusal(priority=101).startswith("priority: got 101; allowed: -100 to 100")
    assert refusal(energy_wait_ms=1001).startswith("energy_wait_ms: got 1001; allowed: 0 to 1000")


def test_a_prompt_is_there_fits_and_is_in_the_vocabulary() -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: got nothing; allowed: text or tokens"):
        parse_generate(pb.GenerateRequest(model="m"), BOUNDS, lambda: SEED)
    assert refusal(text="é" * 51).startswith("prompt.text: got 102 bytes; allowed: 100 bytes")
    assert refusal(tokens=pb.TokenIds()).startswith("prompt.tokens.ids: got no tokens")
    assert refusal(tokens=pb.TokenIds(ids=[1] * 26)).startswith("prompt.tokens.ids: got 104 bytes")
    assert refusal(tokens=pb.TokenIds(ids=[1, 50])).startswith(
        "prompt.tokens.ids: got token 50; allowed: 0 to 49"
    )
    assert generate(tokens=pb.TokenIds(ids=[1, 49])).prompt == TokenPrompt(ids=(1, 49))


def test_an_error_never_holds_the_prompt() -> None:
    assert "secret" not in refusal(text="secret" * 100)


def test_chat_takes_known_roles_and_some_text() -> None:
    completion = chat(("system", ""), ("user", "hi"))
    assert completion.prompt == ChatPrompt(
        turns=(Turn(role="system", content=""), Turn(role="user", content="hi"))
    )
    assert completion.operation is Operation.CHAT
    with pytest.raises(
        InvalidRequest, match=r"^messages\[1\].role: got 'tool'; allowed: system, user, assistant"
    ):
        chat(("user", "hi"), ("tool", "x"))
    with pytest.raises(InvalidRequest, match=r"^messages: got 0 messages"):
        chat()
    with pytest.raises(InvalidRequest, match=r"^messages: got only empty messages"):
        chat(("user", ""), ("user", ""))
    with pytest.raises(InvalidRequest, match=r"^messages: got 101 bytes; allowed: 100 bytes"):
        chat(("user", "x" * 50), ("user", "x" * 51))


def test_chat_without_a_template_points_at_generate() -> None:
    bounds = RequestBounds(max_prompt_bytes=1, max_output_tokens=1, vocab_size=1, has_chat_template=False)
    with pytest.raises(InvalidRequest, match="use Generate"):
        chat(("user", "hi"), bounds=bounds)


def allowed(completion: Completion, prompt_tokens: int) -> int:
    return output_tokens_allowed(completion, prompt_tokens=prompt_tokens, context_tokens=20, max_output=12)


def test_output_is_bounded_by_wish_cap_and_context() -> None:
    assert allowed(generate(), 5) == 12
    assert allowed(generate(), 15) == 5
    assert allowed(generate(), 19) == 1
    assert allowed(generate(limits=pb.Limits(max_tokens=3)), 5) == 3
    assert allowed(generate(limits=pb.Limits(max_tokens=9)), 15) == 5


def test_a_prompt_that_leaves_no_room_is_refused_with_numbers() -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: got 20 tokens; allowed: 19 tokens"):
        allowed(generate(), 20)
