"""Domain nouns to protobuf messages and back: the one place of this package where the two meet.

Used by `frames.py` (supervisor and rank 0) and by the supervisor's links to routers, which speak the same
messages. Deadlines travel as time left, so `now_ns` is asked for wherever one crosses.
"""

from __future__ import annotations

from collections.abc import Iterable

from protos import wattline_link_pb2 as link_pb2
from protos import wattline_rank_pb2 as rank_pb2
from replicas.engine.prefix_hash import HASH_BYTES
from replicas.expert_loads import ExpertLoads
from replicas.request import (
    CacheChange,
    EngineCosts,
    EngineReady,
    FinishReason,
    GenerationRequest,
    LoadSnapshot,
    SamplingParams,
    SequenceDelta,
    SequenceTiming,
    StepMember,
    StepRecord,
    StepResult,
    TokenLogprobs,
)

NS_PER_MS = 1_000_000
MAX_DEADLINE_MS = 2**32 - 1

FINISH_TO_WIRE = {
    FinishReason.STOP: link_pb2.ENGINE_FINISH_STOP,
    FinishReason.LENGTH: link_pb2.ENGINE_FINISH_LENGTH,
    FinishReason.CANCELLED: link_pb2.ENGINE_FINISH_CANCELLED,
    FinishReason.DEADLINE: link_pb2.ENGINE_FINISH_DEADLINE,
    FinishReason.ERROR: link_pb2.ENGINE_FINISH_ERROR,
}
FINISH_FROM_WIRE = {wire: reason for reason, wire in FINISH_TO_WIRE.items()}


def request_to_wire(request: GenerationRequest, *, now_ns: int) -> link_pb2.Submit:
    """An expired deadline becomes 1 ms: 0 on the wire means none."""
    deadline_ms = 0
    if request.deadline_ns is not None:
        left_ms = -(-(request.deadline_ns - now_ns) // NS_PER_MS)
        deadline_ms = min(max(left_ms, 1), MAX_DEADLINE_MS)
    return link_pb2.Submit(
        request_id=request.request_id,
        attempt=request.attempt,
        first_offset=request.first_offset,
        prompt_ids=request.prompt_ids,
        sampling=sampling_to_wire(request.sampling),
        max_tokens=request.max_tokens,
        stop_token_ids=sorted(request.stop_token_ids),
        priority=request.priority,
        deadline_ms=deadline_ms,
        lane=request.lane,
        cache_salt=request.cache_salt,
        prompt_logprobs=request.scores_prompt,
    )


def request_from_wire(message: link_pb2.Submit, *, now_ns: int) -> GenerationRequest:
    """The fields are checked where they are used: by the engine."""
    return GenerationRequest(
        request_id=message.request_id,
        prompt_ids=tuple(message.prompt_ids),
        max_tokens=message.max_tokens,
        sampling=_sampling_from_wire(message.sampling),
        stop_token_ids=frozenset(message.stop_token_ids),
        priority=message.priority,
        deadline_ns=now_ns + message.deadline_ms * NS_PER_MS if message.deadline_ms else None,
        lane=message.lane,
        attempt=message.attempt,
        first_offset=message.first_offset,
        cache_salt=message.cache_salt,
        scores_prompt=message.prompt_logprobs,
    )


def sampling_to_wire(sampling: SamplingParams) -> link_pb2.EngineSampling:
    return link_pb2.EngineSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        logprobs=sampling.num_logprobs,
    )


def _sampling_from_wire(message: link_pb2.EngineSampling) -> SamplingParams:
    """Biases in the order of their tokens: a map has none of its own, and all ranks must see one."""
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty or 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())) if message.logit_bias else (),
        num_logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def delta_to_wire(delta: SequenceDelta) -> link_pb2.SequenceDelta:
    message = link_pb2.SequenceDelta(
        request_id=delta.request_id,
        attempt=delta.attempt,
        first_offset=delta.first_offset,
        token_ids=delta.token_ids,
    )
    if delta.finish is not None:
        message.finish = FINISH_TO_WIRE[delta.finish]
    if delta.timing is not None:
        timing = delta.timing
        message.timing.CopyFrom(
            link_pb2.SequenceTiming(
                queue_us=timing.queue_us,
                prefill_us=timing.prefill_us,
                decode_us=timing.decode_us,
                cached_tokens=timing.cached_tokens,
                wasted_tokens=timing.wasted_tokens,
                preemptions=timing.preemptions,
            )
        )
    if delta.error is not None:
        message.error.code, message.error.message = delta.error
    if delta.logprobs:
        message.logprobs.extend(_logprobs_to_wire(delta.logprobs))
    if delta.prompt_logprobs:
        message.prompt_logprobs.extend(_logprobs_to_wire(delta.prompt_logprobs))
    return message


def _logprobs_to_wire(logprobs: Iterable[TokenLogprobs]) -> list[link_pb2.EngineLogprobs]:
    return [
        link_pb2.EngineLogprobs(
            logprob=said.logprob,
            top_ids=[token_id for token_id, _ in said.top],
            top_logprobs=[logprob for _, logprob in said.top],
        )
        for said in logprobs
    ]


def delta_from_wire(message: link_pb2.SequenceDelta) -> SequenceDelta:
    timing = None
    if message.HasField("timing"):
        timing = SequenceTiming(
            queue_us=message.timing.queue_us,
            prefill_us=message.timing.prefill_us,
            decode_us=message.timing.decode_us,
            cached_tokens=message.timing.cached_tokens,
            wasted_tokens=message.timing.wasted_tokens,
            preemptions=message.timing.preemptions,
        )
    return SequenceDelta(
        request_id=message.request_id,
        attempt=message.attempt,
        first_offset=message.first_offset,
        token_ids=tuple(message.token_ids),
        finish=FINISH_FROM_WIRE.get(message.finish),
        timing=timing,
        error=(message.error.code, message.error.message) if message.HasField("error") else None,
        logprobs=logprobs_from_wire(message.logprobs) if message.logprobs else (),
        prompt_logprobs=logprobs_from_wire(message.prompt_logprobs) if message.prompt_logprobs else (),
    )


def logprobs_from_wire(entries: Iterable[link_pb2.EngineLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(logprob=said.logprob, top=tuple(zip(said.top_ids, said.top_logprobs, strict=True)))
        for said in entries
    )


def load_to_wire(load: LoadSnapshot) -> link_pb2.LoadSnapshot:
    """Power and joules per token are left 0: the supervisor knows them, an engine does not."""
    return link_pb2.LoadSnapshot(
        step=load.step,
        running=load.running,
        waiting=load.waiting,
        waiting_prefill_tokens=load.waiting_prefill_tokens,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        step_ms=load.step_ms,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_tokens_per_s=load.decode_tokens_per_s,
        prompt_tokens_total=load.prompt_tokens_total,
        generated_tokens_total=load.generated_tokens_total,
        cached_tokens_total=load.cached_tokens_total,
    )


def load_from_wire(message: link_pb2.LoadSnapshot) -> LoadSnapshot:
    return LoadSnapshot(
        step=message.step,
        running=tuple(message.running),
        waiting=tuple(message.waiting),
        waiting_prefill_tokens=tuple(message.waiting_prefill_tokens),
        free_blocks=tuple(message.free_blocks),
        total_blocks=tuple(message.total_blocks),
        step_ms=message.step_ms,
        prefill_tokens_per_s=message.prefill_tokens_per_s,
        decode_tokens_per_s=message.decode_tokens_per_s,
        prompt_tokens_total=message.prompt_tokens_total,
        generated_tokens_total=message.generated_tokens_total,
        cached_tokens_total=message.cached_tokens_total,
    )


def record_to_wire(record: StepRecord) -> rank_pb2.StepRecord:
    members = record.members
    return rank_pb2.StepRecord(
        step=record.step,
        start_ns=record.start_ns,
        end_ns=record.end_ns,
        request_ids=[member.request_id for member in members],
        new_tokens=[member.new_tokens for member in members],
        context_tokens=[member.context_tokens for member in members],
        is_prefill=[member.is_prefill for member in members],
        wasted_tokens=[member.wasted_tokens for member in members],
        experts_hit=record.experts_hit,
    )


def record_from_wire(message: rank_pb2.StepRecord) -> StepRecord:
    columns = zip(
        message.request_ids,
        message.new_tokens,
        message.context_tokens,
        message.is_prefill,
        message.wasted_tokens,
        strict=True,
    )
    return StepRecord(
        step=message.step,
        start_ns=message.start_ns,
        end_ns=message.end_ns,
        members=tuple(
            StepMember(
                request_id=request_id,
                new_tokens=new_tokens,
                context_tokens=context_tokens,
                is_prefill=is_prefill,
                wasted_tokens=wasted_tokens,
            )
            for request_id, new_tokens, context_tokens, is_prefill, wasted_tokens in columns
        ),
        experts_hit=message.experts_hit,
    )


def result_to_wire(result: StepResult) -> rank_pb2.StepFrame:
    return rank_pb2.StepFrame(
        output=link_pb2.StepOutput(
            step=result.step,
            deltas=[delta_to_wire(delta) for delta in result.deltas],
            load=load_to_wire(result.load),
        ),
        record=None if result.record is None else record_to_wire(result.record),
        cache=cache_to_wire(result.cache),
    )


def result_from_wire(message: rank_pb2.StepFrame) -> StepResult:
    return StepResult(
        step=message.output.step,
        deltas=tuple(delta_from_wire(delta) for delta in message.output.deltas),
        load=load_from_wire(message.output.load),
        record=record_from_wire(message.record) if message.HasField("record") else None,
        cache=cache_from_wire(message.cache),
    )


def cache_to_wire(changes: Iterable[CacheChange]) -> list[link_pb2.CacheChange]:
    return [
        link_pb2.CacheChange(
            lane=change.lane,
            added=b"".join(change.added),
            removed=b"".join(change.removed),
            is_snapshot=change.is_snapshot,
        )
        for change in changes
    ]


def cache_from_wire(messages: Iterable[link_pb2.CacheChange]) -> tuple[CacheChange, ...]:
    """A hash that is cut short is left out: it could match nothing."""
    return tuple(
        [
            CacheChange(
                lane=message.lane,
                added=_split_hashes(message.added),
                removed=_split_hashes(message.removed),
                is_snapshot=message.is_snapshot,
            )
            for message in messages
        ]
    )


def _split_hashes(joined: bytes) -> tuple[bytes, ...]:
    ends = range(HASH_BYTES, len(joined) + 1, HASH_BYTES)
    return tuple([joined[end - HASH_BYTES : end] for end in ends])


def loads_to_wire(loads: ExpertLoads) -> rank_pb2.ExpertLoads:
    return rank_pb2.ExpertLoads(
        num_experts=loads.num_experts,
        tokens=loads.tokens,
        num_ranks=loads.num_ranks,
        spares=loads.spares,
    )


def loads_from_wire(message: rank_pb2.ExpertLoads) -> ExpertLoads:
    return ExpertLoads(
        num_experts=message.num_experts,
        tokens=tuple(message.tokens),
        num_ranks=message.num_ranks,
        spares=tuple(message.spares),
    )


def ready_to_wire(ready: EngineReady) -> rank_pb2.EngineReady:
    costs = ready.costs
    return rank_pb2.EngineReady(
        architecture=ready.architecture,
        lanes=ready.lanes,
        context_tokens=ready.context_tokens,
        max_sequences=ready.max_sequences,
        vocab_size=ready.vocab_size,
        block_tokens=ready.block_tokens,
        weights_digest=ready.weights_digest,
        dtype=ready.dtype,
        device=ready.device,
        load=load_to_wire(ready.load),
        costs=rank_pb2.EngineCosts(
            active_params=costs.active_params,
            shared_weight_bytes=costs.shared_weight_bytes,
            expert_bytes=costs.expert_bytes,
            num_layers=costs.num_layers,
            attention_dim=costs.attention_dim,
            kv_bytes_per_token=costs.kv_bytes_per_token,
        ),
        eos_token_ids=ready.eos_token_ids,
        kernels=ready.kernels,
        quantization=ready.quantization,
    )


def ready_from_wire(message: rank_pb2.EngineReady) -> EngineReady:
    return EngineReady(
        architecture=message.architecture,
        lanes=message.lanes,
        context_tokens=message.context_tokens,
        max_sequences=message.max_sequences,
        vocab_size=message.vocab_size,
        block_tokens=message.block_tokens,
        weights_digest=message.weights_digest,
        dtype=message.dtype,
        device=message.device,
        eos_token_ids=tuple(message.eos_token_ids),
        costs=EngineCosts(
            active_params=message.costs.active_params,
            shared_weight_bytes=message.costs.shared_weight_bytes,
            expert_bytes=message.costs.expert_bytes,
            num_layers=message.costs.num_layers,
            attention_dim=message.costs.attention_dim,
            kv_bytes_per_token=message.costs.kv_bytes_per_token,
        ),
        load=load_from_wire(message.load),
        kernels=message.kernels,
        quantization=message.quantization,
    )
