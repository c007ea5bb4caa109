"""All replicas attached to this router. There is no registry behind it: who is attached is all there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cluster.balancing.lane_view import LaneView
from cluster.balancing.prefix_index import PrefixIndex
from cluster.link.fleet_record import FleetRecord
from cluster.link.replica_connection import ReplicaConnection, ReplicaState
from cluster.request.errors import UnknownReplica


class ReplicaPool:
    """Mutable; owned by the event loop. One connection per replica id: the newest life wins."""

    def __init__(self, *, on_change: Callable[[], None]) -> None:
        self.prefixes = PrefixIndex()
        """What the attached replicas hold in their prefix caches."""
        self.fleet = FleetRecord()
        """What happened to replicas, and why."""
        self._on_change = on_change
        self.on_load: Callable[[str], None] = lambda model: None
        """Called with the model whenever a replica of it told its load."""
        self._connections: dict[str, ReplicaConnection] = {}

    def __iter__(self) -> Iterator[ReplicaConnection]:
        return iter(tuple(self._connections.values()))

    def __len__(self) -> int:
        return len(self._connections)

    def find(self, replica_id: str) -> ReplicaConnection | None:
        return self._connections.get(replica_id)

    def attach(self, connection: ReplicaConnection) -> None:
        """Take it in. An older connection of the same replica is closed: its link or its process is gone."""
        older = self._connections.get(connection.replica_id)
        self._connections[connection.replica_id] = connection
        self.prefixes.forget(connection.replica_id)
        if older is not None:
            assert older.epoch <= connection.epoch
            older.close()
        self.fleet.attach(
            model=connection.hello.model,
            replica_id=connection.replica_id,
            epoch=connection.epoch,
            what=_describe(connection),
        )
        self._on_change()

    def detach(self, connection: ReplicaConnection) -> None:
        """Forget it, unless a newer life has taken its place; its streams fail."""
        connection.close()
        self.observe(connection)
        if self._connections.get(connection.replica_id) is connection:
            del self._connections[connection.replica_id]
            self.prefixes.forget(connection.replica_id)
        self._on_change()

    def drain(self, replica_id: str, *, reason: str) -> None:
        """Stop new work on a replica. Raises UnknownReplica."""
        connection = self._connections.get(replica_id)
        if connection is None:
            raise UnknownReplica("no replica of this id is attached; see Status for those that are")
        connection.drain(reason)
        self.changed(connection)

    def changed(self, connection: ReplicaConnection) -> None:
        """The state of a replica changed by a word of its own, or of an operator."""
        self.observe(connection)
        self._on_change()

    def observe(self, connection: ReplicaConnection) -> None:
        """Look how it stands, for the record. An older life than the attached one is not looked at."""
        if self._connections.get(connection.replica_id) is connection:
            self.fleet.observe(
                model=connection.hello.model,
                replica_id=connection.replica_id,
                epoch=connection.epoch,
                standing=connection.standing,
            )

    def of_model(self, model: str) -> list[ReplicaConnection]:
        return [connection for connection in self._connections.values() if connection.hello.model == model]

    def ready(self, model: str) -> list[ReplicaConnection]:
        """The replicas of a model that take new work."""
        return [connection for connection in self.of_model(model) if connection.state is ReplicaState.READY]

    def lanes(self, model: str) -> list[LaneView]:
        """All lanes of a model that take new work."""
        return [lane for connection in self.ready(model) for lane in connection.lane_views()]


def _describe(connection: ReplicaConnection) -> str:
    """Example: `tp 2, ep 2 on cpu, bfloat16`."""
    hello = connection.hello
    words = f"tp {hello.tensor_parallel}, ep {hello.expert_parallel}"
    return f"{words} on {hello.device}, {hello.dtype}" if hello.device else words
