"""Who attends to the pages of a CUDA device: our Triton kernels, or torch's variable-length attention. Pure.

`triton` and `varlen` are done as asked or refused with the reason: by what the configuration says
(`check_attention`), then by what device and torch have (`varlen_refusal`), both before weights are loaded,
then by a trial. `auto` is Triton wherever varlen cannot be; where it can, `rank/attention_probe.py` times
both on the rank's own cache while the replica starts, and `pick_faster` decides. It decides between what was
found equal to rounding; but the two do round differently, so replicas that choose differently may draw
different tokens. Half precision promises no more than that, here as anywhere; float32 is always Triton's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from replicas.errors import BadKernels

ATTENTIONS = ("auto", "triton", "varlen")
VARLEN_PAGE_TOKENS = 256
"""FlashAttention 2, which is what torch has inside, reads pages of a multiple of this."""
_DTYPES = ("bfloat16", "float16")
_LEAST_CAPABILITY = (8, 0)
_HEAD_DIM_STEP = 8
_MOST_HEAD_DIM = 256
_LEAST_GAIN_PERCENT = 10
"""What varlen must be faster by: a tie, or the noise of a start, must not decide how a replica rounds."""
_PROBED_ROWS = (1, 8, 64, 256)

NEVER_NS = 2**62
"""The time of what refuses to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VarlenFacts:
    """What decides whether torch's varlen attention could serve a rank.

    `lacks` is what torch's function has not got, in words; empty: nothing. `dtype` is also that of the cache.
    """

    device: str
    dtype: str
    block_tokens: int
    head_dim: int
    capability: tuple[int, int]
    lacks: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionChoice:
    """Varlen takes decode steps of at least `varlen_rows` rows (None: none), and with `varlen_chunks` prompt
    chunks; Triton has the rest."""

    varlen_rows: int | None = None
    varlen_chunks: bool = False
    reason: str = "as configured"

    def has_varlen_decode(self, num_rows: int) -> bool:
        """Whether a step with `num_rows` decode rows attends to them through varlen."""
        return self.varlen_rows is not None and num_rows >= self.varlen_rows

    @property
    def has_varlen(self) -> bool:
        return self.varlen_rows is not None or self.varlen_chunks

    def __str__(self) -> str:
        decode = "triton"
        if self.varlen_rows is not None:
            decode = "varlen" if self.varlen_rows == 1 else f"varlen from {self.varlen_rows} rows"
        return f"decode={decode} prefill={'varlen' if self.varlen_chunks else 'triton'} reason={self.reason}"


TRITON_ALONE = AttentionChoice()
VARLEN_ALONE = AttentionChoice(varlen_rows=1, varlen_chunks=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Attention of one layer, of `rows` decode rows or, with 0, of a prompt chunk."""

    rows: int
    triton_ns: int
    varlen_ns: int

    @property
    def has_gain(self) -> bool:
        """Whether varlen is faster by enough."""
        return 100 * self.varlen_ns <= (100 - _LEAST_GAIN_PERCENT) * self.triton_ns

    def __str__(self) -> str:
        what = f"{self.rows} rows" if self.rows else "chunk"
        varlen = "refused" if self.varlen_ns == NEVER_NS else f"{self.varlen_ns / 1000:.1f}"
        return f"{what} {self.triton_ns / 1000:.1f}/{varlen}"


def check_attention(asked: str, *, device: str, dtype: str, kernels: str, block_tokens: int) -> None:
    """Raise BadKernels where a configuration can never have the attention it asks for. `device` and `dtype`
    may be `auto`."""
    if asked not in ATTENTIONS:
        raise BadKernels(f"attention is {asked!r}; one of {', '.join(ATTENTIONS)}")
    if asked == "auto":
        return
    if device.startswith("cpu"):
        raise BadKernels(f"attention is {asked!r}, but device is {device!r}; it needs cuda: set it to auto")
    if kernels == "off":
        raise BadKernels(f"attention is {asked!r}, but kernels is 'off'; it needs them: set kernels to auto")
    if asked == "varlen" and (refusal := _cache_refusal(dtype, block_tokens)):
        raise BadKernels(_refused(refusal))


def varlen_refusal(facts: VarlenFacts) -> str:
    """Why torch's varlen attention cannot serve a rank; empty: it can, as far as facts tell."""
    if facts.device != "cuda":
        return f"device is {facts.device!r}; torch's varlen attention runs on CUDA alone"
    if refusal := _cache_refusal(facts.dtype, facts.block_tokens):
        return refusal
    if facts.capability < _LEAST_CAPABILITY:
        return f"the device has capability {_dotted(facts.capability)}; at least {_dotted(_LEAST_CAPABILITY)}"
    if facts.head_dim % _HEAD_DIM_STEP or facts.head_dim > _MOST_HEAD_DIM:
        return (
            f"head_dim is {facts.head_dim}; varlen takes multiples of {_HEAD_DIM_STEP} up to {_MOST_HEAD_DIM}"
        )
    return facts.lacks


def choose_attention(asked: str, refusal: str) -> AttentionChoice | None:
    """What needs no measurement; None: `auto` where varlen can be. BadKernels: asked for, and refused."""
    if asked == "triton":
        return TRITON_ALONE
    if refusal and asked == "varlen":
        raise BadKernels(_refused(refusal))
    if refusal:
        return AttentionChoice(reason=refusal)
    return VARLEN_ALONE if asked == "varlen" else None


def probed_rows(most_rows: int) -> tuple[int, ...]:
    """Decode batches to measure, ascending; the last is `most_rows`.

    >>> probed_rows(128)
    (1, 8, 64, 128)
    """
    return (*(rows for rows in _PROBED_ROWS if rows < most_rows), most_rows)


def pick_faster(decodes: Sequence[Timing], chunk: Timing) -> AttentionChoice:
    """Varlen from the smallest measured batch on, from which it has a gain at all larger ones too."""
    varlen_rows = None
    for timing in sorted(decodes, key=lambda one: one.rows, reverse=True):
        if not timing.has_gain:
            break
        varlen_rows = timing.rows
    measured = ", ".join(map(str, (*decodes, chunk)))
    return AttentionChoice(
        varlen_rows=varlen_rows,
        varlen_chunks=chunk.has_gain,
        reason=f"measured us of triton/varlen: {measured}",
    )


def _refused(refusal: str) -> str:
    return f"attention is 'varlen', but {refusal} (or set attention to auto)"


def _cache_refusal(dtype: str, block_tokens: int) -> str:
    """What the type and the pages of the KV cache speak against."""
    if dtype not in ("auto", *_DTYPES):
        return f"dtype is {dtype!r}; varlen takes {' and '.join(_DTYPES)}: set dtype to bfloat16"
    if block_tokens % VARLEN_PAGE_TOKENS:
        return (
            f"limits.block_tokens is {block_tokens}; varlen reads pages of a multiple of "
            f"{VARLEN_PAGE_TOKENS} tokens: set it to {VARLEN_PAGE_TOKENS}"
        )
    return ""


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
