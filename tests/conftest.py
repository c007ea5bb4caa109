"""Guards for every test: unit and property tests cannot reach Ray, a network beyond loopback, or CUDA."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    # Read when Triton is first imported, by whichever test file comes first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

PURE_FOLDERS = {"unit", "property"}
LOOPBACK = {"127.0.0.1", "::1", "localhost", ""}


@pytest.fixture(autouse=True)
def no_outside_world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A unit test that starts Ray, leaves loopback or asks for CUDA fails with a sentence."""
    folders = set(Path(str(request.node.path)).parts)
    if not folders & PURE_FOLDERS:
        yield
        return
    real_connect = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            pytest.fail(f"a unit test dialled {address}")
        real_connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if "ray" in sys.modules:  # Importing it here would cost every test a second.
        monkeypatch.setattr(sys.modules["ray"], "init", _refuse_ray)
    yield


def _refuse_ray(*_args: object, **_kwargs: object) -> None:
    pytest.fail("a unit test started Ray")
