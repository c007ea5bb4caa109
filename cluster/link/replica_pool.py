"""All replicas attached to this router. There is no registry behind it: who is attached is all there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from cluster.link.replica_connection import ReplicaConnection, ReplicaState
from cluster.router.balancer import LaneView, choose_lane
from cluster.router.errors import Overloaded, UnknownReplica
from cluster.router.failover import ReplicaIdentity

FULL_RETRY_MS = 250


class ReplicaPool:
    """Mutable; owned by the event loop. One connection per replica id: the newest life wins."""

    def __init__(self, *, random: Random, on_change: Callable[[], None]) -> None:
        self._random = random
        self._on_change = on_change
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
        if older is not None:
            assert older.epoch <= connection.epoch
            older.close()
        self._on_change()

    def detach(self, connection: ReplicaConnection) -> None:
        """Forget it, unless a newer life has taken its place; its streams fail."""
        connection.close()
        if self._connections.get(connection.replica_id) is connection:
            del self._connections[connection.replica_id]
        self._on_change()

    def drain(self, replica_id: str, *, reason: str) -> None:
        """Stop new work on a replica. Raises UnknownReplica."""
        connection = self._connections.get(replica_id)
        if connection is None:
            raise UnknownReplica("no replica of this id is attached; see Status for those that are")
        connection.drain(reason)
        self._on_change()

    def changed(self) -> None:
        """The state of a replica changed by its own word."""
        self._on_change()

    def of_model(self, model: str) -> list[ReplicaConnection]:
        return [connection for connection in self._connections.values() if connection.hello.model == model]

    def ready(self, model: str) -> list[ReplicaConnection]:
        """The replicas of a model that take new work."""
        return [connection for connection in self.of_model(model) if connection.state is ReplicaState.READY]

    def lanes(self, model: str) -> list[LaneView]:
        """All lanes of a model that take new work."""
        return [lane for connection in self.ready(model) for lane in connection.lane_views()]

    def choose(self, model: str, *, prompt_tokens: int) -> tuple[ReplicaConnection, int]:
        """The replica and lane for a request. Raises Overloaded where none has room (any more)."""
        lane = choose_lane(self.lanes(model), prompt_tokens=prompt_tokens, random=self._random)
        if lane is None:
            raise Overloaded("all replicas of this model are full", retry_after_ms=FULL_RETRY_MS)
        return self._connections[lane.replica_id], lane.lane

    def choose_like(
        self,
        identity: ReplicaIdentity,
        *,
        prompt_tokens: int,
        context_tokens: int,
        excluded: ReplicaConnection | None,
    ) -> tuple[ReplicaConnection, int] | None:
        """A place at a replica of equal weights and tokens with that context; None: there is none."""
        lanes = [
            lane
            for connection in self.ready(identity.model)
            if connection is not excluded
            and connection.identity == identity
            and connection.hello.context_tokens >= context_tokens
            for lane in connection.lane_views()
        ]
        lane = choose_lane(lanes, prompt_tokens=prompt_tokens, random=self._random)
        return None if lane is None else (self._connections[lane.replica_id], lane.lane)
