"""Gauges of the router: what is attached and under way at the moment they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from cluster.link.replica_connection import ReplicaState
from cluster.link.replica_pool import ReplicaPool
from cluster.router.served_model import ServedModel


def read_gauges(models: Mapping[str, ServedModel], pool: ReplicaPool) -> Iterable[Metric]:
    """Streams per model, replicas by state, KV blocks per replica."""
    active = GaugeMetricFamily("wattline_active_streams", "Requests under way.", labels=("model",))
    replicas = GaugeMetricFamily(
        "wattline_replicas", "Attached replicas, by state.", labels=("model", "state")
    )
    for name, model in models.items():
        active.add_metric((name,), model.active_requests)
        states = [connection.state for connection in pool.of_model(name)]
        for state in ReplicaState:
            replicas.add_metric((name, state.name.lower()), states.count(state))
    free = GaugeMetricFamily("wattline_kv_blocks_free", "Free KV blocks.", labels=("model", "replica"))
    capacity = GaugeMetricFamily("wattline_kv_blocks_capacity", "All KV blocks.", labels=("model", "replica"))
    for connection in pool:
        labels = (connection.hello.model, connection.replica_id)
        free.add_metric(labels, sum(connection.load.free_blocks))
        capacity.add_metric(labels, sum(connection.load.total_blocks))
    return (active, replicas, free, capacity)
