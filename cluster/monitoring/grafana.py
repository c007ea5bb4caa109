"""The Grafana dashboard, made of the table of panels. Pure: plain data in, JSON-ready data out.

Format: dashboard JSON of Grafana 10 and later (`schemaVersion` 38); the data source is a variable.
"""

from __future__ import annotations

from typing import TypedDict

from cluster.monitoring.panels import ROWS, Panel

COLUMNS = 24
"""Width of Grafana's grid."""
PANEL_WIDTH, PANEL_HEIGHT = 8, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def build_dashboard() -> dict[str, object]:
    """The dashboard, ready for `json.dumps` and Grafana's import."""
    panels: list[dict[str, object]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "type": "row",
                "id": len(panels) + 1,
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": top},
            }
        )
        top += 1
        for index, panel in enumerate(row):
            below, column = divmod(index, COLUMNS // PANEL_WIDTH)
            position = {
                "h": PANEL_HEIGHT,
                "w": PANEL_WIDTH,
                "x": column * PANEL_WIDTH,
                "y": top + below * PANEL_HEIGHT,
            }
            panels.append(_panel(panel, number=len(panels) + 1, position=position))
        top += -(-len(row) // (COLUMNS // PANEL_WIDTH)) * PANEL_HEIGHT
    return {
        "uid": "wattline",
        "title": "Wattline",
        "tags": ["wattline", "llm", "energy"],
        "schemaVersion": 38,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_datasource_variable(), _model_variable()]},
        "panels": panels,
    }


def _panel(panel: Panel, *, number: int, position: dict[str, int]) -> dict[str, object]:
    shape = _total() if panel.is_total else _course(panel)
    defaults = {"unit": panel.unit, "min": 0, **shape["defaults"]}
    return {
        "type": shape["type"],
        "id": number,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": _overrides(panel)},
        "options": shape["options"],
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "instant": panel.is_total,
                "range": not panel.is_total,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


class _Shape(TypedDict):
    type: str
    defaults: dict[str, object]
    options: dict[str, object]


def _course(panel: Panel) -> _Shape:
    custom: dict[str, object] = {"fillOpacity": 60 if panel.stacks else 8, "showPoints": "never"}
    if panel.stacks:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    return {
        "type": "timeseries",
        "defaults": {"custom": custom},
        "options": {"legend": {"displayMode": "list"}, "tooltip": {"mode": "multi", "sort": "desc"}},
    }


def _total() -> _Shape:
    reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    return {
        "type": "bargauge",
        "defaults": {"color": {"mode": "palette-classic"}},
        "options": {"displayMode": "basic", "orientation": "horizontal", "reduceOptions": reduce},
    }


def _overrides(panel: Panel) -> list[dict[str, object]]:
    """A line over the stack, which is no part of it."""
    if not panel.line:
        return []
    properties = {"custom.stacking": {"mode": "none"}, "custom.fillOpacity": 0, "custom.lineWidth": 2}
    return [
        {
            "matcher": {"id": "byName", "options": panel.line},
            "properties": [{"id": name, "value": value} for name, value in properties.items()],
        }
    ]


def _datasource_variable() -> dict[str, object]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _model_variable() -> dict[str, object]:
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": "label_values(wattline_replicas, model)", "refId": "models"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }
