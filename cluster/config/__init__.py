"""`wattline.yaml`: the one configuration file, and the only reader of files and environment for settings.

Unknown keys are refused. An error names the key, the value, the limit and the fix. Paths are relative to
the file that names them. `load_config` is called by the command line and by `cluster.app:build`.
"""

from cluster.config.host import EnergySection, RaySection, TelemetrySection
from cluster.config.load import Config, default_runtime_dir, load_config, parse_config, resolve_paths
from cluster.config.model import (
    LimitsSection,
    ModelSection,
    NullSection,
    ParallelSection,
    ReplicasSection,
    SloSection,
)
from cluster.config.router import FailoverSection, ProtocolsSection, RouterSection
from cluster.config.section import ConfigError, Section
from cluster.config.security import AuthSection, LinkTlsSection, TlsSection

__all__ = [
    "AuthSection",
    "Config",
    "ConfigError",
    "EnergySection",
    "FailoverSection",
    "LimitsSection",
    "LinkTlsSection",
    "ModelSection",
    "NullSection",
    "ParallelSection",
    "ProtocolsSection",
    "RaySection",
    "ReplicasSection",
    "RouterSection",
    "Section",
    "SloSection",
    "TelemetrySection",
    "TlsSection",
    "default_runtime_dir",
    "load_config",
    "parse_config",
    "resolve_paths",
]
