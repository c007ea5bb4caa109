"""torch's own variable-length attention over pages, where this torch has it: an alternative to our kernels.

`torch.nn.attention.varlen.varlen_attn` takes a block table in newer versions only, so its signature is asked,
not its version; what of it can serve at all is decided in `replicas/attention_choice.py`. Inside it is
FlashAttention 2, and three things about that are as they are below for a reason:

- `num_splits=1`. A context split over programs is put together wrongly over pages: rows of all sequences but
  the first are never written (pytorch issue 194167), and what torch chooses by itself may be a split. One
  split also gives a row the same sum whatever its batch. The price is a long context in a small batch.
- `cu_seq_k` is given, though lengths and tables say it all: without it the call is refused.
- Decode rows are attended to without a mask. Their one query is the last token and sees all, and only without
  a mask are the query heads of a KV head folded together, so that its pages are read once.

Needs no Triton. Shape letters: T tokens, B sequences, P pages, N query heads, D head_dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import torch
from torch.nn import functional

from replicas.attention_choice import VarlenFacts, varlen_refusal
from replicas.layers.triton.sequences import DeviceSequences

_NEEDED = {"block_table", "seqused_k", "enable_gqa", "scale", "window_size", "num_splits"}
_CAUSAL = (-1, 0)
_WHOLE = (-1, -1)

VarlenAttention = Callable[..., torch.Tensor]


@cache
def find_varlen() -> VarlenAttention | None:
    """The function, if it has all that pages need."""
    return None if _lacks() else _import_varlen()


def varlen_facts(
    dtype: torch.dtype, device: torch.device, *, block_tokens: int, head_dim: int
) -> VarlenFacts:
    """What speaks for and against it on a rank of this device.

    torch's function is looked at last: importing it takes two seconds, and brings torch's compiler along.
    """
    facts = VarlenFacts(
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        block_tokens=block_tokens,
        head_dim=head_dim,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0),
        lacks="",
    )
    return facts if varlen_refusal(facts) else replace(facts, lacks=_lacks())


@cache
def _lacks() -> str:
    """What this torch has not got that attention over pages needs, in words; empty: nothing."""
    attend = _import_varlen()
    if attend is None:
        return f"torch {torch.__version__} has no varlen attention: use a newer torch"
    missing = sorted(_NEEDED - set(inspect.signature(attend).parameters))
    if not missing:
        return ""
    return f"varlen_attn of torch {torch.__version__} takes no {', '.join(missing)}: use a newer torch"


def _import_varlen() -> VarlenAttention | None:
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 (not in every torch)
    except ImportError:
        return None
    return cast(VarlenAttention, varlen_attn)


@dataclass(frozen=True, slots=True, kw_only=True)
class VarlenPart:
    """The decode rows of a step, or its chunks; int32 tensors, made once per step, for all layers.

    `starts_B1` and `cached_B1` are cumulative counts, of queries and of cached tokens. The integers bound
    queries and cached tokens of a sequence; they are fixed in a captured graph.
    """

    tables_BP: torch.Tensor
    lengths_B: torch.Tensor
    starts_B1: torch.Tensor
    cached_B1: torch.Tensor
    max_chunk_tokens: int
    max_context_tokens: int


def decode_part(sequences: DeviceSequences) -> VarlenPart:
    """Of the decode rows, one query each."""
    decodes = sequences.num_decodes
    lengths_B = sequences.lengths_B[:decodes]
    return VarlenPart(
        tables_BP=sequences.tables_BP[:decodes],
        lengths_B=lengths_B,
        starts_B1=torch.arange(decodes + 1, dtype=torch.int32, device=lengths_B.device),
        cached_B1=_cumulate(lengths_B),
        max_chunk_tokens=1,
        max_context_tokens=sequences.max_context_tokens,
    )


def chunk_part(sequences: DeviceSequences) -> VarlenPart:
    """Of the prompt chunks, whose queries follow those of the decode rows."""
    decodes = sequences.num_decodes
    lengths_B = sequences.lengths_B[decodes:]
    return VarlenPart(
        tables_BP=sequences.tables_BP[decodes:],
        lengths_B=lengths_B,
        starts_B1=sequences.starts_C1 - decodes,
        cached_B1=_cumulate(lengths_B),
        max_chunk_tokens=sequences.max_chunk_tokens,
        max_context_tokens=sequences.max_context_tokens,
    )


def varlen_attention(
    attend: VarlenAttention,
    q_TND: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    part: VarlenPart,
    *,
    scale: float,
) -> torch.Tensor:
    """[T, N, D] of the part's own queries. Keys and values as `PagedKV` has them."""
    return attend(
        q_TND,
        keys,
        values,
        part.starts_B1,
        part.cached_B1,
        part.max_chunk_tokens,
        part.max_context_tokens,
        scale=scale,
        window_size=_WHOLE if part.max_chunk_tokens == 1 else _CAUSAL,
        enable_gqa=keys.shape[2] != q_TND.shape[1],
        seqused_k=part.lengths_B,
        block_table=part.tables_BP,
        num_splits=1,
    )


def _cumulate(lengths_B: torch.Tensor) -> torch.Tensor:
    return functional.pad(lengths_B.cumsum(0, dtype=torch.int32), (1, 0))
