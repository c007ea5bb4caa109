"""A closed loop of streams over any engine: which request starts when, and what its client saw.

Standard library only: it runs beside our engine and inside every peer's own interpreter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from bench.record import RequestTimes
from bench.workload import Workload

HEAD_TOKENS = 16
"""The first tokens of an answer, kept to compare engines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One request to hand to the engine now. Late prompts are numbered after the others."""

    request_id: int
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(slots=True)
class _Stream:
    submitted_s: float
    token_times_s: list[float] = field(default_factory=list)
    head: list[int] = field(default_factory=list)


class Streams:
    """`concurrency` streams in flight, the next starts when one ends; late prompts come on top."""

    def __init__(self, workload: Workload, clock: Callable[[], float] = time.perf_counter) -> None:
        self._workload = workload
        self._clock = clock
        self._next_prompt = self._next_late = 0
        self._loop_tokens = 0
        self._live: dict[int, _Stream] = {}
        self._done: dict[int, RequestTimes] = {}
        self._start_s = clock()

    @property
    def is_done(self) -> bool:
        return len(self._done) == len(self._workload.prompts) + len(self._workload.late)

    def due(self) -> Iterator[Submission]:
        """The requests to submit now, each counted as submitted when it is handed out."""
        prompts, late = self._workload.prompts, self._workload.late
        while self._next_prompt < len(prompts) and self._in_loop() < self._workload.concurrency:
            request_id = self._next_prompt
            self._next_prompt += 1
            yield self._submit(request_id, prompts[request_id], self._workload.output_tokens)
        while self._next_late < len(late) and late[self._next_late].after_output_tokens <= self._loop_tokens:
            one = late[self._next_late]
            request_id = len(prompts) + self._next_late
            self._next_late += 1
            yield self._submit(request_id, one.prompt, one.output_tokens)

    def deliver(self, request_id: int, token_ids: Sequence[int], *, is_finished: bool) -> None:
        """Note new tokens of a request, now. Raises RuntimeError when it ends short or runs on."""
        stream = self._live[request_id]
        stream.token_times_s += [self._clock()] * len(token_ids)
        stream.head += token_ids[: HEAD_TOKENS - len(stream.head)]
        is_late = request_id >= len(self._workload.prompts)
        if not is_late:
            self._loop_tokens += len(token_ids)
        if not is_finished:
            return
        self._check_length(request_id, len(stream.token_times_s))
        self._done[request_id] = _times(self._live.pop(request_id), is_late=is_late)

    def times(self) -> tuple[RequestTimes, ...]:
        """Of the finished requests, in the order of their numbers."""
        return tuple(self._done[request_id] for request_id in sorted(self._done))

    def wall_s(self) -> float:
        """From the start to the last token of a finished request."""
        return max((one.last_token_s for one in self._done.values()), default=self._start_s) - self._start_s

    def _in_loop(self) -> int:
        return sum(request_id < len(self._workload.prompts) for request_id in self._live)

    def _submit(self, request_id: int, prompt: tuple[int, ...], output_tokens: int) -> Submission:
        self._live[request_id] = _Stream(self._clock())
        return Submission(request_id=request_id, prompt=tuple(prompt), output_tokens=output_tokens)

    def _check_length(self, request_id: int, received: int) -> None:
        late_index = request_id - len(self._workload.prompts)
        asked = (
            self._workload.output_tokens if late_index < 0 else self._workload.late[late_index].output_tokens
        )
        if received != asked:
            raise RuntimeError(f"request {request_id}: asked {asked} tokens, got {received}")


def _times(stream: _Stream, *, is_late: bool) -> RequestTimes:
    marks = stream.token_times_s
    return RequestTimes(
        submitted_s=stream.submitted_s,
        first_token_s=marks[0],
        last_token_s=marks[-1],
        output_tokens=len(marks),
        longest_gap_s=max((after - before for before, after in pairwise(marks)), default=0.0),
        is_late=is_late,
        head=tuple(stream.head),
    )
