"""What all suites share: the workload of a case, and the row fields that say what was measured."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

from bench.record import git_revision
from bench.workload import WORKLOADS, Draw, ModelShape, Workload

SEED = 20261121
REQUESTS_PER_STREAM = 4
MIN_REQUESTS = 8


def make_workload(
    kind: str,
    model: ModelShape,
    concurrency: int,
    output_tokens: int,
    seed: int = SEED,
    *,
    requests_per_stream: int = REQUESTS_PER_STREAM,
) -> Workload:
    """The workload of one case. Raises ValueError when the model is too short for it."""
    return WORKLOADS[kind](
        Draw(
            model=model,
            concurrency=concurrency,
            num_requests=max(MIN_REQUESTS, requests_per_stream * concurrency),
            output_tokens=output_tokens,
            seed=seed,
        )
    )


def checkpoint_shape(folder: Path) -> ModelShape:
    config = json.loads((folder / "config.json").read_text())
    return ModelShape(
        vocab_size=int(config["vocab_size"]), context_tokens=int(config["max_position_embeddings"])
    )


def wattline_version() -> str:
    return f"{importlib.metadata.version('wattline')}+{git_revision()}"


def identity(system: str, version: str, model: str, dtype: str, workload: Workload) -> dict[str, object]:
    return {
        "system": system,
        "version": version,
        "model": model,
        "dtype": "float32" if dtype == "auto" else dtype,
        "workload": workload.name,
        "concurrency": workload.concurrency,
        "requests": len(workload.prompts),
    }


def energy_fields(energy_j: float | None, source: str, workload: Workload) -> dict[str, object]:
    per_token = None if energy_j is None else round(energy_j / workload.total_output_tokens, 5)
    return {"joules_per_output_token": per_token, "energy_source": source}
