"""Writes the files that Prometheus and Grafana read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.monitoring.grafana import build_dashboard
from cluster.monitoring.targets import TARGETS_PATH

FOLDER = Path(__file__).parent
DEFAULT_SCRAPE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrapeAccess:
    """What Prometheus shows routers that ask, as paths on its machine; empty: nothing.

    `key_file` holds an operator's key and nothing else; with `ca_file`, routers are asked by HTTPS.
    """

    key_file: str = ""
    ca_file: str = ""

    def to_prometheus(self) -> dict[str, object]:
        """The same keys for a job and for a service discovery."""
        key = {"authorization": {"credentials_file": self.key_file}} if self.key_file else {}
        tls = {"tls_config": {"ca_file": self.ca_file}} if self.ca_file else {}
        return {**key, **tls}


OPEN = ScrapeAccess()


def scrape_config(
    routers: tuple[str, ...], *, scrape_s: float = DEFAULT_SCRAPE_S, access: ScrapeAccess = OPEN
) -> dict[str, object]:
    """A `prometheus.yml`: the routers as told, and the replicas that the routers know of.

    `routers` are host:port of their HTTP side. Each lists the same replicas; Prometheus drops the doubles.
    """
    shown = access.to_prometheus()
    scheme = "https" if access.ca_file else "http"
    period = f"{scrape_s:g}s" if scrape_s >= 1.0 else f"{round(scrape_s * 1e3)}ms"
    return {
        "global": {"scrape_interval": period, "evaluation_interval": period},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {
                "job_name": "wattline-router",
                "scheme": scheme,
                **shown,
                "static_configs": [{"targets": list(routers)}],
            },
            {
                "job_name": "wattline-replica",
                "http_sd_configs": [
                    {"url": f"{scheme}://{router}{TARGETS_PATH}", "refresh_interval": period, **shown}
                    for router in routers
                ],
            },
        ],
    }


def write_all(
    out: Path,
    *,
    routers: tuple[str, ...],
    scrape_s: float = DEFAULT_SCRAPE_S,
    access: ScrapeAccess = OPEN,
) -> list[Path]:
    """`prometheus.yml`, the rules and their tests, and Grafana's dashboard; makes the folder."""
    contents = {
        "prometheus.yml": yaml.dump(
            scrape_config(routers, scrape_s=scrape_s, access=access), Dumper=_Plain, sort_keys=False
        ),
        "rules.yaml": (FOLDER / "rules.yaml").read_text(encoding="utf-8"),
        "rules_test.yaml": (FOLDER / "rules_test.yaml").read_text(encoding="utf-8"),
        "grafana-wattline.json": json.dumps(build_dashboard(), indent=2) + "\n",
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in contents]


class _Plain(yaml.SafeDumper):
    """Says twice what is there twice: people edit the file, and anchors are hard to read."""

    def ignore_aliases(self, data: object) -> bool:
        return True
