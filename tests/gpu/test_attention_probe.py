"""What ranks settle on: varlen only where it is allowed, right and faster, and all of them the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (pip install 'wattline[gpu]')")

from replicas.attention_choice import (
    TRITON_ALONE,
    VARLEN_ALONE,
    VARLEN_PAGE_TOKENS,
    AttentionChoice,
    VarlenFacts,
)
from replicas.config import EngineLimits
from replicas.errors import BadKernels
from replicas.layers.attention import PagedKV
from replicas.layers.triton.page_attention import PageAttention
from replicas.layers.triton.varlen import VarlenAttention
from replicas.parallel.collectives import SoloCollectives
from replicas.rank.attention_probe import AttentionProbe, ProbedSteps, settle_attention
from tests.varlen_reference import varlen_reference

FACTS = VarlenFacts(
    device="cuda",
    dtype="float16",
    block_tokens=VARLEN_PAGE_TOKENS,
    head_dim=16,
    capability=(9, 0),
    lacks="",
)
STEPS = ProbedSteps(limits=EngineLimits(max_sequences=8, step_tokens=12), num_heads=4, context_tokens=24)


@dataclass(slots=True)
class ScriptedClock:
    """Runs what is to be timed once, and says the next of its times."""

    times_ns: list[int]
    is_decode: list[bool] = field(default_factory=list)

    def time_ns(self, run: Callable[[], object], *, is_decode: bool) -> int:
        run()
        self.is_decode.append(is_decode)
        return self.times_ns.pop(0)


class SecondRank(SoloCollectives):
    """The other rank of two says what it is told to, whatever this one does."""

    def __init__(self, *theirs: list[object]) -> None:
        super().__init__()
        self._theirs = list(theirs)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack((x, torch.tensor(self._theirs.pop(0), dtype=x.dtype, device=x.device)))


def make_probe(
    device: torch.device,
    *times_ns: int,
    varlen: VarlenAttention = varlen_reference,
    facts: VarlenFacts = FACTS,
) -> tuple[AttentionProbe, ScriptedClock]:
    kv = PagedKV(
        num_layers=2,
        num_blocks=7,
        block_tokens=4,
        num_kv_heads=2,
        head_dim=16,
        device=device,
        dtype=torch.float16,
    )
    clock = ScriptedClock(list(times_ns))
    return AttentionProbe(PageAttention(scale=0.25, find=lambda: varlen), kv, STEPS, clock, facts), clock


def first_sequence_alone(query: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
    """What several splits over pages come to: rows of later sequences are never written."""
    out = varlen_reference(query, *args, **options)  # type: ignore[arg-type]
    out[1:] = 0.0
    return out


def refuse(*args: object, **options: object) -> torch.Tensor:
    raise RuntimeError("Paged KV cache block size\nmust be divisible by 256")


def test_auto_takes_what_is_faster_at_each_size(device: torch.device) -> None:
    probe, clock = make_probe(device, 50_000, 90_000, 100_000, 80_000, 400_000, 300_000)
    assert settle_attention("auto", probe, SoloCollectives()) == AttentionChoice(
        varlen_rows=8,
        varlen_chunks=True,
        reason="measured us of triton/varlen: 1 rows 50.0/90.0, 8 rows 100.0/80.0, chunk 400.0/300.0",
    )
    assert clock.is_decode == [True] * 4 + [False] * 2


def test_the_slowest_rank_decides_for_all(device: torch.device) -> None:
    probe, _ = make_probe(device, 50_000, 90_000, 100_000, 80_000, 400_000, 300_000)
    other: list[object] = [[50_000, 90_000], [100_000, 99_000], [400_000, 200_000]]
    choice = settle_attention("auto", probe, SecondRank([0], other))
    assert (choice.varlen_rows, choice.varlen_chunks) == (None, True)


def test_one_rank_that_refuses_refuses_for_all(device: torch.device) -> None:
    probe, clock = make_probe(device)
    choice = settle_attention("auto", probe, SecondRank([1]))
    assert not choice.has_varlen
    assert choice.reason == "another rank of the group refuses it: its log says why"
    assert not clock.is_decode


@pytest.mark.parametrize(
    ("varlen", "reason"),
    [
        (first_sequence_alone, "varlen is off by "),
        (refuse, "varlen refuses: Paged KV cache block size must be divisible by 256"),
    ],
)
def test_what_is_wrong_or_refuses_is_not_timed(
    device: torch.device, varlen: VarlenAttention, reason: str
) -> None:
    probe, clock = make_probe(device, varlen=varlen)
    choice = settle_attention("auto", probe, SoloCollectives())
    assert not choice.has_varlen
    assert choice.reason.startswith(reason)
    assert not clock.is_decode
    with pytest.raises(BadKernels, match="attention is 'varlen', but varlen"):
        settle_attention("varlen", make_probe(device, varlen=varlen)[0], SoloCollectives())


def test_the_trial_is_not_begun_where_facts_refuse(device: torch.device) -> None:
    def never(*args: object, **options: object) -> torch.Tensor:
        raise AssertionError("nothing runs")

    facts = VarlenFacts(
        device="cuda", dtype="bfloat16", block_tokens=16, head_dim=16, capability=(9, 0), lacks=""
    )
    probe, _ = make_probe(device, varlen=never, facts=facts)
    choice = settle_attention("auto", probe, SoloCollectives())
    assert choice.reason == (
        "limits.block_tokens is 16; varlen reads pages of a multiple of 256 tokens: set it to 256"
    )


def test_what_is_asked_for_is_not_timed(device: torch.device) -> None:
    probe, clock = make_probe(device)
    assert settle_attention("triton", probe, SoloCollectives()) == TRITON_ALONE
    assert settle_attention("varlen", probe, SoloCollectives()) == VARLEN_ALONE
    assert not clock.is_decode
