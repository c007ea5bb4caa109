"""The compiled kernels as Python sees them: C structures, a pool of threads, and packed matrices.

A `KernelPool` belongs to one rank; its workers look for work for 0.1 ms after the last and then sleep in the
kernel, so an idle rank uses no CPU. Shape letters: O outputs, I inputs, T tokens, R rows, C columns.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from pathlib import Path

import torch

from replicas.layers.huge_pages import HugeArena
from replicas.layers.kernels.build import KernelsUnavailable, build_library
from replicas.layers.quantize import quantize

_LOG = logging.getLogger(__name__)


class CMatrix(Structure):
    """`Matrix` of the C file."""

    _fields_ = [
        ("data", c_void_p),
        ("scales", c_void_p),
        *((name, c_long) for name in ("num_rows", "num_columns", "storage")),
    ]


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


class CLayer(Structure):
    """`Layer` of the C file."""

    _fields_ = [
        ("attention", POINTER(CAttentionLayer)),
        ("mlp", POINTER(CMlpLayer)),
        ("experts", POINTER(CExpertLayer)),
    ]


class Storage(Enum):
    """What the panels of a weight hold. `SMALLEST`: halves where that loses nothing, else floats."""

    FLOAT32 = auto()
    SMALLEST = auto()
    INT8 = auto()


_STORAGE_WORDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""`storage` of the C file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """A weight [O, I] in panels; `panels` and `scales` own the memory that `layout` points to."""

    panels: torch.Tensor
    scales: torch.Tensor | None
    layout: CMatrix

    @classmethod
    def of(
        cls, panels: torch.Tensor, scales: torch.Tensor | None = None, *, shape: tuple[int, int]
    ) -> PackedMatrix:
        """What was packed, here or on another rank, from a weight of `shape`."""
        layout = CMatrix(
            panels.data_ptr(),
            None if scales is None else scales.data_ptr(),
            *shape,
            _STORAGE_WORDS[panels.dtype],
        )
        return cls(panels=panels, scales=scales, layout=layout)

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.num_rows, self.layout.num_columns

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.panels,) if self.scales is None else (self.panels, self.scales)

    @property
    def num_bytes(self) -> int:
        return self.panels.nbytes + (0 if self.scales is None else self.scales.nbytes)


class KernelPool:
    """The threads of one rank: the calling one and `num_threads` - 1 workers. One call at a time."""

    def __init__(self, num_threads: int, library_path: Path | None = None) -> None:
        self.library = _load(library_path or build_library())
        self.handle: int = self.library.wl_pool_new(num_threads)
        if not self.handle:
            raise KernelsUnavailable("out of memory for the kernels' threads")
        self._arena = HugeArena()
        self.close = weakref.finalize(self, self.library.wl_pool_free, self.handle)

    @property
    def instruction_set(self) -> str:
        """What the library was compiled for: avx512, avx2, or generic."""
        return bytes(self.library.wl_instruction_set()).decode("ascii")

    @property
    def panel_rows(self) -> int:
        return int(self.library.wl_panel_rows())

    def pack(self, weight_OI: torch.Tensor, storage: Storage = Storage.SMALLEST) -> PackedMatrix:
        """Copy a float32 weight into panels."""
        scales = None
        if storage is Storage.INT8:
            quantized = quantize(weight_OI)
            scales = self._padded(quantized.scales_O)
            panels = self._panels(quantized.values_OI)
        elif storage is Storage.SMALLEST and _is_bfloat16(weight_OI):
            whole = self._panels(weight_OI.bfloat16())
            panels = whole.reshape(*whole.shape[:2], 2, self.panel_rows // 2).transpose(2, 3)
        else:
            panels = self._panels(weight_OI)
        rows, columns = weight_OI.shape
        return PackedMatrix.of(self._arena.copy(panels), scales, shape=(rows, columns))

    def _panels(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """[panel][input][row of the panel]; the last panel is filled up with zeros."""
        padded_OI = self._padded(weight_OI)
        return padded_OI.view(-1, self.panel_rows, weight_OI.shape[1]).transpose(1, 2)

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        missing = rows.new_zeros(-len(rows) % self.panel_rows, *rows.shape[1:])
        return torch.cat((rows, missing))

    def linear(self, x_TI: torch.Tensor, weight: PackedMatrix) -> torch.Tensor:
        """x @ weight.T of contiguous float32 rows."""
        y_TO = x_TI.new_empty((x_TI.shape[0], weight.layout.num_rows))
        self.library.wl_linear(
            self.handle, ctypes.byref(weight.layout), x_TI.data_ptr(), y_TO.data_ptr(), x_TI.shape[0]
        )
        return y_TO

    def peaks(self, x_RC: torch.Tensor, num_valid: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Best value and its first column, per contiguous row; NaN where one of `num_valid` is not finite."""
        num_rows, width = x_RC.shape
        assert x_RC.is_contiguous()
        best_R = x_RC.new_empty(num_rows)
        column_R = torch.empty(num_rows, dtype=torch.int64)
        self.library.wl_peaks(
            self.handle,
            x_RC.data_ptr(),
            num_rows,
            width,
            num_valid,
            best_R.data_ptr(),
            column_R.data_ptr(),
        )
        return best_R, column_R


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
        "wl_peaks": (None, (c_void_p, c_void_p, c_long, c_long, c_long, c_void_p, c_void_p)),
        "wl_attention": (
            None,
            (c_void_p, POINTER(CAttentionLayer), POINTER(CStep), c_void_p, c_void_p),
        ),
        "wl_mlp": (None, (c_void_p, POINTER(CMlpLayer), c_void_p, c_void_p, c_long, c_float)),
        "wl_experts": (c_long, (c_void_p, POINTER(CExpertLayer), c_void_p, c_void_p, c_long, c_float)),
        "wl_layers": (
            c_long,
            (c_void_p, POINTER(CLayer), c_long, POINTER(CStep), c_void_p, c_void_p, c_float),
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _is_bfloat16(weight: torch.Tensor) -> bool:
    """Whether the lower half of every float is zero."""
    return not bool((weight.contiguous().view(torch.int32) & 0xFFFF).any())
