"""`python -m tests.fuzz [TARGET ...] [--seconds N]`: each target for a while, guided by coverage.

Needs atheris. What it learns is kept in a folder, and where it begins the next time. A crash is an input that
raised something else than an error of ours, or took too long; its file can be given back: `--only FILE`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 5
"""Of one input. They are small: what takes a tenth of it is found by looking at the slowest."""
MAX_BYTES = 8192
MEMORY_MIB = 2048
INSTRUMENTED = [
    "cluster.config",
    "cluster.foreign",
    "cluster.ledger",
    "cluster.link.messages",
    "cluster.oip",
    "cluster.openai",
    "cluster.request.resume_token",
    "cluster.request.validation",
    "cluster.security",
    "yaml",
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=30, help="for each target (30)")
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz"), help="what it learns (.fuzz)")
    parser.add_argument("--only", type=Path, help="run one input and show what it does")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.here:
        fuzz_here(told.targets[0], told.corpus, seconds=told.seconds, only=told.only)
    names = told.targets or target_names()
    if unknown := set(names) - set(target_names()):
        parser.error(f"no target {sorted(unknown)[0]!r}; there are {', '.join(target_names())}")
    command = [sys.executable, "-m", "tests.fuzz", "--here", "--corpus", str(told.corpus)]
    command += ["--seconds", str(told.seconds), *(["--only", str(told.only)] if told.only else [])]
    failed = [name for name in names if subprocess.run([*command, name], check=False).returncode]
    print(
        f"{len(names) - len(failed)} of {len(names)} targets hold"
        + "".join(f"; not {name}" for name in failed)
    )
    return 1 if failed else 0


def target_names() -> list[str]:
    from tests.fuzz.targets import TARGETS

    return list(TARGETS)


def fuzz_here(name: str, corpus: Path, *, seconds: int, only: Path | None) -> None:
    """Ends the process, as libFuzzer does."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        from tests.fuzz.targets import TARGETS

    target, folder = TARGETS[name], corpus / name
    folder.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(target.seeds):
        (folder / f"seed-{index}").write_bytes(seed)
    options = [f"-max_total_time={seconds}", f"-timeout={TIMEOUT_S}", f"-max_len={MAX_BYTES}"]
    options += [f"-rss_limit_mb={MEMORY_MIB}", f"-artifact_prefix={folder.parent}/{name}-"]
    options += ["-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([name, *options, str(only or folder)], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
