"""The questions and answers that the demonstration models know by heart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

EXAMPLES_DIR = Path(__file__).resolve().parent.parent / "examples"
DEMO_MODELS = ("llama-demo", "granite-moe-demo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One question and its answer; `system` is empty where there is none."""

    system: str
    user: str
    assistant: str

    @property
    def messages(self) -> list[tuple[str, str]]:
        """(role, content), as a chat sends them."""
        system = [("system", self.system)] if self.system else []
        return [*system, ("user", self.user)]


def read_pairs() -> list[Pair]:
    lines = (EXAMPLES_DIR / "demo_corpus" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Pair(system=row.get("system", ""), user=row["user"], assistant=row["assistant"]) for row in rows]
