"""Turns sums of the ledger into what people report: kWh, g CO2e, joules per token. Pure.

SCI is the Software Carbon Intensity of the Green Software Foundation (ISO/IEC 21031:2024),
((E * I) + M) per R, here without the embodied part M: E in kWh of the building, I in g CO2e/kWh, R = 1,000
output tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from cluster.ledger.entries import ModelSums, RequestSums, Summary
from replicas.energy.meter import ESTIMATED, MEASURED

MJ_PER_KWH = 3_600_000_000
"""Millijoules."""
UNKNOWN = "unknown"


class Group(Enum):
    TENANT = "tenant"
    MODEL = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What joules mean at this place. None: unknown, and no carbon, or no cost, is reported.

    `currency` is what the price is in, as text; empty: not said.
    """

    pue: float
    carbon_g_per_kwh: float | None
    price_per_kwh: float | None = None
    currency: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRow:
    """One group and source of joules. `source` `unknown`: requests that no meter or model spoke for.

    `idle_j` is what the model's devices drew for nobody, unattributed included; `unbilled_j` what they drew
    for requests whose bills are not of this time: still open, or lost with their router. It is below 0 where
    bills of this time are of earlier joules, so `energy_j + unbilled_j + idle_j` is the meter. Both are None
    where rows are tenants, since they belong to none. Beside them, never in them, `host_j` is the requests'
    part of what the hosts drew around the devices, of `num_host_requests` for which it is known, and
    `host_rest_j` is the rest. `kwh` is what the devices and the hosts drew, at the building's meter: times
    PUE. `carbon_g`, `cost` and SCI follow from it.
    """

    group: str
    source: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    wasted_tokens: int
    energy_j: float | None
    prefill_j: float | None
    decode_j: float | None
    static_j: float | None
    wasted_j: float | None
    idle_j: float | None
    host_j: float | None
    host_rest_j: float | None
    num_host_requests: int
    joules_per_output_token: float | None
    joules_per_token: float | None
    kwh: float | None
    carbon_g: float | None
    sci_g_per_1000_tokens: float | None
    cost: float | None
    """In the site's currency."""
    confidence_factor: float | None
    unbilled_j: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Parts of the output tokens, by what is known of their joules; they add up to 1.

    Made up joules, of the null engine, are nothing that is known.
    """

    measured: float
    estimated: float
    unknown: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    since_s: float
    until_s: float
    by: Group
    site: Site
    rows: tuple[ReportRow, ...]
    coverage: Coverage | None
    """None: no output token in this time."""


def make_report(summary: Summary, *, by: Group, site: Site, since_s: float, until_s: float) -> Report:
    """Rows by group, the largest consumer first; sources stay apart."""
    keys = {(_group_of(sums, by), sums.source) for sums in summary.requests}
    if by is Group.MODEL:
        keys |= {(sums.model, sums.source) for sums in summary.models}
    rows = [
        _row(
            group,
            source,
            [one for one in summary.requests if (_group_of(one, by), one.source) == (group, source)],
            [one for one in summary.models if (one.model, one.source) == (group, source)]
            if by is Group.MODEL
            else None,
            site,
        )
        for group, source in keys
    ]
    rows.sort(key=lambda row: (-(row.kwh or 0.0), row.group, row.source))
    return Report(
        since_s=since_s,
        until_s=until_s,
        by=by,
        site=site,
        rows=tuple(rows),
        coverage=_coverage(summary.requests),
    )


def _group_of(sums: RequestSums, by: Group) -> str:
    return sums.tenant if by is Group.TENANT else sums.model


def _row(
    group: str,
    source: str,
    requests: Sequence[RequestSums],
    models: Sequence[ModelSums] | None,
    site: Site,
) -> ReportRow:
    output_tokens = sum(one.output_tokens for one in requests)
    total_tokens = sum(one.total_tokens for one in requests)
    energy_mj = sum(one.energy_mj for one in requests)
    idle_mj = None if models is None else sum(one.idle_mj + one.unattributed_mj for one in models)
    num_host_requests = sum(one.num_host for one in requests)
    host_mj = sum(one.host_mj for one in requests)
    host_rest_mj = sum(one.host_rest_mj for one in models or ())
    has_host = any(one.host_meter_mj for one in models or ())
    unbilled_mj = sum(one.request_mj for one in models) - energy_mj if models else None
    host_unbilled_mj = sum(one.host_request_mj for one in models) - host_mj if models and has_host else 0
    device_mj, beside_mj = energy_mj + (unbilled_mj or 0) + (idle_mj or 0), host_mj + host_unbilled_mj
    kwh = (device_mj + beside_mj + host_rest_mj) * site.pue / MJ_PER_KWH
    carbon_g = None if site.carbon_g_per_kwh is None else kwh * site.carbon_g_per_kwh
    is_known = bool(source)
    worst = max((one.worst_confidence_factor for one in requests), default=0.0)
    return ReportRow(
        group=group,
        source=source or UNKNOWN,
        num_requests=sum(one.num_requests for one in requests),
        prompt_tokens=sum(one.prompt_tokens for one in requests),
        output_tokens=output_tokens,
        wasted_tokens=sum(one.wasted_tokens for one in requests),
        energy_j=energy_mj / 1e3 if is_known else None,
        prefill_j=_joules((one.prefill_mj for one in requests), is_known),
        decode_j=_joules((one.decode_mj for one in requests), is_known),
        static_j=_joules((one.static_mj for one in requests), is_known),
        wasted_j=_joules((one.wasted_mj for one in requests), is_known),
        idle_j=None if idle_mj is None or not is_known else idle_mj / 1e3,
        host_j=host_mj / 1e3 if num_host_requests else None,
        host_rest_j=host_rest_mj / 1e3 if has_host else None,
        num_host_requests=num_host_requests,
        joules_per_output_token=energy_mj / 1e3 / output_tokens if is_known and output_tokens else None,
        joules_per_token=energy_mj / 1e3 / total_tokens if is_known and total_tokens else None,
        kwh=kwh if is_known else None,
        carbon_g=carbon_g if is_known else None,
        sci_g_per_1000_tokens=(
            carbon_g * 1000 / output_tokens if is_known and carbon_g is not None and output_tokens else None
        ),
        cost=None if site.price_per_kwh is None or not is_known else kwh * site.price_per_kwh,
        confidence_factor=worst or None,
        unbilled_j=None if unbilled_mj is None or not is_known else unbilled_mj / 1e3,
    )


def _joules(values_mj: Iterable[int], is_known: bool) -> float | None:
    return sum(values_mj) / 1e3 if is_known else None


def _coverage(requests: Sequence[RequestSums]) -> Coverage | None:
    total = sum(one.output_tokens for one in requests)
    if not total:
        return None
    measured = sum(one.output_tokens for one in requests if one.source in MEASURED)
    estimated = sum(one.output_tokens for one in requests if one.source in ESTIMATED)
    unknown = total - measured - estimated
    return Coverage(measured=measured / total, estimated=estimated / total, unknown=unknown / total)
