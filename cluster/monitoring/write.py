"""Writes the files that Prometheus and Grafana read."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from cluster.monitoring.grafana import build_dashboard
from cluster.monitoring.targets import TARGETS_PATH

FOLDER = Path(__file__).parent
DEFAULT_SCRAPE_S = 5.0


def scrape_config(routers: tuple[str, ...], *, scrape_s: float = DEFAULT_SCRAPE_S) -> dict[str, object]:
    """A `prometheus.yml`: the routers as told, and the replicas that the routers know of.

    `routers` are host:port of their HTTP side. Each lists the same replicas; Prometheus drops the doubles.
    """
    period = f"{scrape_s:g}s" if scrape_s >= 1.0 else f"{round(scrape_s * 1e3)}ms"
    return {
        "global": {"scrape_interval": period, "evaluation_interval": period},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {"job_name": "wattline-router", "static_configs": [{"targets": list(routers)}]},
            {
                "job_name": "wattline-replica",
                "http_sd_configs": [
                    {"url": f"http://{router}{TARGETS_PATH}", "refresh_interval": period}
                    for router in routers
                ],
            },
        ],
    }


def write_all(out: Path, *, routers: tuple[str, ...], scrape_s: float = DEFAULT_SCRAPE_S) -> list[Path]:
    """`prometheus.yml`, the rules and their tests, and Grafana's dashboard; makes the folder."""
    contents = {
        "prometheus.yml": yaml.safe_dump(scrape_config(routers, scrape_s=scrape_s), sort_keys=False),
        "rules.yaml": (FOLDER / "rules.yaml").read_text(encoding="utf-8"),
        "rules_test.yaml": (FOLDER / "rules_test.yaml").read_text(encoding="utf-8"),
        "grafana-wattline.json": json.dumps(build_dashboard(), indent=2) + "\n",
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in contents]
