"""Sums of the ledger as OpenTelemetry metrics, in OTLP/JSON: for a collector's OTLP/HTTP receiver. Pure.

The encoding is https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TypeAlias

from cluster.energy.account import HOST_SOURCE
from cluster.ledger.entries import Summary
from cluster.telemetry import semconv

_DELTA = 1
"""OTLP's AGGREGATION_TEMPORALITY_DELTA."""

Json: TypeAlias = dict[str, object]
Point: TypeAlias = tuple[float, dict[str, str]]
"""A value with its attributes."""


def to_otlp(summary: Summary, *, since_s: float, until_s: float) -> str:
    """Delta sums `wattline.energy`, `wattline.tokens`, and apart from both `wattline.host_energy`."""
    span = {"startTimeUnixNano": str(round(since_s * 1e9)), "timeUnixNano": str(round(until_s * 1e9))}
    metrics = [
        _metric(name, unit, [_data_point(span, point) for point in points])
        for name, unit, points in (
            ("wattline.energy", "J", _energy(summary)),
            ("wattline.tokens", "{token}", _tokens(summary)),
            ("wattline.host_energy", "J", _host_energy(summary)),
        )
    ]
    resource = {"attributes": [_attribute("service.name", "wattline")]}
    scope = {"scope": {"name": "wattline.ledger"}, "metrics": [one for one in metrics if one]}
    return json.dumps({"resourceMetrics": [{"resource": resource, "scopeMetrics": [scope]}]}, indent=2)


def _energy(summary: Summary) -> Iterator[Point]:
    """Of the metered devices: with requests not billed yet, the rows add up to the meter."""
    for sums in summary.requests:
        if not sums.source:
            continue
        of_whom = {semconv.REQUEST_MODEL: sums.model, semconv.TENANT: sums.tenant}
        told = {semconv.ENERGY_SOURCE: sums.source, semconv.LEDGER: "request"}
        for phase, sum_mj in (("prefill", sums.prefill_mj), ("decode", sums.decode_mj)):
            yield sum_mj / 1e3, {**of_whom, semconv.ENERGY_PHASE: phase, **told}
    for model in summary.models:
        told = {semconv.REQUEST_MODEL: model.model, semconv.ENERGY_SOURCE: model.source}
        for ledger, sum_mj in (("idle", model.idle_mj), ("unattributed", model.unattributed_mj)):
            yield sum_mj / 1e3, {**told, semconv.LEDGER: ledger}


def _host_energy(summary: Summary) -> Iterator[Point]:
    """What the hosts drew beside the devices, where it is known: the requests' part, and the rest."""
    for sums in summary.requests:
        if sums.num_host:
            of_whom = {semconv.REQUEST_MODEL: sums.model, semconv.TENANT: sums.tenant}
            told = {semconv.ENERGY_SOURCE: HOST_SOURCE, semconv.LEDGER: "request"}
            yield sums.host_mj / 1e3, {**of_whom, **told}
    for model in summary.models:
        if model.host_meter_mj:
            told = {semconv.ENERGY_SOURCE: HOST_SOURCE, semconv.LEDGER: "rest"}
            yield model.host_rest_mj / 1e3, {semconv.REQUEST_MODEL: model.model, **told}


def _tokens(summary: Summary) -> Iterator[Point]:
    for sums in summary.requests:
        of_whom = {semconv.REQUEST_MODEL: sums.model, semconv.TENANT: sums.tenant}
        for kind, count in (("input", sums.prompt_tokens), ("output", sums.output_tokens)):
            yield float(count), {**of_whom, semconv.TOKEN_TYPE: kind}


def _metric(name: str, unit: str, points: list[Json]) -> Json | None:
    """None without points: a series of nothing would be a claim."""
    sums = {"aggregationTemporality": _DELTA, "isMonotonic": True, "dataPoints": points}
    return {"name": name, "unit": unit, "sum": sums} if points else None


def _data_point(span: dict[str, str], point: Point) -> Json:
    value, attributes = point
    return {
        **span,
        "asDouble": value,
        "attributes": [_attribute(key, text) for key, text in attributes.items()],
    }


def _attribute(key: str, text: str) -> Json:
    return {"key": key, "value": {"stringValue": text}}
