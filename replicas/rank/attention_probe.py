"""Tries and times both kinds of paged attention on a rank's own device, once, while a replica starts.

All ranks of a group call `settle_attention` together and come to the same choice, that of the slowest rank.
Which facts and times lead to which choice is `replicas/attention_choice.py`. A trial compares both kinds on
ragged sequences in shuffled pages; what is not equal to rounding is neither timed nor served. Called by
`runner.py` before the first graph is captured, and by the GPU check. Shape letters: T tokens, N query heads,
D head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from replicas.attention_choice import (
    NEVER_NS,
    TRITON_ALONE,
    VARLEN_ALONE,
    AttentionChoice,
    Timing,
    VarlenFacts,
    choose_attention,
    pick_faster,
    probed_rows,
    varlen_refusal,
)
from replicas.config import EngineLimits
from replicas.layers.attention import PagedKV, PagedSequences
from replicas.layers.triton.sequences import DeviceSequences
from replicas.layers.triton.varlen import varlen_facts
from replicas.parallel.collectives import Collectives
from replicas.rank.batch import Ints

if TYPE_CHECKING:  # Needs Triton.
    from replicas.layers.triton.page_attention import PageAttention

logger = logging.getLogger(__name__)

_MOST_ERROR_EPSILONS = 4
"""Both kinds round, relative to the largest value."""


class Clock(Protocol):
    """How long a run takes; `DeviceClock` is the one."""

    def time_ns(self, run: Callable[[], object], *, is_decode: bool) -> int:
        """Of one run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedSteps:
    """What the steps of a rank can be at their largest."""

    limits: EngineLimits
    num_heads: int
    context_tokens: int

    @property
    def most_rows(self) -> int:
        return min(self.limits.max_sequences, self.limits.step_tokens)


class AttentionProbe:
    """Times a layer's attention over the rank's own cache, which is read and not written. `facts` None: those
    of the cache and its device."""

    def __init__(
        self,
        pages: PageAttention,
        kv: PagedKV,
        steps: ProbedSteps,
        clock: Clock,
        facts: VarlenFacts | None = None,
    ) -> None:
        self._triton = pages.having(TRITON_ALONE)
        self._varlen = pages.having(VARLEN_ALONE)
        self._keys, self._values = kv.keys[0], kv.values[0]
        self._steps = steps
        self._clock = clock
        _, page, _, head_dim = self._keys.shape
        self._facts = facts or varlen_facts(
            self._keys.dtype, self._keys.device, block_tokens=page, head_dim=head_dim
        )

    @property
    def device(self) -> torch.device:
        return self._keys.device

    def refusal(self) -> str:
        """Why varlen must not serve, by facts and then by a trial on pages of its own; empty: it is right."""
        if refusal := varlen_refusal(self._facts):
            return refusal
        try:
            error = self._error()
        except (RuntimeError, ValueError) as refused:
            return f"varlen refuses: {' '.join(str(refused).split())[:200]}"
        limit = _MOST_ERROR_EPSILONS * torch.finfo(self._keys.dtype).eps
        if error <= limit:
            return ""
        return f"varlen is off by {error:.2g} of the largest value of the Triton kernels; at most {limit:.2g}"

    def decode_timings(self) -> tuple[Timing, ...]:
        """Per batch size, over contexts as long as that many sequences may have at once."""
        page, num_blocks = self._keys.shape[1], self._keys.shape[0] - 1
        timings = []
        for rows in probed_rows(self._steps.most_rows):
            room_tokens = page * max(1, num_blocks // rows)
            length = min(self._steps.context_tokens, room_tokens)
            sequences = self._lay_out([(length - 1, 1)] * rows)
            # As a graph has it, which serves every context.
            sequences = replace(sequences, max_context_tokens=self._steps.context_tokens)
            timings.append(self._time(sequences, rows=rows, num_tokens=rows))
        return tuple(timings)

    def chunk_timing(self) -> Timing:
        """The largest chunk, behind as many tokens where context and cache allow."""
        page, num_blocks = self._keys.shape[1], self._keys.shape[0] - 1
        most_tokens = min(self._steps.context_tokens, page * num_blocks)
        chunk = min(self._steps.limits.step_tokens, most_tokens)
        before = min(chunk, most_tokens - chunk)
        return self._time(self._lay_out([(before, chunk)]), rows=0, num_tokens=chunk)

    def _time(self, sequences: DeviceSequences, *, rows: int, num_tokens: int) -> Timing:
        q_TND = self._queries(num_tokens)

        def time_ns(pages: PageAttention) -> int:
            pages.begin(sequences)
            run = partial(pages.attend, q_TND, self._keys, self._values)
            return self._clock.time_ns(run, is_decode=rows > 0)

        triton_ns = time_ns(self._triton)
        try:
            varlen_ns = time_ns(self._varlen)
        except (RuntimeError, ValueError):
            varlen_ns = NEVER_NS
        return Timing(rows=rows, triton_ns=triton_ns, varlen_ns=varlen_ns)

    def _error(self) -> float:
        """The largest difference between the two kinds, over the largest value: decode rows beside chunks."""
        page = self._keys.shape[1]
        contexts = [
            *((0, 1), (page, 1), (2 * page + page // 2, 1)),
            *((0, page // 2 + 1), (page + 3, 5), (3, 2 * page)),
        ]
        num_blocks = 1 + sum(-(-(before + new) // page) for before, new in contexts)
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(3)).numpy() + 1
        sequences = self._lay_out(contexts, order)
        shape = (num_blocks, *self._keys.shape[1:])
        keys, values = self._random(shape, seed=1), self._random(shape, seed=2)
        q_TND = self._queries(sum(new for _, new in contexts))
        answers = []
        for pages in (self._triton, self._varlen):
            pages.begin(sequences)
            answers.append(pages.attend(q_TND, keys, values).double())
        expected, actual = answers
        # NaN compares as the largest of all.
        error = ((actual - expected).abs().max() / expected.abs().max()).item()
        return error if error == error else float("inf")

    def _lay_out(self, contexts: Sequence[tuple[int, int]], order: Ints | None = None) -> DeviceSequences:
        """`contexts` are tokens before and new ones, decode rows first. Blocks in `order`; None: from 1 on,
        and again where there are fewer than asked for."""
        page = self._keys.shape[1]
        before, new = np.asarray(contexts, dtype=np.int64).T
        counts = -(-(before + new) // page)
        if order is None:
            order = 1 + np.arange(counts.sum(), dtype=np.int64) % (self._keys.shape[0] - 1)
        tables: Ints = np.zeros((len(contexts), counts.max()), dtype=np.int64)
        tables[np.arange(counts.max()) < counts[:, None]] = order
        starts = np.cumsum(new) - new
        return DeviceSequences.from_paged(
            PagedSequences(
                rows_B4=np.stack((starts, new, before, np.arange(len(contexts))), 1), tables=tables
            ),
            block_tokens=page,
            device=self._keys.device,
        )

    def _queries(self, num_tokens: int) -> torch.Tensor:
        return self._random((num_tokens, self._steps.num_heads, self._keys.shape[3]), seed=4)

    def _random(self, shape: tuple[int, ...], *, seed: int) -> torch.Tensor:
        device = self._keys.device
        generator = torch.Generator(device=device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=device).to(self._keys.dtype)


def settle_attention(asked: str, probe: AttentionProbe, collectives: Collectives) -> AttentionChoice:
    """The choice of all ranks, which call this together. BadKernels where varlen is asked for and refused."""
    refusal = ""
    if asked != "triton":
        refusal = probe.refusal()
        mine = torch.tensor([bool(refusal)], dtype=torch.int64, device=probe.device)
        if collectives.all_gather(mine).any() and not refusal:
            refusal = "another rank of the group refuses it: its log says why"
    choice = choose_attention(asked, refusal) or _fastest(probe, collectives)
    logger.info("attention rank=%d asked=%s %s", collectives.rank, asked, choice)
    return choice


def _fastest(probe: AttentionProbe, collectives: Collectives) -> AttentionChoice:
    """By the times of the slowest rank."""
    mine = (*probe.decode_timings(), probe.chunk_timing())
    times_ns = [[one.triton_ns, one.varlen_ns] for one in mine]
    gathered = collectives.all_gather(torch.tensor(times_ns, dtype=torch.int64, device=probe.device))
    *decodes, chunk = (
        replace(one, triton_ns=triton_ns, varlen_ns=varlen_ns)
        for one, (triton_ns, varlen_ns) in zip(mine, gathered.amax(0).tolist(), strict=True)
    )
    return pick_faster(decodes, chunk)
