"""The engine over the null runner: tokens, endings, records, and that nothing is left behind."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import pytest

from replicas.config import EngineLimits, NullEngineConfig
from replicas.engine.engine import Engine
from replicas.engine.scheduler import Scheduler
from replicas.plan import PendingStep, StepOutcome, StepPlan
from replicas.rank.null_runner import EOS_TOKEN_ID, NullRunner, null_continuation
from replicas.request import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceDelta,
    StepMember,
    StepResult,
    TokenLogprobs,
)

INSTANT = NullEngineConfig(step_ms=0.0, prefill_tokens_per_s=0.0, vocab_size=1000, context_tokens=256)


@dataclass(slots=True)
class FakeClock:
    """A clock that moves a millisecond each time it is read."""

    now_ns: int = 0

    def __call__(self) -> int:
        self.now_ns += 1_000_000
        return self.now_ns


@dataclass(slots=True)
class NotFiniteRunner:
    """The null runner, but the logits of one row are never finite."""

    inner: NullRunner
    bad_row: int

    def launch(self, plan: StepPlan) -> PendingStep:
        ids = iter(self.inner.launch(plan).result().sampled_ids)
        sampling = [row.row for row in plan.rows if row.samples]
        return _Done(
            StepOutcome(sampled_ids=tuple(-1 if row == self.bad_row else next(ids) for row in sampling))
        )

    def close(self) -> None:
        self.inner.close()


@dataclass(slots=True)
class _Done:
    outcome: StepOutcome

    def result(self) -> StepOutcome:
        return self.outcome


@dataclass(slots=True)
class Transcript:
    """What a client of the engine would have seen."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    last: dict[int, SequenceDelta] = field(default_factory=dict)
    members: dict[int, list[StepMember]] = field(default_factory=lambda: defaultdict(list))

    def add(self, result: StepResult) -> None:
        for delta in result.deltas:
            assert delta.request_id not in self.last, "nothing follows the last delta"
            assert not delta.token_ids or delta.first_offset == len(self.tokens[delta.request_id])
            self.tokens[delta.request_id] += delta.token_ids
            if delta.finish is not None:
                self.last[delta.request_id] = delta
        for member in result.record.members if result.record else ():
            self.members[member.request_id].append(member)

    def finishes(self) -> dict[int, FinishReason | None]:
        return {request_id: delta.finish for request_id, delta in self.last.items()}


def make_limits(
    *,
    step_tokens: int = 64,
    num_blocks: int = 200,
    lookahead: int = 0,
    max_sequences: int = 8,
    max_waiting: int = 32,
) -> EngineLimits:
    return EngineLimits(
        max_sequences=max_sequences,
        max_waiting=max_waiting,
        step_tokens=step_tokens,
        block_tokens=4,
        num_blocks=num_blocks,
        lookahead=lookahead,
    )


def make_engine(limits: EngineLimits, config: NullEngineConfig = INSTANT) -> Engine:
    runner = NullRunner(config, limits)
    return Engine(runner, Scheduler(limits, runner.shape), lookahead=limits.lookahead, clock=FakeClock())


def make_request(request_id: int, prompt_ids: tuple[int, ...], max_tokens: int = 12) -> GenerationRequest:
    return GenerationRequest(request_id=request_id, prompt_ids=prompt_ids, max_tokens=max_tokens)


def run(engine: Engine, transcript: Transcript | None = None, *, max_steps: int = 5000) -> Transcript:
    transcript = transcript or Transcript()
    for _ in range(max_steps):
        if not engine.has_work:
            return transcript
        transcript.add(engine.step())
    raise AssertionError(f"the engine still has work after {max_steps} steps")


PROMPTS = tuple(
    tuple(range(3 + start, 3 + start + length)) for start, length in enumerate((1, 5, 9, 17, 2, 40, 8, 3))
)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("step_tokens", [3, 16, 512])
@pytest.mark.parametrize("num_blocks", [15, 24, 200])
@pytest.mark.parametrize("max_sequences", [1, 3, 8])
def test_tokens_do_not_depend_on_batch_chunks_preemption_or_lookahead(
    lookahead: int, step_tokens: int, num_blocks: int, max_sequences: int
) -> None:
    engine = make_engine(
        make_limits(
            step_tokens=step_tokens, num_blocks=num_blocks, lookahead=lookahead, max_sequences=max_sequences
        )
    )
    for request_id, prompt_ids in enumerate(PROMPTS):
        engine.submit(make_request(request_id, prompt_ids))
    transcript = run(engine)
    for request_id, prompt_ids in enumerate(PROMPTS):
        assert tuple(transcript.tokens[request_id]) == null_continuation(prompt_ids, 12, INSTANT)
    assert set(transcript.finishes().values()) == {FinishReason.LENGTH}


@pytest.mark.parametrize("lookahead", [0, 1])
def test_preempted_tokens_are_recomputed_and_counted_as_wasted(lookahead: int) -> None:
    engine = make_engine(make_limits(num_blocks=12, lookahead=lookahead))
    engine.submit(make_request(1, tuple(range(3, 11)), max_tokens=30))
    engine.submit(make_request(2, tuple(range(20, 28)), max_tokens=30))
    transcript = run(engine)
    timings = {request_id: delta.timing for request_id, delta in transcript.last.items()}
    first, second = timings[1], timings[2]
    assert first is not None and second is not None
    assert (first.preemptions, first.wasted_tokens) == (0, 0)
    assert second.preemptions >= 1 and second.wasted_tokens >= 8
    for request_id, timing in ((1, first), (2, second)):
        assert sum(member.wasted_tokens for member in transcript.members[request_id]) == timing.wasted_tokens


def test_a_stop_token_ends_with_stop_and_is_delivered() -> None:
    config = NullEngineConfig(
        step_ms=0, prefill_tokens_per_s=0, vocab_size=1000, context_tokens=256, eos_every=5
    )
    engine = make_engine(make_limits(), config)
    request = GenerationRequest(
        request_id=1, prompt_ids=(5, 6, 7), max_tokens=200, stop_token_ids=frozenset({EOS_TOKEN_ID})
    )
    engine.submit(request)
    transcript = run(engine)
    expected = null_continuation((5, 6, 7), 200, config)
    assert tuple(transcript.tokens[1]) == expected[: expected.index(EOS_TOKEN_ID) + 1]
    assert transcript.finishes() == {1: FinishReason.STOP}


def test_lookahead_discards_and_counts_the_token_past_the_end() -> None:
    engine = make_engine(make_limits(lookahead=1))
    expected = null_continuation((5, 6, 7), 4, INSTANT)
    request = GenerationRequest(
        request_id=1, prompt_ids=(5, 6, 7), max_tokens=50, stop_token_ids=frozenset({expected[3]})
    )
    engine.submit(request)
    transcript = run(engine)
    assert tuple(transcript.tokens[1]) == expected
    timing = transcript.last[1].timing
    assert timing is not None and timing.wasted_tokens == 1
    assert [member.wasted_tokens for member in transcript.members[1]] == [0, 0, 0, 0, 1]


def test_lookahead_never_runs_past_max_tokens() -> None:
    engine = make_engine(make_limits(lookahead=1))
    engine.submit(make_request(1, (5, 6, 7), max_tokens=4))
    transcript = run(engine)
    timing = transcript.last[1].timing
    assert timing is not None and timing.wasted_tokens == 0
    assert len(transcript.members[1]) == 4


def test_ends_with_length_when_the_context_is_full() -> None:
    engine = make_engine(make_limits())
    engine.submit(make_request(1, tuple(range(3, 253)), max_tokens=100))
    transcript = run(engine)
    assert len(transcript.tokens[1]) == 6
    assert transcript.finishes() == {1: FinishReason.LENGTH}


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_resubmitted_request_continues_with_the_same_tokens(lookahead: int) -> None:
    expected = null_continuation((5, 6, 7), 20, INSTANT)
    engine = make_engine(make_limits(lookahead=lookahead))
    engine.submit(
        GenerationRequest(
            request_id=1, prompt_ids=(5, 6, 7, *expected[:9]), max_tokens=11, attempt=1, first_offset=9
        )
    )
    deltas: list[SequenceDelta] = []
    while engine.has_work:
        deltas += engine.step().deltas
    assert [delta.first_offset for delta in deltas] == list(range(9, 20))
    assert tuple(token for delta in deltas for token in delta.token_ids) == expected[9:]
    assert {delta.attempt for delta in deltas} == {1}


def test_sampled_tokens_depend_on_the_seed_and_greedy_ones_do_not() -> None:
    engine = make_engine(make_limits())
    for request_id, (temperature, seed) in enumerate(((0.0, 1), (0.0, 2), (0.8, 1), (0.8, 2), (0.8, 2))):
        sampling = SamplingParams(temperature=temperature, seed=seed)
        engine.submit(
            GenerationRequest(request_id=request_id, prompt_ids=(9, 9), max_tokens=5, sampling=sampling)
        )
    tokens = run(engine).tokens
    assert tokens[0] == tokens[1] and tokens[3] == tokens[4]
    assert tokens[2] != tokens[3] and tokens[0] != tokens[2]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_logprobs_come_with_every_token_of_those_who_ask(lookahead: int) -> None:
    engine = make_engine(make_limits(lookahead=lookahead))
    for request_id, num_logprobs in enumerate((None, 0, 2)):
        sampling = SamplingParams(num_logprobs=num_logprobs)
        engine.submit(
            GenerationRequest(request_id=request_id, prompt_ids=(9, 9), max_tokens=4, sampling=sampling)
        )
    said: dict[int, list[TokenLogprobs]] = defaultdict(list)
    transcript = Transcript()
    while engine.has_work:
        result = engine.step()
        transcript.add(result)
        for delta in result.deltas:
            said[delta.request_id] += delta.logprobs
    assert said[0] == []
    assert said[1] == [TokenLogprobs(logprob=0.0)] * 4
    assert said[2] == [TokenLogprobs(logprob=0.0, top=((each, 0.0),)) for each in transcript.tokens[2]]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_cancel_and_stop_end_a_running_request_at_once(lookahead: int) -> None:
    engine = make_engine(make_limits(lookahead=lookahead))
    for request_id in (1, 2, 3):
        engine.submit(make_request(request_id, (4, 5, 6), max_tokens=6))
    transcript = Transcript()
    transcript.add(engine.step())
    engine.cancel(1)
    engine.stop(2)
    transcript.add(engine.step())
    assert transcript.finishes() == {1: FinishReason.CANCELLED, 2: FinishReason.STOP}
    assert engine.load.running == (1,)
    assert run(engine, transcript).finishes()[3] is FinishReason.LENGTH


def test_cancelling_a_waiting_request_frees_its_place() -> None:
    engine = make_engine(make_limits(max_sequences=1))
    engine.submit(make_request(1, (4, 5, 6)))
    engine.submit(make_request(2, (4, 5, 6)))
    engine.step()
    engine.cancel(2)
    (delta,) = (delta for delta in engine.step().deltas if delta.request_id == 2)
    assert delta.finish is FinishReason.CANCELLED
    assert delta.timing is not None and delta.timing.prefill_us == 0 and delta.timing.queue_us > 0
    assert engine.load.waiting == (0,)


def test_cancelling_what_has_ended_is_no_error() -> None:
    engine = make_engine(make_limits())
    engine.cancel(7)
    engine.stop(7)
    assert not engine.has_work


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (GenerationRequest(request_id=1, prompt_ids=(), max_tokens=1), "prompt_ids is empty"),
        (
            GenerationRequest(request_id=1, prompt_ids=(5, 1000), max_tokens=1),
            "holds 1000; the vocabulary is 0 to 999",
        ),
        (GenerationRequest(request_id=1, prompt_ids=(-1, 5), max_tokens=1), "holds -1"),
        (GenerationRequest(request_id=1, prompt_ids=(5,) * 256, max_tokens=1), "room for 255"),
        (GenerationRequest(request_id=1, prompt_ids=(5,), max_tokens=0), "max_tokens is 0"),
        (GenerationRequest(request_id=1, prompt_ids=(5,), max_tokens=1, lane=1), "lane is 1"),
        (GenerationRequest(request_id=1, prompt_ids=(5,), max_tokens=1, first_offset=2), "first_offset is 2"),
        *(
            (GenerationRequest(request_id=1, prompt_ids=(5,), max_tokens=1, sampling=sampling), words)
            for sampling, words in (
                (SamplingParams(min_p=float("nan")), "min_p is nan"),
                (SamplingParams(num_logprobs=21), "logprobs is 21; give 0 to 20"),
                (SamplingParams(repetition_penalty=0.0), "repetition_penalty is 0.0"),
                (SamplingParams(presence_penalty=float("inf")), "presence_penalty is inf"),
                (SamplingParams(frequency_penalty=-2.1), "frequency_penalty is -2.1"),
                (SamplingParams(logit_bias=((1000, 1.0),)), "logit_bias holds token 1000"),
                (SamplingParams(logit_bias=((7, float("nan")),)), "logit_bias of token 7 is nan"),
                (SamplingParams(logit_bias=((7, 1.0),) * 301), "logit_bias holds 301 tokens"),
            )
        ),
        (
            GenerationRequest(request_id=1, prompt_ids=(5,), max_tokens=1, cache_salt=bytes(65)),
            "cache_salt holds 65 bytes",
        ),
        (
            GenerationRequest(
                request_id=1, prompt_ids=(5,), max_tokens=1, sampling=SamplingParams(temperature=float("nan"))
            ),
            "temperature is nan",
        ),
        (
            GenerationRequest(
                request_id=1, prompt_ids=(5,), max_tokens=1, sampling=SamplingParams(top_p=0.0)
            ),
            "top_p is 0.0",
        ),
        (
            GenerationRequest(request_id=1, prompt_ids=(5,), max_tokens=1, sampling=SamplingParams(top_k=-1)),
            "top_k is -1",
        ),
        (
            GenerationRequest(request_id=1, prompt_ids=(5,), max_tokens=1, sampling=SamplingParams(seed=-1)),
            "seed is -1",
        ),
    ],
)
def test_a_bad_request_fails_alone_with_the_field_named(request_: GenerationRequest, words: str) -> None:
    engine = make_engine(make_limits())
    engine.submit(request_)
    engine.submit(make_request(2, (4, 5)))
    transcript = run(engine)
    assert transcript.finishes() == {1: FinishReason.ERROR, 2: FinishReason.LENGTH}
    error = transcript.last[1].error
    assert error is not None and error[0] == "INVALID_ARGUMENT" and words in error[1]


def test_a_prompt_longer_than_the_pool_is_refused_and_one_that_just_fits_is_served() -> None:
    engine = make_engine(make_limits(num_blocks=6))
    engine.submit(make_request(1, tuple(range(3, 23)), max_tokens=1))
    engine.submit(make_request(2, tuple(range(3, 22)), max_tokens=9))
    transcript = run(engine)
    assert transcript.finishes() == {1: FinishReason.ERROR, 2: FinishReason.LENGTH}
    assert len(transcript.tokens[2]) == 1


def test_a_full_queue_refuses_with_resource_exhausted() -> None:
    engine = make_engine(make_limits(max_sequences=1, max_waiting=1))
    for request_id in (1, 2, 3):
        engine.submit(make_request(request_id, (4, 5)))
    transcript = run(engine)
    error = transcript.last[3].error
    assert error is not None and error[0] == "RESOURCE_EXHAUSTED"
    assert transcript.finishes()[1] is transcript.finishes()[2] is FinishReason.LENGTH


def test_logits_that_are_not_finite_fail_their_row_alone() -> None:
    limits = make_limits()
    inner = NullRunner(INSTANT, limits)
    engine = Engine(NotFiniteRunner(inner, bad_row=0), Scheduler(limits, inner.shape), clock=FakeClock())
    engine.submit(make_request(1, (4, 5)))
    engine.submit(make_request(2, (6, 7)))
    transcript = run(engine)
    assert transcript.finishes() == {1: FinishReason.ERROR, 2: FinishReason.LENGTH}
    assert transcript.last[1].error == ("INTERNAL", "the model's output was not finite")
    timing = transcript.last[1].timing
    assert timing is not None and timing.trail is not None
    assert (timing.trail.last_step, timing.trail.num_steps, timing.trail.first_token_step) == (1, 1, None)


@dataclass(slots=True)
class FailingRunner:
    """Fails at a step: when it is launched, or when it is waited for."""

    inner: NullRunner
    bad_step: int
    fails_late: bool

    def launch(self, plan: StepPlan) -> PendingStep:
        pending = self.inner.launch(plan)
        if plan.step < self.bad_step:
            return pending
        if self.fails_late:
            return _Broken()
        raise RuntimeError("broken")

    def close(self) -> None:
        self.inner.close()


class _Broken:
    def result(self) -> StepOutcome:
        raise RuntimeError("broken")


@pytest.mark.parametrize("fails_late", [False, True])
def test_a_step_that_fails_leaves_its_number_and_the_traces_in_it(
    fails_late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    limits = make_limits(lookahead=1)
    inner = NullRunner(INSTANT, limits)
    runner = FailingRunner(inner, bad_step=3, fails_late=fails_late)
    engine = Engine(runner, Scheduler(limits, inner.shape), lookahead=1, clock=FakeClock())
    traces = ["a" * 32, "b" * 32]
    for request_id, trace_id in enumerate(traces):
        request = make_request(request_id, (4, 5), max_tokens=12 if request_id else 2)
        engine.submit(replace(request, traceparent=f"00-{trace_id}-{'c' * 16}-01"))
    with pytest.raises(RuntimeError, match="broken"):
        run(engine)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"step_failed step=3 sequences=1 traces={traces[1]}"


def test_the_record_names_everybody_in_the_step() -> None:
    engine = make_engine(make_limits(step_tokens=10))
    engine.submit(make_request(1, (4, 5), max_tokens=3))
    engine.submit(make_request(2, tuple(range(3, 15)), max_tokens=1))
    first, second = engine.step().record, engine.step().record
    assert first is not None and second is not None
    assert first.members == (
        StepMember(request_id=1, new_tokens=2, context_tokens=0, is_prefill=True),
        StepMember(request_id=2, new_tokens=8, context_tokens=0, is_prefill=True),
    )
    assert second.members == (
        StepMember(request_id=1, new_tokens=1, context_tokens=2, is_prefill=False),
        StepMember(request_id=2, new_tokens=4, context_tokens=8, is_prefill=True),
    )
    assert (first.step, second.step) == (1, 2)
    assert first.start_ns < first.end_ns <= second.start_ns < second.end_ns


def test_the_load_tells_queues_blocks_and_rates() -> None:
    engine = make_engine(make_limits(max_sequences=1, num_blocks=11))
    engine.submit(make_request(1, (4, 5, 6, 7, 8), max_tokens=2))
    engine.submit(make_request(2, (4, 5, 6), max_tokens=2))
    load = engine.step().load
    assert (load.running, load.waiting, load.waiting_prefill_tokens) == ((1,), (1,), (3,))
    assert (load.free_blocks, load.total_blocks) == ((8,), (10,))
    assert (load.prompt_tokens_total, load.generated_tokens_total) == (5, 1)
    assert load.step_ms == 1.0 and load.prefill_tokens_per_s == 5000.0 and load.decode_tokens_per_s == 0.0
    while engine.has_work:
        engine.step()
    assert engine.load.free_blocks == (10,) and engine.load.generated_tokens_total == 4
    engine.forget_averages()
    assert engine.load.step_ms == 0.0


def test_a_result_without_a_step_has_no_record() -> None:
    engine = make_engine(make_limits())
    engine.submit(make_request(1, (), max_tokens=1))
    result = engine.step()
    assert result.record is None and len(result.deltas) == 1
    assert not engine.has_work


def test_an_exception_of_the_runner_leaves_the_engine() -> None:
    config = NullEngineConfig(step_ms=0, fail_at_step=2)
    engine = make_engine(make_limits(), config)
    engine.submit(make_request(1, (4, 5)))
    engine.step()
    with pytest.raises(RuntimeError, match="told to fail at step 2"):
        engine.step()
