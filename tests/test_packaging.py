"""The wheel: our four packages and nothing else at the top level, schemas and type marks included."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from replicas.layers.kernels.build import SOURCES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out_dir = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out_dir)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = out_dir.glob("wattline-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_our_packages_alone(wheel: zipfile.ZipFile) -> None:
    top_level = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {
        "autoscale",
        "cluster",
        "protos",
        "replicas",
    }


def test_wheel_is_typed_and_carries_its_schemas(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {f"{package}/py.typed" for package in ("autoscale", "cluster", "protos", "replicas")} <= names
    assert {f"replicas/layers/kernels/{source.name}" for source in SOURCES} <= names, "compiled on first use"
    assert "protos/wattline_inference.proto" in names
    static = "cluster/dashboard/static"
    assert {f"{static}/index.html", f"{static}/dash.js", f"{static}/uplot-LICENSE.txt"} <= names


def test_console_script_is_declared(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "wattline = cluster.cli:main" in wheel.read(entry_points).decode()
