"""The compiled kernels as Python sees them: C structures, a pool of threads, and packed matrices.

A `KernelPool` belongs to one rank; its workers look for work for 0.1 ms after the last and then sleep in the
kernel, so an idle rank uses no CPU. Shape letters: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional

from replicas.layers.kernels.build import KernelsUnavailable, build_library

_LOG = logging.getLogger(__name__)


class CMatrix(Structure):
    """`Matrix` of the C file."""

    _fields_ = [("data", c_void_p), ("num_rows", c_long), ("num_columns", c_long), ("is_half", c_long)]


class CAttentionLayer(Structure):
    """`AttentionLayer` of the C file."""

    _fields_ = [
        ("norm_weight", c_void_p),
        ("qkv", CMatrix),
        ("out", CMatrix),
        ("keys", c_void_p),
        ("values", c_void_p),
    ]


class CStep(Structure):
    """`Step` of the C file."""

    _fields_ = [
        *((name, c_long) for name in ("num_tokens", "num_sequences", "num_heads", "num_kv_heads")),
        *((name, c_long) for name in ("head_dim", "block_tokens", "table_stride")),
        *((name, c_void_p) for name in ("cosine", "signed_sine", "slots", "sequences", "tables")),
        ("eps", c_float),
        ("scale", c_float),
    ]


class CMlpLayer(Structure):
    """`MlpLayer` of the C file."""

    _fields_ = [("norm_weight", c_void_p), ("gate", CMatrix), ("up", CMatrix), ("down", CMatrix)]


class CExpertLayer(Structure):
    """`ExpertLayer` of the C file."""

    _fields_ = [
        ("norm_weight", c_void_p),
        ("router", CMatrix),
        *((name, POINTER(CMatrix)) for name in ("gate", "up", "down")),
        *((name, c_long) for name in ("num_choices", "first_expert", "num_local")),
        *((name, c_void_p) for name in ("tally", "copies", "slots")),
        ("num_ranks", c_long),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """A weight [O, I] in panels; `panels` owns the memory that `layout` points to."""

    panels: torch.Tensor
    layout: CMatrix


class KernelPool:
    """The threads of one rank: the calling one and `num_threads` - 1 workers. One call at a time."""

    def __init__(self, num_threads: int, library_path: Path | None = None) -> None:
        self.library = _load(library_path or build_library())
        self.handle: int = self.library.wl_pool_new(num_threads)
        if not self.handle:
            raise KernelsUnavailable("out of memory for the kernels' threads")
        self.close = weakref.finalize(self, self.library.wl_pool_free, self.handle)

    @property
    def instruction_set(self) -> str:
        """What the library was compiled for: avx512, avx2, or generic."""
        return bytes(self.library.wl_instruction_set()).decode("ascii")

    @property
    def panel_rows(self) -> int:
        return int(self.library.wl_panel_rows())

    def pack(self, weight_OI: torch.Tensor, *, keeps_half: bool = True) -> PackedMatrix:
        """Copy a float32 weight into panels; half the bytes, and the same values, where all are bfloat16."""
        rows, columns = weight_OI.shape
        panel_rows = self.panel_rows
        padded_OI = functional.pad(weight_OI, (0, 0, 0, -rows % panel_rows))
        panels = padded_OI.view(-1, panel_rows, columns).transpose(1, 2)
        is_half = keeps_half and _is_bfloat16(weight_OI)
        if is_half:
            halves = panels.to(torch.bfloat16)
            panels = halves.reshape(-1, columns, 2, panel_rows // 2).transpose(2, 3)
        panels = panels.contiguous()
        layout = CMatrix(panels.data_ptr(), rows, columns, int(is_half))
        return PackedMatrix(panels=panels, layout=layout)

    def adopt(self, panels: torch.Tensor, *, like: PackedMatrix) -> PackedMatrix:
        """Panels that another rank packed, of a weight of the same shape."""
        rows, columns = like.layout.num_rows, like.layout.num_columns
        is_half = panels.dtype == torch.bfloat16
        layout = CMatrix(panels.data_ptr(), rows, columns, int(is_half))
        return PackedMatrix(panels=panels, layout=layout)

    def linear(self, x_TI: torch.Tensor, weight: PackedMatrix) -> torch.Tensor:
        """x @ weight.T of contiguous float32 rows."""
        y_TO = x_TI.new_empty((x_TI.shape[0], weight.layout.num_rows))
        self.library.wl_linear(
            self.handle, ctypes.byref(weight.layout), x_TI.data_ptr(), y_TO.data_ptr(), x_TI.shape[0]
        )
        return y_TO


def open_pool(num_threads: int) -> KernelPool | None:
    """A pool, or None where the kernels cannot be built; the reason is logged once."""
    try:
        return KernelPool(num_threads)
    except KernelsUnavailable as reason:
        _LOG.warning("cpu_kernels_unavailable: torch computes instead: %s", reason)
        return None


@cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"{path} does not load: {error}") from error
    signatures: dict[str, tuple[object, tuple[object, ...]]] = {
        "wl_pool_new": (c_void_p, (c_int,)),
        "wl_pool_free": (None, (c_void_p,)),
        "wl_instruction_set": (c_char_p, ()),
        "wl_panel_rows": (c_int, ()),
        "wl_linear": (None, (c_void_p, POINTER(CMatrix), c_void_p, c_void_p, c_long)),
        "wl_head": (
            None,
            (c_void_p, c_void_p, POINTER(CMatrix), c_void_p, c_void_p, c_long, c_float),
        ),
        "wl_attention": (
            None,
            (c_void_p, POINTER(CAttentionLayer), POINTER(CStep), c_void_p, c_void_p),
        ),
        "wl_mlp": (None, (c_void_p, POINTER(CMlpLayer), c_void_p, c_void_p, c_long, c_float)),
        "wl_experts": (c_long, (c_void_p, POINTER(CExpertLayer), c_void_p, c_void_p, c_long, c_float)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _is_bfloat16(weight: torch.Tensor) -> bool:
    """Whether the lower half of every float is zero."""
    return not bool((weight.contiguous().view(torch.int32) & 0xFFFF).any())
