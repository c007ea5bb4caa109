"""What the dashboard shows of one instant, as plain JSON values. Reads the router's state, changes nothing.

Unknown is None, never 0. Millijoules stay whole numbers, so that a reader can check the sum itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import asdict
from typing import Any, TypeAlias

from cluster.energy.ledger_book import LedgerBook, LedgerSums
from cluster.link.fleet_record import FleetEvent, FleetRecord
from cluster.link.replica_connection import ReplicaConnection
from cluster.link.replica_pool import ReplicaPool
from cluster.router.gauges import kv_used_ratio, num_waiting
from cluster.served_model import ServedModel
from cluster.telemetry.journal import Answers, ClosedRequest, Journal, Spread
from replicas.expert_heat import ExpertHeat, merge_heat

Json: TypeAlias = dict[str, Any]


def take_snapshot(
    *,
    models: Mapping[str, ServedModel],
    pool: ReplicaPool,
    queues: Mapping[str, Sized],
    journal: Journal,
    now_s: float,
) -> Json:
    """Models, replicas and what happened to them, last requests. `now_s`: on the router's monotonic clock.

    `queues` are those of the router, by model.
    """
    return {
        "models": [
            view_model(
                model,
                replicas=pool.of_model(model.name),
                queue=queues[model.name],
                answers=journal.of_model(model.name),
                now_s=now_s,
            )
            for model in models.values()
        ],
        "replicas": [view_replica(connection, pool.fleet) for connection in pool],
        "events": [view_event(event) for event in pool.fleet.events],
        "requests": [view_request(closed, now_s=now_s) for closed in journal.last],
    }


def view_model(
    model: ServedModel, *, replicas: list[ReplicaConnection], queue: Sized, answers: Answers, now_s: float
) -> Json:
    by_output, by_total = answers.joules_per_token(now_s=now_s)
    source = model.energy_source((replica.hello.energy_source for replica in replicas), now_s=now_s)
    power = model.ledger.power(source, now_s=now_s)
    return {
        "name": model.name,
        "replicas": {
            "ready": sum(replica.state.name == "READY" for replica in replicas),
            "min": model.section.replicas.min,
            "max": model.section.replicas.max,
        },
        "active": model.active_requests,
        "running": sum(sum(replica.load.running) for replica in replicas),
        "waiting": num_waiting(replicas, queue),
        "kv_used_ratio": kv_used_ratio(replicas),
        "output_tokens_per_s": model.token_rate.per_second(now_s=now_s),
        "ttft_ms": view_spread(answers.ttft_ms(now_s=now_s)),
        "tpot_ms": view_spread(answers.tpot_ms(now_s=now_s)),
        "slo": {
            "ttft_ms": answers.objective.ttft_ms,
            "tpot_ms": answers.objective.tpot_ms,
            "met": answers.num_met,
            "missed": answers.num_missed,
        },
        "j_per_output_token": by_output,
        "j_per_total_token": by_total,
        "power_w": asdict(power) if power else None,
        "energy": {
            "source": source or None,
            "confidence_factor": model.ledger.confidence_factor(source),
            "ledger": [
                {"source": name, **_of_devices(sums), "is_conserved": sums.is_conserved}
                for name, sums in model.ledger.sums.items()
            ],
        },
        "host": view_host(model.ledger, now_s=now_s),
        "experts": view_experts([replica.experts for replica in replicas if replica.experts]),
        "totals": {
            "requests": model.requests_total,
            "refused": model.refused_total,
            "prompt_tokens": model.prompt_tokens_total,
            "output_tokens": model.output_tokens_total,
            "request_energy_mj": model.energy_mj_total,
        },
    }


def view_spread(spread: Spread | None) -> Json:
    return {"p50": spread.p50 if spread else None, "p95": spread.p95 if spread else None}


def view_host(ledger: LedgerBook, *, now_s: float) -> Json | None:
    """What the hosts draw beside the devices. None: no host is metered, and nothing is shown of them."""
    host = ledger.host
    if host is None:
        return None
    return {
        "power_w": ledger.host_w(now_s=now_s),
        "requests_mj": host.requests_mj,
        "rest_mj": host.rest_mj,
        "meter_mj": host.meter_mj,
    }


def view_experts(heats: list[ExpertHeat]) -> Json | None:
    """The heat map of a model, and how even its most uneven replica is. None: no experts, or no work yet."""
    heat = merge_heat(heats)
    if heat is None:
        return None
    load, layer, expert = heat.hottest
    return {
        "num_replicas": len(heats),
        "num_layers": heat.num_layers,
        "num_experts": heat.num_experts,
        "layers_per_row": heat.layers_per_row,
        "experts_per_column": heat.experts_per_column,
        "load_percent": heat.load_percent,
        "copied_cells": heat.copied_cells,
        "num_ranks": heat.num_ranks,
        "num_copies": heat.num_copies,
        "imbalance": heat.imbalance,
        "imbalance_without_copies": heat.imbalance_without_copies,
        "hottest": {"load": load, "layer": layer, "expert": expert},
    }


def view_event(event: FleetEvent) -> Json:
    return {
        "at": round(event.at_unix_s, 3),
        "model": event.model,
        "replica": event.replica_id or None,
        "kind": event.kind,
        "reason": event.reason,
    }


def view_replica(connection: ReplicaConnection, fleet: FleetRecord) -> Json:
    hello, load = connection.hello, connection.load
    last = fleet.last_of(connection.replica_id)
    return {
        "id": connection.replica_id,
        "model": hello.model,
        "state": connection.state.name.lower(),
        "last_event": view_event(last) if last else None,
        "host": hello.host,
        "device": hello.device,
        "dtype": hello.dtype,
        "kernels": hello.kernels,
        "quantization": hello.quantization,
        "tensor_parallel": hello.tensor_parallel,
        "expert_parallel": hello.expert_parallel,
        "ranks": [
            {"rank": rank.rank, "pid": rank.pid, "device": rank.device, "address": rank.address}
            for rank in hello.ranks
        ],
        "in_flight": connection.in_flight,
        "running": sum(load.running),
        "waiting": sum(load.waiting),
        "kv_used_ratio": kv_used_ratio([connection]),
        "step_ms": load.step_ms or None,
        "power_w": load.power_w or None,
        "source": hello.energy_source or None,
    }


def view_request(closed: ClosedRequest, *, now_s: float) -> Json:
    """Ids, counts, times, joules. Never text."""
    energy = closed.account.energy
    output_tokens = closed.usage.completion_tokens
    return {
        "id": closed.request_id,
        "trace_id": closed.trace_id,
        "model": closed.model,
        "age_s": now_s - closed.ended_s,
        "prompt_tokens": closed.usage.prompt_tokens,
        "output_tokens": output_tokens,
        "ttft_ms": closed.ttft_ms,
        "tpot_ms": closed.tpot_ms,
        "total_ms": closed.timing.total_ms,
        "energy_mj": energy.total_mj if energy else None,
        "host_mj": energy.host_mj if energy else None,
        "j_per_output_token": energy.total_mj / 1e3 / output_tokens if energy and output_tokens else None,
        "is_final": closed.account.is_final,
        "source": energy.source if energy else None,
        "outcome": closed.outcome,
    }


def _of_devices(sums: LedgerSums) -> dict[str, int]:
    """Whose the joules are is in /metrics: a page that is sent every second has no place for it."""
    return {name: value_mj for name, value_mj in sums.amounts_mj.items() if not name.startswith("host_")}
