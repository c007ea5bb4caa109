"""What a replica and a router say to each other beyond requests and tokens, as plain data.

Ids are those of the link. `codec.py` turns this into protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from replicas.config import ReplicaConfig
from replicas.energy.bill import RequestJoules
from replicas.energy.meter import Source
from replicas.expert_heat import ExpertHeat
from replicas.frames import Cancel, Stop, Submit
from replicas.request import EngineReady, LoadSnapshot
from replicas.supervisor.energy_account import EnergySums
from replicas.supervisor.rank_group import RankProcess


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaCard:
    """What stays true for the life of a replica's group; the greeting on every link."""

    config: ReplicaConfig
    epoch: int
    engine: EngineReady
    ranks: tuple[RankProcess, ...]
    tokenizer_digest: str
    engine_version: str
    host: str
    supervisor_pid: int
    metrics_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """The last word on every link. `is_lost`: the group is, and a request may have been the cause;
    `num_unproven`: how many there are that another replica had before, and that are not proven harmless."""

    reason: str
    is_lost: bool = False
    num_unproven: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """The engine's load and what its work costs now; empty and None while no meter is known.

    `experts` is None of a model without, and until they worked.
    """

    engine: LoadSnapshot
    energy_source: str = ""
    joules_per_token: float | None = None
    power_w: float | None = None
    idle_power_w: float | None = None
    active_power_w: float | None = None
    experts: ExpertHeat | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerState:
    """What the ledger has divided of the meter, by source, up to `until_ns` of the host's monotonic clock."""

    until_ns: int
    sums: Mapping[Source, EnergySums] = field(default_factory=dict)
    agent_metrics_addresses: tuple[str, ...] = ()
    """Of the energy agents that read the meter, this host's first; an empty one shows none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyStatement:
    """The energy of one attempt at a request. If not `joules.final`, a final one follows soon.

    `joules` None: unknown, and it stays so, since nothing metered the steps.
    """

    request_id: int
    attempt: int
    joules: RequestJoules | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Down: take no new requests from anyone, finish those there are."""

    reason: str


RouterCommand = Submit | Cancel | Stop | Drain
"""The first three are those of the rank's socket, with the request ids of the link."""
