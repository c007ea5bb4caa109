"""One rank as a process: `python -m replicas.rank.main --config JSON`, or `--config @FILE`.

Chooses the runner by name so that a null engine never imports torch. `run_rank` is also what a rank's actor
calls. A rank outlives nobody: rank 0 ends when its supervisor closes the socket, the others when rank 0 ends,
and a supervisor kills what is left. Death signals of the kernel (PR_SET_PDEATHSIG) fire when the starting
*thread* ends, and an actor is started by the node's daemon, so they are of use to plain children only.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from pathlib import Path

from replicas.config import RankConfig, rank_config_from_json
from replicas.rank.process import RunnerFactory, serve_rank

NULL_SOURCE = "null"
NULL_FACTORY = "replicas.rank.null_runner"
MODEL_FACTORY = "replicas.rank.model"


def run_rank(config: RankConfig) -> None:
    """Live as one rank of a group; return after an orderly shutdown, raise for anything else."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    module = importlib.import_module(NULL_FACTORY if config.source == NULL_SOURCE else MODEL_FACTORY)
    factory: RunnerFactory = module.build_runner
    serve_rank(config, factory)


def main(arguments: list[str]) -> None:
    """Exit 0 after an orderly shutdown, else 1. Never waits for library threads that lost their peers."""
    parser = argparse.ArgumentParser(prog="python -m replicas.rank.main", description="One rank of a group.")
    parser.add_argument("--config", required=True, help="the RankConfig as JSON, or @FILE that holds it")
    text: str = parser.parse_args(arguments).config
    code = 0
    try:
        if text.startswith("@"):
            text = Path(text[1:]).read_text(encoding="utf-8")
        run_rank(rank_config_from_json(text))
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
