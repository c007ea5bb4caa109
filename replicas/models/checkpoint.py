"""A checkpoint folder's weights: which file holds a tensor, slices of tensors, and the digest of them all.

Only safetensors are read; a slice touches only its own bytes. The digest names the weights: two replicas
with equal digests may continue each other's sequences. Called while a rank loads; never after.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from replicas.errors import BadCheckpoint

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 2**20
_WHOLE_DIGEST_BYTES = 64 * 2**20
_SAMPLE_COUNT = 256
_SAMPLE_BYTES = 4096
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

Range = tuple[int, int]
"""First index and end of a slice along one dimension."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor is, and what it is, as the header of its file says."""

    file: Path
    shape: tuple[int, ...]
    size_bytes: int


class Checkpoint:
    """An open checkpoint folder. Use as a context manager; owns the open files.

    >>> with Checkpoint(folder) as checkpoint:
    ...     rows = checkpoint.read("lm_head.weight", (49155, 512), ((0, 24578), (0, 512)))
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _weight_files(folder)
        self.tensors: dict[str, StoredTensor] = {}
        for file in self._files:
            self._add_header(file)
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def read(self, name: str, shape: tuple[int, ...], part: tuple[Range, ...]) -> torch.Tensor:
        """One slice per dimension of tensor `name`, which must have `shape` in all."""
        stored = self.tensors.get(name)
        if stored is None:
            raise BadCheckpoint(f"{self.folder}: tensor {name} is missing; expected shape {shape}")
        if stored.shape != shape:
            raise BadCheckpoint(f"{stored.file}: tensor {name} has shape {stored.shape}; expected {shape}")
        try:
            if stored.file not in self._open:
                self._open[stored.file] = safe_open(stored.file, framework="pt", device="cpu")
            view = self._open[stored.file].get_slice(name)
            tensor = view[tuple(slice(start, end) for start, end in part)]
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"{stored.file}: tensor {name} cannot be read: {error}") from error
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def refuse_others(self, known: set[str]) -> None:
        """A tensor nobody read is a feature of the model nobody computes."""
        others = sorted(set(self.tensors) - known)
        if others:
            raise BadCheckpoint(
                f"{self.tensors[others[0]].file}: {len(others)} tensors have no place in this architecture, "
                f"first {others[0]}"
            )

    def digest(self) -> str:
        """32 hexadecimal digits: blake2b of config.json, the headers and the bytes of the files.

        Up to 64 MiB in all every byte counts; beyond, 256 evenly spaced samples of 4 KiB per file, so that
        a start-up does not read a checkpoint twice. Names of files do not count, their order does.
        """
        digest = hashlib.blake2b((self.folder / "config.json").read_bytes(), digest_size=16)
        is_whole = sum(file.stat().st_size for file in self._files) <= _WHOLE_DIGEST_BYTES
        for file in self._files:
            size_bytes = file.stat().st_size
            digest.update(size_bytes.to_bytes(8, "little"))
            with file.open("rb") as opened:
                if is_whole:
                    digest.update(opened.read())
                    continue
                digest.update(opened.read(8 + int.from_bytes(opened.read(8), "little")))
                for sample in range(_SAMPLE_COUNT):
                    opened.seek(max(0, size_bytes - _SAMPLE_BYTES) * sample // (_SAMPLE_COUNT - 1))
                    digest.update(opened.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def _add_header(self, file: Path) -> None:
        for name, entry in _read_header(file).items():
            if name in self.tensors:
                raise BadCheckpoint(f"{file}: tensor {name} is also in {self.tensors[name].file}")
            if entry["dtype"] not in _DTYPES:
                raise BadCheckpoint(
                    f"{file}: tensor {name} is {entry['dtype']}; served: {', '.join(_DTYPES)} (not quantised)"
                )
            shape = tuple(entry["shape"])
            size_bytes = math.prod(shape) * _DTYPES[entry["dtype"]]
            self.tensors[name] = StoredTensor(file=file, shape=shape, size_bytes=size_bytes)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise BadCheckpoint(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; other formats (.bin, .gguf) are not read: "
            "save the model again with save_pretrained"
        )
    try:
        weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{folder / _INDEX} has no readable weight_map: {error!r}") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise BadCheckpoint(f"{folder / _INDEX} names {name!r}, which is no file of the folder")
    return [folder / name for name in names]


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """A safetensors file starts with the length of its JSON header, 8 bytes little-endian."""
    try:
        with file.open("rb") as opened:
            size_bytes = int.from_bytes(opened.read(8), "little")
            if size_bytes > _MAX_HEADER_BYTES:
                raise ValueError(f"header of {size_bytes} bytes; at most {_MAX_HEADER_BYTES}")
            header = json.loads(opened.read(size_bytes))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + size_bytes + max(map(_end_of, tensors.values()), default=0)
        if file.stat().st_size < end:
            raise ValueError(f"{file.stat().st_size} bytes on disk, {end} expected: the file was cut short")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{file} is not a readable safetensors file: {error}") from error
    return tensors


def _end_of(entry: dict[str, Any]) -> int:
    """Where its bytes end. Raises KeyError or TypeError for what is no entry of a tensor."""
    if not isinstance(entry["dtype"], str) or not all(isinstance(size, int) for size in entry["shape"]):
        raise TypeError(f"dtype {entry['dtype']!r} and shape {entry['shape']!r} are of no tensor")
    return int(entry["data_offsets"][1])
