"""What /metrics reads off at the moment it is asked: what is attached, under way, and divided by the ledgers.

Labels are configured models, attached replicas and a fixed set of words: callers cannot make new ones. The
`vllm:` names are what stock endpoint pickers and scalers look for; they say the same as ours beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from cluster.energy.account import HOST_SOURCE
from cluster.energy.ledger_book import HostSums, LedgerSums
from cluster.ledger.recorder import LedgerRecorder
from cluster.link.replica_connection import ReplicaConnection, ReplicaState
from cluster.link.replica_pool import ReplicaPool
from cluster.served_model import ServedModel

NOBODY = "none"
"""The tenant of joules that are no tenant's."""
ENERGY_HELP = (
    "Metered energy of the attached replicas by what it was for, as their ledgers divided it; the rows "
    "of a source add up to its meter. Each router counts from where a replica dialled it: do not sum routers."
)


def read_gauges(
    models: Mapping[str, ServedModel], pool: ReplicaPool, queues: Mapping[str, Sized]
) -> Iterable[Metric]:
    """All of them, made afresh. `queues` are those of the router, by model."""
    yield from _model_gauges(models, pool, queues)
    yield from _replica_gauges(pool)
    yield from _picker_gauges(models, pool, queues)
    yield from _energy_counters(models)


def read_recorder(recorder: LedgerRecorder) -> Iterable[Metric]:
    """How the ledger store hears of requests."""
    yield GaugeMetricFamily(
        "wattline_ledger_pending_requests",
        "Closed requests that the store has not confirmed.",
        value=recorder.num_pending,
    )
    yield CounterMetricFamily(
        "wattline_ledger_dropped_requests",
        "Closed requests that the store will never hear of.",
        value=recorder.num_dropped,
    )


def _model_gauges(
    models: Mapping[str, ServedModel], pool: ReplicaPool, queues: Mapping[str, Sized]
) -> Iterable[Metric]:
    active = GaugeMetricFamily("wattline_active_streams", "Requests under way.", labels=("model",))
    queued = GaugeMetricFamily(
        "wattline_queued_requests", "Requests that wait in this router for a replica.", labels=("model",)
    )
    replicas = GaugeMetricFamily(
        "wattline_replicas", "Attached replicas, by state.", labels=("model", "state")
    )
    wanted = GaugeMetricFamily(
        "wattline_replicas_wanted", "Replicas that should be ready: replicas.min.", labels=("model",)
    )
    for name, model in models.items():
        active.add_metric((name,), model.active_requests)
        queued.add_metric((name,), len(queues[name]))
        wanted.add_metric((name,), model.section.replicas.min)
        states = [connection.state for connection in pool.of_model(name)]
        for state in ReplicaState:
            replicas.add_metric((name, state.name.lower()), states.count(state))
    return active, queued, replicas, wanted


def _replica_gauges(pool: ReplicaPool) -> Iterable[Metric]:
    def gauge(name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(name, text, labels=("model", "replica"))

    free = gauge("wattline_kv_blocks_free", "Free KV blocks.")
    capacity = gauge("wattline_kv_blocks_capacity", "All KV blocks.")
    usage = gauge("wattline_kv_usage_ratio", "Part of the KV blocks in use.")
    batch = gauge("wattline_batch_sequences", "Sequences that the engine's steps work on.")
    waiting = gauge("wattline_waiting_sequences", "Sequences that wait for a place in the batch.")
    power = gauge("wattline_power_watts", "Power of the replica's devices; absent while unknown.")
    for connection in pool:
        labels, load = (connection.hello.model, connection.replica_id), connection.load
        free.add_metric(labels, sum(load.free_blocks))
        capacity.add_metric(labels, sum(load.total_blocks))
        usage.add_metric(labels, kv_used_ratio([connection]) or 0.0)
        batch.add_metric(labels, sum(load.running))
        waiting.add_metric(labels, sum(load.waiting))
        if load.power_w:
            power.add_metric(labels, load.power_w)
    return free, capacity, usage, batch, waiting, power


def _picker_gauges(
    models: Mapping[str, ServedModel], pool: ReplicaPool, queues: Mapping[str, Sized]
) -> Iterable[Metric]:
    def gauge(name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"vllm:{name}", text, labels=("model_name",))

    running = gauge("num_requests_running", "Requests in the engines' batches.")
    waiting = gauge("num_requests_waiting", "Requests that wait for a place in a batch, here or there.")
    usage = gauge("kv_cache_usage_perc", "Part of the KV blocks in use; 1 is all.")
    for name in models:
        attached = pool.of_model(name)
        running.add_metric((name,), sum(sum(connection.load.running) for connection in attached))
        waiting.add_metric((name,), num_waiting(attached, queues[name]))
        usage.add_metric((name,), kv_used_ratio(attached) or 0.0)  # Without blocks 0, as pickers expect.
    return running, waiting, usage


def _energy_counters(models: Mapping[str, ServedModel]) -> Iterable[Metric]:
    """Nothing for a model while its energy is unknown: a series of zeros would be a claim."""
    joules = CounterMetricFamily(
        "wattline_energy_joules",
        ENERGY_HELP,
        labels=("ledger", "phase", "component", "source", "model", "tenant"),
    )
    meter = CounterMetricFamily(
        "wattline_energy_meter_joules", "Metered energy that the ledgers divided.", labels=("source", "model")
    )
    wasted = CounterMetricFamily(
        "wattline_energy_wasted_joules",
        "The part of the requests' energy that bought no delivered token.",
        labels=("source", "model"),
    )
    static = CounterMetricFamily(
        "wattline_energy_static_joules",
        "The part of the requests' energy that is drawn whatever the work.",
        labels=("source", "model"),
    )
    host = CounterMetricFamily(
        "wattline_host_energy_joules",
        "What the hosts drew beside the meters, as the requests' part and the rest; in no other series.",
        labels=("ledger", "source", "model"),
    )
    for name, model in models.items():
        for source, sums in model.ledger.sums.items():
            for labels, tenant, value_mj in _divided(sums):
                joules.add_metric((*labels, source, name, tenant), value_mj / 1e3)
            meter.add_metric((source, name), sums.meter_mj / 1e3)
            wasted.add_metric((source, name), sums.wasted_mj / 1e3)
            static.add_metric((source, name), sums.static_mj / 1e3)
        _add_host(host, name, model.ledger.host)
    return joules, meter, wasted, static, host


def _add_host(family: CounterMetricFamily, model: str, host: HostSums | None) -> None:
    """Nothing where no host is metered. Whatever the devices' source, a host's is one."""
    if host is not None:
        family.add_metric(("request", HOST_SOURCE, model), host.requests_mj / 1e3)
        family.add_metric(("rest", HOST_SOURCE, model), host.rest_mj / 1e3)


def _divided(sums: LedgerSums) -> Iterable[tuple[tuple[str, str, str], str, int]]:
    """(ledger, phase, component), tenant and millijoules; the rows add up to the meter.

    What a replica did not name a tenant for is nobody's, as is what no request took.
    """
    prefill_mj = {tenant or NOBODY: each.prefill_mj for tenant, each in sums.tenants.items()}
    decode_mj = {tenant or NOBODY: each.decode_mj for tenant, each in sums.tenants.items()}
    for phase, total_mj, by_tenant in (
        ("prefill", sums.prefill_mj, prefill_mj),
        ("decode", sums.decode_mj, decode_mj),
    ):
        unnamed_mj = total_mj - sum(by_tenant.values())
        if unnamed_mj or not by_tenant:
            by_tenant[NOBODY] = by_tenant.get(NOBODY, 0) + unnamed_mj
        for tenant, value_mj in by_tenant.items():
            yield ("request", phase, "device"), tenant, value_mj
    yield ("idle", "none", "device"), NOBODY, sums.idle_mj
    yield ("unattributed", "none", "device"), NOBODY, sums.unattributed_mj


def num_waiting(replicas: Iterable[ReplicaConnection], queue: Sized) -> int:
    """Requests of a model that wait for a place in a batch, in its replicas or in this router's queue."""
    return len(queue) + sum(sum(connection.load.waiting) for connection in replicas)


def kv_used_ratio(replicas: list[ReplicaConnection]) -> float | None:
    """The part of all KV blocks that is in use; None while nobody has any."""
    total_blocks = sum(sum(connection.load.total_blocks) for connection in replicas)
    free_blocks = sum(sum(connection.load.free_blocks) for connection in replicas)
    return 1.0 - free_blocks / total_blocks if total_blocks else None
