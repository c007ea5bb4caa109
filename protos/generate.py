"""Regenerate the committed protobuf code: `python -m protos.generate [--check]`.

Owns the one protoc command line. `--check` writes to a scratch folder and fails on any difference, so
that CI notices a `.proto` edited without its code.
"""

from __future__ import annotations

import argparse
import filecmp
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_protoc(out_dir: Path) -> None:
    """Write `protos/*_pb2*.py[i]` of every schema below `out_dir`."""
    schemas = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos").glob("*.proto"))
    outputs = [f"--{kind}_out={out_dir}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, *schemas]
    subprocess.run(command, cwd=ROOT, check=True, env={"PATH": str(Path(sys.executable).parent)})
    for path in (out_dir / "protos").glob("*_pb2_grpc.py"):
        # mypy-protobuf writes the stub beside it; the generated module needs nothing else.
        path.write_text(re.sub(r"[ \t]+\n", "\n", path.read_text()))


def changed_files(fresh_dir: Path) -> list[str]:
    """Names that differ between the tree and `fresh_dir`, missing ones included."""
    fresh = {path.name for path in (fresh_dir / "protos").glob("*_pb2*")}
    committed = {path.name for path in (ROOT / "protos").glob("*_pb2*")}
    _, mismatch, errors = filecmp.cmpfiles(
        fresh_dir / "protos", ROOT / "protos", sorted(fresh & committed), shallow=False
    )
    return sorted({*mismatch, *errors, *(fresh ^ committed)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 on a difference")
    if not parser.parse_args().check:
        run_protoc(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        run_protoc(Path(scratch))
        changed = changed_files(Path(scratch))
    if changed:
        print("generated code is stale, run `make proto`: " + ", ".join(changed))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
