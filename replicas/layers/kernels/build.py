"""Compiles the kernels for this machine, once: a shared library named by what it was made from.

The name is a hash of source, flags, compiler and processor, so an update, another compiler or a home folder
shared by unlike machines never loads a stale library. No compiler: `KernelsUnavailable`, and torch does the
work. Called when a rank builds its runner; never after.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu_kernels.c")
SOURCES = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-pthread",
)
_WIDE_FLAG = "-mprefer-vector-width=512"
_COMPILERS = ("cc", "gcc")
_COMPILE_TIMEOUT_S = 120.0


class KernelsUnavailable(Exception):
    """This machine cannot build or load the kernels; the text says why. Never leaves `replicas.layers`."""


def build_library(cache_dir: Path | None = None, *, more_flags: tuple[str, ...] = ()) -> Path:
    """The shared library for this machine; compiled (about 2 s) unless `cache_dir` already has it.

    `more_flags` come last: `-mno-avx512f`, say, makes the library of a lesser machine.
    """
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise KernelsUnavailable(f"no C compiler ({' or '.join(_COMPILERS)}) on the PATH")
    wide_flags = (_WIDE_FLAG,) if platform.machine() == "x86_64" else ()
    flags = (*FLAGS, *wide_flags, *more_flags)
    texts = (source.read_text(encoding="utf-8") for source in SOURCES)
    key = "\0".join((*texts, *flags, _version_of(compiler), _processor()))
    name = f"cpu_kernels-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.so"
    target = (cache_dir or _default_cache_dir()) / name
    if not target.exists():
        _compile(compiler, flags, target)
    return target


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    """Into a private file first: ranks that start together must never load half a library."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
            built = Path(folder) / target.name
            command = [compiler, *flags, str(SOURCE), "-o", str(built), "-lm"]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
            )
            if done.returncode != 0:
                raise KernelsUnavailable(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
            built.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"cannot compile into {target.parent}: {error}") from error


def _default_cache_dir() -> Path:
    try:
        return Path.home() / ".cache" / "wattline"
    except RuntimeError as error:
        raise KernelsUnavailable(f"no home folder to keep the library in: {error}") from error


def _version_of(compiler: str) -> str:
    try:
        return subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=10.0, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailable(f"{compiler} --version failed: {error}") from error


def _processor() -> str:
    """What -march=native looks at: architecture and instruction sets."""
    found = {platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        found |= {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return "\n".join(sorted(found))
