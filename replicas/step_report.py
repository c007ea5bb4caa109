"""What a step gave as it travels, from rank 0 to the routers: most of a batch in columns, not in objects.

A sequence that goes on has one new token and nothing more to say. A supervisor passes on thousands of those a
second, and what it costs is the number of objects it makes of each. Plain data, no protobuf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeAlias

from replicas.request import CacheChange, LoadSnapshot, SequenceDelta, StepRecord, StepResult

TokenRun: TypeAlias = tuple[int, int, int, tuple[int, ...]]
"""Request id, attempt, offset of the first token among all of the request, tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenColumns:
    """New tokens of sequences of which there is no more to say. Parallel columns, one entry per run.

    `counts` says how many of `token_ids` belong to each run, in order; empty: one to each. Where the columns
    come from another process their lengths may differ: `runs` raises ValueError then.
    """

    request_ids: Sequence[int] = ()
    attempts: Sequence[int] = ()
    first_offsets: Sequence[int] = ()
    counts: Sequence[int] = ()
    token_ids: Sequence[int] = ()

    @classmethod
    def of(cls, runs: Sequence[TokenRun]) -> TokenColumns:
        tokens = [token_ids for _, _, _, token_ids in runs]
        token_ids = [token_id for each in tokens for token_id in each]
        return cls(
            request_ids=[run[0] for run in runs],
            attempts=[run[1] for run in runs],
            first_offsets=[run[2] for run in runs],
            counts=[] if all(len(each) == 1 for each in tokens) else [len(each) for each in tokens],
            token_ids=token_ids,
        )

    def __bool__(self) -> bool:
        return bool(self.token_ids)

    def __len__(self) -> int:
        """How many runs there are."""
        return len(self.request_ids)

    def runs(self) -> Iterator[TokenRun]:
        """Run by run, in order. Nothing here runs once per token in the interpreter."""
        return zip(self.request_ids, self.attempts, self.first_offsets, self._split(), strict=True)

    def deltas(self) -> list[SequenceDelta]:
        """An object of each run, for readers that are in no hurry."""
        return [
            SequenceDelta(
                request_id=request_id, attempt=attempt, first_offset=first_offset, token_ids=token_ids
            )
            for request_id, attempt, first_offset, token_ids in self.runs()
        ]

    def _split(self) -> Iterable[tuple[int, ...]]:
        if not self.counts:
            return zip(self.token_ids)
        token_ids = tuple(self.token_ids)
        if sum(self.counts) != len(token_ids):
            raise ValueError(f"{sum(self.counts)} tokens are counted, {len(token_ids)} are there")
        return [token_ids[start:end] for start, end in pairwise(accumulate(self.counts, initial=0))]


NO_TOKENS = TokenColumns()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """A `StepResult` on its way. `deltas` are those that say more than tokens; they come after `tokens`."""

    step: int
    load: LoadSnapshot
    record: StepRecord | None
    tokens: TokenColumns = NO_TOKENS
    deltas: tuple[SequenceDelta, ...] = ()
    cache: tuple[CacheChange, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.tokens.token_ids) + sum([len(delta.token_ids) for delta in self.deltas])

    def all_deltas(self) -> list[SequenceDelta]:
        """What it says of every sequence."""
        return [*self.tokens.deltas(), *self.deltas]


def report_of(result: StepResult) -> StepReport:
    """What rank 0 sends of a step."""
    runs: list[TokenRun] = []
    deltas = []
    for delta in result.deltas:
        if is_plain(delta):
            runs.append((delta.request_id, delta.attempt, delta.first_offset, delta.token_ids))
        else:
            deltas.append(delta)
    return StepReport(
        step=result.step,
        tokens=TokenColumns.of(runs),
        deltas=tuple(deltas),
        load=result.load,
        record=result.record,
        cache=result.cache,
    )


def is_plain(delta: SequenceDelta) -> bool:
    """Whether it has tokens and no more to say. What ends a sequence, or fails, has a finish reason."""
    has_more = delta.finish is not None or delta.logprobs or delta.prompt_logprobs
    return bool(delta.token_ids) and not has_more
