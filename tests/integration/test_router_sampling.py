"""The sampling surface through a whole router: what reaches the replica, and logprobs on the way back."""

from __future__ import annotations

import pytest

from protos import wattline_inference_pb2 as pb
from tests.router_fixture import collect, make_request, run_test_router, script, spell


@pytest.mark.parametrize("tokens_per_step", [1, 3, 50])
async def test_logprobs_are_parallel_to_the_tokens_that_are_sent(tokens_per_step: int) -> None:
    async with run_test_router() as router:
        tokens = script(*spell("one END two"))
        async with router.replica(tokens=tokens, tokens_per_step=tokens_per_step):
            sampling = pb.Sampling(temperature=0.0, logprobs=2)
            request = make_request(max_tokens=50, stop=["END"], sampling=sampling)
            answer = await collect(router.inference.Generate(request))
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in answer.deltas)
    said = [entry for delta in answer.deltas for entry in delta.logprobs]
    assert [entry.logprob for entry in said] == [-pos for pos in range(len("one END"))]
    assert [(top.token_id, top.logprob) for top in said[3].top] == [(0, -3.0), (1, -4.0)]


async def test_what_edits_logits_goes_down_and_logprobs_only_come_when_asked_for() -> None:
    sampling = pb.Sampling(
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=2.0,
        logit_bias={7: -100.0, 3: 0.5},
    )
    async with run_test_router() as router, router.replica() as replica:
        answer = await collect(router.inference.Generate(make_request(sampling=sampling)))
        submit = (await replica.wait_command("submit")).submit
    assert not any(delta.logprobs for delta in answer.deltas)
    sent = submit.sampling
    assert (sent.min_p, sent.repetition_penalty) == (0.25, 1.5)
    assert (sent.presence_penalty, sent.frequency_penalty) == (-0.5, 2.0)
    assert dict(sent.logit_bias) == {7: -100.0, 3: 0.5}
    assert not sent.HasField("logprobs")
    assert submit.cache_salt
