"""A model's spec, read in a process of its own, for a supervisor that hands it to its ranks.

AutoConfig costs a second of CPU and 80 MiB, thrice that where it finds torch to import. Neither a supervisor
nor a rank pays that for twenty numbers: this process has read them and is gone before the first rank starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from replicas.errors import BadCheckpoint
from replicas.models.spec import ModelSpec

TIMEOUT_S = 120.0
"""For a cold disk that holds the libraries; a warm one needs one second."""
LAST_WORDS_CHARS = 300


def read_spec_apart(folder: Path) -> ModelSpec:
    """As `config_file.read_spec`: BadCheckpoint says what is not served and why. Blocks meanwhile.

    Raises ChildProcessError if the reading process died, TimeoutError if it took too long.
    """
    command = (sys.executable, "-m", "replicas.models.spec_reader", str(folder))
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{folder}/config.json was not read within {TIMEOUT_S:g} s") from error
    if ended.returncode != 0:
        words = ended.stderr.strip().rpartition("\n")[2][:LAST_WORDS_CHARS]
        raise ChildProcessError(
            f"{folder}/config.json was not read: its reader ended with code {ended.returncode}: {words}"
        )
    reply = json.loads(ended.stdout)
    if "refused" in reply:
        raise BadCheckpoint(reply["refused"])
    return ModelSpec.from_fields(reply)


def main(folder: Path) -> None:
    """Print the spec as JSON, or why it is refused."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # To AutoConfig it is not installed.
    from replicas.models.config_file import read_spec  # noqa: PLC0415

    try:
        reply: dict[str, object] = asdict(read_spec(folder))
    except BadCheckpoint as error:
        reply = {"refused": str(error)}
    print(json.dumps(reply))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
