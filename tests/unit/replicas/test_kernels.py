"""The compiled kernels: products against float64, the cache of the library, and what is left without one."""

from __future__ import annotations

import os
import platform
import shutil
import time
from pathlib import Path

import pytest
import torch

from replicas.layers.kernels import build
from replicas.layers.kernels.build import KernelsUnavailable, build_library
from replicas.layers.kernels.library import KernelPool, Storage, open_pool
from replicas.layers.quantize import rounded
from replicas.rank.sampler import peaks

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


BUILDS = {"native": (), "avx2": ("-mno-avx512f", "-O1"), "generic": ("-mno-avx2", "-mno-avx512f", "-O1")}
"""The library of this machine, and those of lesser ones."""


@pytest.fixture(scope="module", params=BUILDS if platform.machine() == "x86_64" else ["native"])
def pool(request: pytest.FixtureRequest) -> KernelPool:
    return KernelPool(2, build_library(more_flags=BUILDS[request.param]))


def test_a_lesser_machine_has_its_own_library() -> None:
    if platform.machine() != "x86_64":
        pytest.skip("names instruction sets of x86")
    assert KernelPool(1, build_library(more_flags=BUILDS["generic"])).instruction_set == "generic"
    assert KernelPool(1, build_library(more_flags=BUILDS["avx2"])).instruction_set in ("avx2", "generic")


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 12, 13, 40])
def test_a_product_is_exact_to_rounding_and_half_storage_changes_no_bit(
    pool: KernelPool, rows: int, num_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + num_tokens)
    weight = torch.randn(rows, 70, generator=generator).bfloat16().float()
    x = torch.randn(num_tokens, 70, generator=generator)
    half, whole = pool.pack(weight), pool.pack(weight, Storage.FLOAT32)
    assert half.panels.dtype == torch.bfloat16
    assert whole.panels.dtype == torch.float32
    y = pool.linear(x, whole)
    assert torch.equal(pool.linear(x, half), y)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 33, 200])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 13, 40])
def test_a_product_of_bytes_is_that_of_the_weights_they_stand_for(
    pool: KernelPool, rows: int, num_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + num_tokens)
    weight = torch.randn(rows, 70, generator=generator) * torch.rand(rows, 1, generator=generator)
    x = torch.randn(num_tokens, 70, generator=generator)
    packed = pool.pack(weight, Storage.INT8)
    assert packed.panels.dtype == torch.int8
    y = pool.linear(x, packed)
    torch.testing.assert_close(y.double(), x.double() @ rounded(weight).double().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", Storage)
def test_a_row_does_not_depend_on_the_rows_beside_it(pool: KernelPool, storage: Storage) -> None:
    """Neither on the tile that computes it: one or two rows take two panels at a time."""
    weight = pool.pack(torch.randn(80, 64, generator=torch.Generator().manual_seed(1)), storage)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
    whole = pool.linear(x, weight)
    for row in (0, 11, 12, 298):
        assert torch.equal(pool.linear(x[row : row + 1].contiguous(), weight)[0], whole[row])
        assert torch.equal(pool.linear(x[row : row + 2].contiguous(), weight), whole[row : row + 2])


@pytest.mark.parametrize(("width", "num_valid"), [(16, 3), (1040, 1031)])
def test_peaks_are_those_of_torch(pool: KernelPool, width: int, num_valid: int) -> None:
    """Of equals the first; none where a valid logit is not finite, whatever the padding holds."""
    logits_SV = torch.randn(6, width, generator=torch.Generator().manual_seed(width)).round(decimals=1)
    logits_SV[:, num_valid:] = -torch.inf
    for row, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits_SV[row, num_valid - 1 - row] = bad
    best_S, column_S = pool.peaks(logits_SV, num_valid)
    wanted_best_S, wanted_column_S = peaks(logits_SV, num_valid)
    assert best_S[:3].isnan().all()
    assert torch.equal(best_S[3:], wanted_best_S[3:])
    assert torch.equal(column_S[3:], wanted_column_S[3:])


def test_weights_that_are_not_bfloat16_keep_all_their_bits(pool: KernelPool) -> None:
    assert pool.pack(torch.full((4, 4), 0.1)).panels.dtype == torch.float32


def test_an_idle_pool_uses_no_cpu() -> None:
    pool = KernelPool(4)
    weight = pool.pack(torch.randn(512, 64))
    pool.linear(torch.randn(4, 64), weight)
    before = sum(os.times()[:2])
    time.sleep(0.5)
    assert sum(os.times()[:2]) - before < 0.2
    pool.close()


def test_the_library_is_compiled_once(tmp_path: Path) -> None:
    first = build_library(tmp_path)
    stamp = first.stat().st_mtime_ns
    assert build_library(tmp_path) == first
    assert first.stat().st_mtime_ns == stamp
    assert [one.name for one in tmp_path.iterdir()] == [first.name]


def test_without_a_compiler_there_is_no_pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(KernelsUnavailable, match="no C compiler"):
        build_library(tmp_path)
    assert open_pool(1) is None


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "FLAGS", ("-no-such-flag",))
    with pytest.raises(KernelsUnavailable, match="no-such-flag"):
        build_library(tmp_path)
