"""One Serve application per model, whose replicas are groups of ranks.

`wattline up` and a chart's serveConfigV2 build the same way. No request goes through Serve: a replica dials
the routers by itself; Serve places, watches, replaces and drains it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from cluster.config import Config, ConfigError, load_config, parse_config, resolve_paths
from cluster.serving.placement import deployment_options, resolve_device
from cluster.serving.ray_environment import missing_environment
from cluster.serving.replica_deployment import ReplicaDeployment


def build(args: dict[str, Any]) -> Application:
    """The application of one model.

    `args`: {"config": path, plain data or Config; "model": name}. Asks the running Ray whether it has GPUs.
    Raises ConfigError.
    """
    config = _read(args.get("config"))
    model = args.get("model")
    names = [section.name for section in config.models]
    if model not in names:
        raise ConfigError(f"model: {model!r} is not in the configuration; one of {', '.join(names)}")
    section = config.model(model)
    device = resolve_device(section, has_gpus=has_gpus())
    options = deployment_options(section, device=device, environment=missing_environment())
    return serve.deployment(ReplicaDeployment, **options).bind(config=config, model=model, device=device)


def has_gpus() -> bool:
    """Does any node of the Ray cluster have a GPU?"""
    return bool(ray.cluster_resources().get("GPU", 0) > 0)


def _read(source: object) -> Config:
    if isinstance(source, Config):
        return source
    if isinstance(source, dict):
        return resolve_paths(parse_config(source), base=Path.cwd())
    if isinstance(source, str | Path):
        return load_config(Path(source))
    raise ConfigError("config: is missing; give args a `config`, a path or the configuration itself")
