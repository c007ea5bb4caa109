"""The whole of `wattline.yaml`: read, validated, its paths resolved."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator
from yaml.constructor import ConstructorError

from cluster.config.explain import explain_all
from cluster.config.host import EnergySection, RaySection, TelemetrySection
from cluster.config.ledger import LedgerSection
from cluster.config.model import ModelSection
from cluster.config.router import RouterSection
from cluster.config.section import ConfigError, Section
from cluster.config.tenants import TenantSection

SectionT = TypeVar("SectionT", bound=Section)


class Config(Section):
    models: tuple[ModelSection, ...] = Field(min_length=1, max_length=64)
    router: RouterSection = RouterSection()
    tenants: tuple[TenantSection, ...] = Field((), max_length=256)
    telemetry: TelemetrySection = TelemetrySection()
    energy: EnergySection = EnergySection()
    ledger: LedgerSection = LedgerSection()
    ray: RaySection = RaySection()
    runtime_dir: str = Field(
        "", description="sockets, pid and log files; empty: a folder per user under /tmp"
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Config:
        names = [model.name for model in self.models]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"models: name {doubled[0]!r} is used twice; give each model its own")
        return self

    @model_validator(mode="after")
    def _tenants_are_unique(self) -> Config:
        names = [tenant.name for tenant in self.tenants]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"tenants: name {doubled[0]!r} is used twice; give each tenant one section")
        return self

    def with_router(self, **changes: Any) -> Config:
        """The same with other values in `router`; they are not validated again."""
        return self.model_copy(update={"router": self.router.model_copy(update=changes)})

    def model(self, name: str) -> ModelSection:
        """The section of model `name`; KeyError if there is none."""
        return {section.name: section for section in self.models}[name]


def default_runtime_dir() -> Path:
    """Where sockets, pid and log files go when nothing is said: short, since Unix socket paths are."""
    return Path(os.environ.get("WATTLINE_RUNTIME_DIR") or f"/tmp/wattline-{os.getuid()}")


class _OnceEachLoader(yaml.SafeLoader):
    """Of a key that is there twice YAML's own would take the last, and say nothing of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConstructorError(
                    problem=f"key {key.value!r} is there twice; remove one", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_config(path: Path) -> Config:
    """Read and validate a YAML file.

    Raises ConfigError naming every wrong key with its value and fix.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a file with -f") from error
    raw = read_yaml(content, origin=str(path))
    return resolve_paths(parse_config(raw, origin=str(path)), base=path.resolve().parent)


def read_yaml(content: bytes, *, origin: str) -> dict[str, Any]:
    """The mapping of a YAML file, its values not yet looked at. Raises ConfigError."""
    try:
        raw = yaml.load(content.decode(), Loader=_OnceEachLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{origin}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:  # Its dates and numbers raise Python's own.
        raise ConfigError(f"{origin}: is not YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(
            f"{origin}: is nested too deeply to be a configuration; look for [[[ or {{{{{{"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin}: holds no mapping; start with `models:`")
    return raw


def parse_config(raw: dict[str, Any], *, origin: str = "config") -> Config:
    """Validate plain data. Raises ConfigError."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {line}" for line in explain_all(error))) from error


def resolve_paths(config: Config, *, base: Path) -> Config:
    """Make relative checkpoint folders absolute; hub ids and `null` stay as they are."""
    models = tuple(
        section.model_copy(
            update={
                "source": _resolve_source(section.source, base),
                "tokenizer": _resolve_source(section.tokenizer, base),
            }
        )
        for section in config.models
    )
    runtime_dir = config.runtime_dir or str(default_runtime_dir())
    path = config.ledger.path and str(base / _at_home(config.ledger.path))
    return config.model_copy(
        update={
            "models": models,
            "runtime_dir": str(base / _at_home(runtime_dir)),
            "ledger": config.ledger.model_copy(update={"path": path}),
            "router": _with_files(config.router, base),
            "telemetry": config.telemetry.model_copy(
                update={
                    "metrics_tls": _with_absolute(
                        config.telemetry.metrics_tls,
                        SECURITY_FILES["tls"],
                        base,
                        owner="telemetry.metrics_tls",
                    )
                }
            ),
        }
    )


SECURITY_FILES = {
    "tls": ("cert", "key", "client_ca"),
    "link_tls": ("ca", "cert", "key", "replica_cert", "replica_key"),
    "auth": ("keys_file",),
}


def _with_files(router: RouterSection, base: Path) -> RouterSection:
    """Keys and certificates relative to the file that names them. Raises ConfigError where one is missing."""
    sections = {
        name: _with_absolute(getattr(router, name), keys, base, owner=f"router.{name}")
        for name, keys in SECURITY_FILES.items()
    }
    return _with_absolute(router.model_copy(update=sections), ("secret_file",), base, owner="router")


def _with_absolute(section: SectionT, keys: tuple[str, ...], base: Path, *, owner: str) -> SectionT:
    paths = {key: base / _at_home(getattr(section, key)) for key in keys if getattr(section, key)}
    for key, path in paths.items():
        if not path.is_file():
            raise ConfigError(f"{owner}.{key}: {path} is no file; fix the path or make the file")
    return section.model_copy(update={key: str(path.resolve()) for key, path in paths.items()})


def _at_home(path: str) -> Path:
    """With `~` replaced. Raises ConfigError for the home of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path!r}: there is no such home folder; write the whole path") from error


def _resolve_source(source: str, base: Path) -> str:
    if not source or source == "null":
        return source
    folder = base / _at_home(source)
    if folder.is_dir():
        return str(folder.resolve())
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path:
        raise ConfigError(
            f"models.source: {source!r} is no folder (looked at {folder}); fix the path or give a hub id"
        )
    return source
