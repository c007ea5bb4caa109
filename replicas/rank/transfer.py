"""What crosses between host and device in a step: one copy down, one copy up, and nothing else.

`Upload` gathers the arrays a step needs and sends them as one packed copy; everything after it is computed on
the device. `Transfer` is how bytes travel: through pinned memory on CUDA, where a copy from ordinary memory
would wait for the stream. Only `Fetch.wait` waits. Called by `device_steps.py` and by whoever stages arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 16
"""Every array starts at a multiple of this: wide enough for any element, and for vector loads."""
_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


class Fetch(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Block until they are there; the one place where the host waits for the device."""


class Transfer(Protocol):
    """How bytes travel to a device, and tensors back. Neither call waits for the device."""

    def send(self, packed: Bytes) -> torch.Tensor:
        """The bytes on the device: uint8 of the same length. `packed` may be reused at once."""

    def fetch(self, tensors: tuple[torch.Tensor, ...]) -> Fetch:
        """Begin to copy `tensors`, as they are when the device comes this far."""


class CudaTransfer:
    """Copies through pinned memory on the current stream. PyTorch's pinned allocator gives a block to nobody
    else before the copies that use it are done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, packed: Bytes) -> torch.Tensor:
        pinned = torch.empty(len(packed), dtype=torch.uint8, pin_memory=True)
        pinned.numpy()[:] = packed
        return pinned.to(self._device, non_blocking=True)

    def fetch(self, tensors: tuple[torch.Tensor, ...]) -> Fetch:
        return _CudaFetch(tensors)


class _CudaFetch:
    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._pinned = tuple(_to_pinned(tensor) for tensor in tensors)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> tuple[torch.Tensor, ...]:
        self._event.synchronize()
        return self._pinned


class HostTransfer:
    """For a device that is the host itself."""

    def send(self, packed: Bytes) -> torch.Tensor:
        return torch.from_numpy(packed.copy())

    def fetch(self, tensors: tuple[torch.Tensor, ...]) -> Fetch:
        return _HostFetch(tensors=tuple(tensor.clone() for tensor in tensors))


@dataclass(frozen=True, slots=True, kw_only=True)
class _HostFetch:
    tensors: tuple[torch.Tensor, ...]

    def wait(self) -> tuple[torch.Tensor, ...]:
        return self.tensors


@dataclass(slots=True, kw_only=True)
class Part:
    """One array of an upload. Its tensor is there once the upload was sent."""

    array: Array
    sent: torch.Tensor | None = field(default=None)

    @property
    def tensor(self) -> torch.Tensor:
        assert self.sent is not None, "an upload is sent before its parts are used"
        return self.sent


class Upload:
    """The arrays of one step. Without a transfer the device is the host, and nothing is copied.

    >>> upload = Upload(transfer)
    >>> rows = upload.integers([3, 5])
    >>> upload.send()
    >>> rows.tensor  # int64 [2] on the device
    """

    def __init__(self, transfer: Transfer | None = None) -> None:
        self._transfer = transfer
        self._parts: list[Part] = []

    def add(self, array: Array) -> Part:
        """The contents of `array` when the upload is sent."""
        part = Part(array=np.ascontiguousarray(array))
        self._parts.append(part)
        return part

    def integers(self, values: npt.ArrayLike) -> Part:
        return self.add(np.asarray(values, dtype=np.int64))

    def floats(self, values: npt.ArrayLike) -> Part:
        return self.add(np.asarray(values, dtype=np.float32))

    def send(self) -> None:
        """One copy for all parts; called once."""
        if self._transfer is None:
            for part in self._parts:
                part.sent = torch.from_numpy(part.array)
            return
        starts, size_bytes = [], 0
        for part in self._parts:
            starts.append(size_bytes)
            size_bytes += -(-part.array.nbytes // _ALIGNMENT) * _ALIGNMENT
        packed: Bytes = np.zeros(size_bytes, dtype=np.uint8)
        for part, start in zip(self._parts, starts, strict=True):
            packed[start : start + part.array.nbytes] = part.array.reshape(-1).view(np.uint8)
        sent = self._transfer.send(packed)
        for part, start in zip(self._parts, starts, strict=True):
            flat = sent[start : start + part.array.nbytes].view(_DTYPES[part.array.dtype])
            part.sent = flat.view(part.array.shape)


def _to_pinned(values: torch.Tensor) -> torch.Tensor:
    """A copy that is complete once the stream has come this far."""
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values, non_blocking=True)
