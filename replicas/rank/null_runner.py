"""The engine without a model: token = hash of the sequence's beginning, its newest token, and the position.

For tests, rehearsals and benchmarks of everything around an engine: it takes its time (without using any
processor), draws end-of-sequence tokens, and fails or hangs on order. No torch.

It keeps a KV cache whose entry for a position is the token itself, written and read through block tables as
a model does it. So its tokens are right only if every plan was: a block given to two sequences, a lost
chunk or a wrong placeholder changes what comes out. They depend on nothing but the sequence so far, whatever
the batch, the chunks, a preemption or a failover that resubmits prompt and delivered tokens.
"""

from __future__ import annotations

import struct
import threading
import time
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from replicas.config import EngineLimits, NullEngineConfig, RankConfig
from replicas.plan import (
    LAST_SAMPLED,
    BuiltRunner,
    EngineShape,
    PlannedRow,
    Progress,
    StepOutcome,
    StepPlan,
)
from replicas.request import EngineCosts, SamplingParams, TokenLogprobs

EOS_TOKEN_ID = 2
FIRST_PLAIN_TOKEN_ID = 3
MIN_VOCAB_SIZE = 4
PREFIX_TOKENS = 8
"""How many of the first tokens the hash sees."""
IMPOSSIBLE = -100.0
"""Logprob of a prompt's token that the hash would not have said."""
NS_PER_S = 1e9
NS_PER_MS = 1e6
_NEWEST = struct.Struct("=qi")

# The size of a small Llama, so that energy shares come out plausible.
NULL_COSTS = EngineCosts(
    active_params=1_000_000_000,
    shared_weight_bytes=2_000_000_000,
    expert_bytes=0,
    num_layers=16,
    attention_dim=2048,
    kv_bytes_per_token=32_768,
)


@dataclass(slots=True, kw_only=True)
class _Row:
    """What the runner remembers of a row of the batch; `first_slot` is where the cache of its lane begins."""

    first_slot: int
    seed: int
    num_logprobs: int | None = None
    blocks: list[int] = field(default_factory=list)
    last_sampled: int = LAST_SAMPLED


@dataclass(frozen=True, slots=True, kw_only=True)
class _NullStep:
    """A step that is done at `done_ns`; None: never."""

    outcome: StepOutcome
    done_ns: int | None
    clock: Callable[[], int]

    def result(self) -> StepOutcome:
        if self.done_ns is None:
            threading.Event().wait()
        elif (left_ns := self.done_ns - self.clock()) > 0:
            time.sleep(left_ns / NS_PER_S)
        return self.outcome


class NullRunner:
    """Owns a KV cache of token ids and the rows of the batch."""

    def __init__(
        self,
        config: NullEngineConfig,
        limits: EngineLimits,
        *,
        num_lanes: int = 1,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if config.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"null.vocab_size is {config.vocab_size}; at least {MIN_VOCAB_SIZE}")
        num_blocks = limits.num_blocks or limits.host_kv_bytes // (
            limits.block_tokens * NULL_COSTS.kv_bytes_per_token
        )
        self._config = config
        self._clock = clock
        self._poison = config.fail_at_token or None
        self._block_tokens = limits.block_tokens
        self._lane_tokens = num_blocks * limits.block_tokens
        self._lane_rows = limits.max_sequences
        self._kv = array("i", bytes(4 * num_lanes * self._lane_tokens))
        self._rows: dict[int, _Row] = {}
        self._busy_until_ns = 0
        self.shape = EngineShape(
            architecture="null",
            vocab_size=config.vocab_size,
            context_tokens=config.context_tokens,
            num_blocks=num_blocks,
            eos_token_ids=(EOS_TOKEN_ID,),
            weights_digest=f"null-1-{config.vocab_size}-{config.eos_every}",
            dtype="int32",
            device="null",
            costs=NULL_COSTS,
            kernels="null",
            scores_prompts=True,
        )

    def launch(self, plan: StepPlan) -> _NullStep:
        """Tokens are computed here and now; `result` only waits until the step would be over."""
        if plan.step == self._config.fail_at_step:
            raise RuntimeError(f"the null engine was told to fail at step {plan.step}")
        for row in plan.freed_rows:
            del self._rows[row]
        for new in plan.new_rows:
            sampling = new.sampling
            self._rows[new.row] = _Row(
                first_slot=new.row // self._lane_rows * self._lane_tokens,
                seed=0 if sampling.is_greedy else _hash_sampling(sampling),
                num_logprobs=sampling.num_logprobs,
            )
        sampled = [(self._run_row(row), self._rows[row.row]) for row in plan.rows if self._write(row)]
        outcome = StepOutcome(
            sampled_ids=tuple([token_id for token_id, _ in sampled]),
            logprobs=_certainties(sampled),
            scores=self._scores(plan) if plan.scored else (),
        )
        done_ns = None if plan.step == self._config.hang_at_step else self._done_ns(plan)
        return _NullStep(outcome=outcome, done_ns=done_ns, clock=self._clock)

    def close(self) -> None:
        self._rows.clear()

    def _write(self, planned: PlannedRow) -> bool:
        """Put the row's tokens into the cache; says whether the row samples."""
        row = self._rows[planned.row]
        row.blocks += planned.new_blocks
        for pos, planned_id in enumerate(planned.token_ids, planned.start_pos):
            token_id = row.last_sampled if planned_id == LAST_SAMPLED else planned_id
            if token_id == self._poison:
                raise RuntimeError(f"the null engine was told to fail at token {token_id}")
            self._kv[self._slot(row, pos)] = token_id
        return planned.samples

    def _run_row(self, planned: PlannedRow) -> int:
        """The token after the row's newest."""
        row = self._rows[planned.row]
        row.last_sampled = self._token_at(row, planned.start_pos + len(planned.token_ids))
        return row.last_sampled

    def _token_at(self, row: _Row, pos: int) -> int:
        """The token that follows the first `pos` of a row."""
        prefix = [self._kv[self._slot(row, each)] for each in range(min(PREFIX_TOKENS, pos))]
        newest = self._kv[self._slot(row, pos - 1)]
        return null_token(prefix, newest, pos, row.seed, self._config)

    def _scores(self, plan: StepPlan) -> tuple[TokenLogprobs, ...]:
        """What the hash would have said is certain, anything else next to impossible."""
        planned = {row.row: row for row in plan.rows}
        scores = []
        for scored in plan.scored:
            chunk, row = planned[scored.row], self._rows[scored.row]
            targets = scored.targets(chunk.token_ids)
            for pos, target in enumerate(targets, chunk.start_pos + 1):
                said = self._token_at(row, pos)
                top = ((said, 0.0),) if row.num_logprobs else ()
                scores.append(TokenLogprobs(logprob=0.0 if target == said else IMPOSSIBLE, top=top))
        return tuple(scores)

    def _slot(self, row: _Row, pos: int) -> int:
        page_tokens = self._block_tokens
        return row.first_slot + row.blocks[pos // page_tokens] * page_tokens + pos % page_tokens

    def _done_ns(self, plan: StepPlan) -> int:
        """Steps take their time one after another, like on a device."""
        duration_ns = self._config.step_ms * NS_PER_MS
        num_prefill = sum(len(row.token_ids) for row in plan.rows if len(row.token_ids) > 1)
        if self._config.prefill_tokens_per_s > 0:
            duration_ns += num_prefill * NS_PER_S / self._config.prefill_tokens_per_s
        self._busy_until_ns = max(self._busy_until_ns, self._clock()) + int(duration_ns)
        return self._busy_until_ns


def build_runner(config: RankConfig, progress: Progress) -> BuiltRunner:
    """The factory `rank/main.py` looks for; every rank of a null group computes the same tokens by itself."""
    runner = NullRunner(config.null, config.limits, num_lanes=config.parallel.num_lanes)
    progress("null", 1, 1)
    return BuiltRunner(runner=runner, shape=runner.shape)


def null_token(prefix: list[int], newest: int, pos: int, seed: int, config: NullEngineConfig) -> int:
    """The token at `pos` of a sequence that begins with `prefix` and has `newest` at `pos - 1`."""
    mixed = zlib.crc32(_NEWEST.pack(pos, newest), zlib.crc32(array("i", prefix).tobytes(), seed))
    if config.eos_every and mixed // config.vocab_size % config.eos_every == 0:
        return EOS_TOKEN_ID
    return FIRST_PLAIN_TOKEN_ID + mixed % (config.vocab_size - FIRST_PLAIN_TOKEN_ID)


def null_continuation(
    prompt_ids: tuple[int, ...], count: int, config: NullEngineConfig, sampling: SamplingParams | None = None
) -> tuple[int, ...]:
    """The `count` tokens that follow a prompt; what tests compare an engine's answer with."""
    seed = 0 if sampling is None or sampling.is_greedy else _hash_sampling(sampling)
    tokens = list(prompt_ids)
    for _ in range(count):
        tokens.append(null_token(tokens[:PREFIX_TOKENS], tokens[-1], len(tokens), seed, config))
    return tuple(tokens[len(prompt_ids) :])


def _certainties(sampled: list[tuple[int, _Row]]) -> tuple[TokenLogprobs | None, ...]:
    """A hash leaves no doubt: probability one, and no alternatives. Empty if no row asks."""
    if all(row.num_logprobs is None for _, row in sampled):
        return ()
    return tuple(
        None
        if row.num_logprobs is None
        else TokenLogprobs(logprob=0.0, top=((token_id, 0.0),) if row.num_logprobs else ())
        for token_id, row in sampled
    )


def _hash_sampling(sampling: SamplingParams) -> int:
    return zlib.crc32(sampling.seed.to_bytes(8, "little"))
