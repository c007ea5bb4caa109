"""A rank whose engine crawls while a file is there: answers stay under way for as long as a test looks.

`SubprocessRankGroup(module=...)` runs it in place of `replicas.rank.main`. A test that has to catch streams
half way makes the file, waits for what it wants to see, does what it is about, and removes the file: no speed
of the machine lets an answer end before.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from replicas.engine.engine import Engine
from replicas.rank import main, process
from replicas.request import StepResult

MODULE = "tests.crawling_rank"
STEP_S = 0.2


def crawl_file(shared_dir: Path) -> Path:
    """While it is there, every group with this `shared_dir` crawls."""
    return shared_dir / "crawl"


class CrawlingEngine(Engine):
    """Takes its time before each step."""

    file: Path

    def step(self) -> StepResult:
        if self.file.exists():
            time.sleep(STEP_S)
        return super().step()


if __name__ == "__main__":
    (_, config_path) = sys.argv[1:]
    config = json.loads(Path(config_path.removeprefix("@")).read_text(encoding="utf-8"))
    CrawlingEngine.file = crawl_file(Path(config["shared_dir"]))
    process.Engine = CrawlingEngine  # type: ignore[attr-defined]
    main.main(sys.argv[1:])
