"""The files of `wattline monitoring`: whole without Prometheus or Grafana at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.link.replica_pool import ReplicaPool
from cluster.monitoring.grafana import COLUMNS, build_dashboard
from cluster.monitoring.panels import EXPERTS, ROWS
from cluster.monitoring.targets import target_groups
from cluster.monitoring.write import ScrapeAccess, scrape_config, write_all
from replicas.expert_loads import ExpertLoads
from replicas.supervisor.expert_metrics import next_snapshot

FOLDER = Path(__file__).parents[3] / "cluster" / "monitoring"


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    panels: Any = build_dashboard()["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert all(x < COLUMNS for x, _ in cells)
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_panel_says_what_it_shows_and_every_series_has_a_name() -> None:
    dashboard: Any = build_dashboard()
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert [panel["title"] for panel in panels if len(panel["description"]) < 20] == []
    assert all(target["legendFormat"] for panel in panels for target in panel["targets"])


def test_the_meter_is_a_line_over_the_areas_that_add_up_to_it() -> None:
    (panel,) = (panel for row in ROWS.values() for panel in row if panel.line)
    assert [query.legend for query in panel.queries].count(panel.line) == 1
    dashboard: Any = build_dashboard()
    drawn = next(one for one in dashboard["panels"] if one["title"] == panel.title)
    (override,) = drawn["fieldConfig"]["overrides"]
    assert override["matcher"] == {"id": "byName", "options": "meter"}
    assert {"id": "custom.stacking", "value": {"mode": "none"}} in override["properties"]


def test_every_recorded_series_that_a_panel_or_rule_reads_is_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    read = re.findall(r"\bmodel:wattline_\w+:\w+", json.dumps(build_dashboard()) + json.dumps(rules()))
    assert set(read) <= recorded


def test_the_row_of_experts_reads_what_a_replica_with_experts_shows() -> None:
    loads = ExpertLoads(num_experts=2, tokens=(3, 1), num_ranks=2)
    shown = {sample.name for family in next_snapshot(None, loads).families() for sample in family.samples}
    for panel in ROWS[EXPERTS]:
        for query in panel.queries:
            assert set(re.findall(r"\bwattline_\w+", query.expr)) <= shown


def test_alerts_say_what_to_do_and_where_to_read_on() -> None:
    sections = re.findall(r"^### (\w+)$", (FOLDER.parents[1] / "docs" / "monitoring.md").read_text(), re.M)
    assert sections == [rule["alert"] for rule in rules() if "alert" in rule]
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in {"page", "ticket"}
            assert set(rule["annotations"]) == {"summary", "description", "runbook"}
            assert rule["annotations"]["runbook"] == f"docs/monitoring.md#{rule['alert'].lower()}"


def test_every_alert_has_a_case_for_promtool() -> None:
    cases = yaml.safe_load((FOLDER / "rules_test.yaml").read_text())["tests"]
    fired = {
        test["alertname"] for case in cases for test in case.get("alert_rule_test", ()) if test["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}


def test_every_router_is_scraped_and_asked_for_its_replicas(tmp_path: Path) -> None:
    write_all(tmp_path, routers=("10.0.0.1:8100", "10.0.0.2:8100"))
    config = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    router, replica = config["scrape_configs"]
    assert router["static_configs"] == [{"targets": ["10.0.0.1:8100", "10.0.0.2:8100"]}]
    assert [each["url"] for each in replica["http_sd_configs"]] == [
        "http://10.0.0.1:8100/metrics/targets",
        "http://10.0.0.2:8100/metrics/targets",
    ]


def test_routers_that_ask_are_shown_a_key_by_https_for_metrics_and_for_replicas() -> None:
    access = ScrapeAccess(key_file="ops.key", ca_file="ca.pem")
    config: Any = scrape_config(("r:8100",), access=access)
    router, replica = config["scrape_configs"]
    (discovery,) = replica["http_sd_configs"]
    for asked in (router, discovery):
        assert asked["authorization"] == {"credentials_file": "ops.key"}
        assert asked["tls_config"] == {"ca_file": "ca.pem"}
    assert (router["scheme"], discovery["url"]) == ("https", "https://r:8100/metrics/targets")
    assert "authorization" not in replica


def test_the_command_names_the_files_it_wrote(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["monitoring", "--out", str(tmp_path / "new"), "--router", "127.0.0.1:8100"]
    )
    assert done.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "grafana-wattline.json",
        "prometheus.yml",
        "rules.yaml",
        "rules_test.yaml",
    ]
    assert json.loads((tmp_path / "new" / "grafana-wattline.json").read_text())["uid"] == "wattline"


def test_replicas_and_the_agents_of_their_hosts_are_targets_each_agent_once() -> None:
    connections = [
        SimpleNamespace(
            replica_id=f"llama#{number}",
            hello=SimpleNamespace(model="llama", metrics_address=f"10.0.0.7:{number}", host="node-7"),
            agent_metrics_addresses=("https://10.0.0.7:9102", "10.0.0.8:9102"),
        )
        for number in (1, 2)
    ]
    assert target_groups(cast(ReplicaPool, connections)) == [
        {"targets": ["10.0.0.7:1"], "labels": {"model": "llama", "replica": "llama#1"}},
        {"targets": ["10.0.0.7:2"], "labels": {"model": "llama", "replica": "llama#2"}},
        {
            "targets": ["10.0.0.7:9102"],
            "labels": {"job": "wattline-agent", "host": "node-7", "__scheme__": "https"},
        },
        {"targets": ["10.0.0.8:9102"], "labels": {"job": "wattline-agent", "host": "10.0.0.8"}},
    ]
