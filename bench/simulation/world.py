"""A router without sockets and its simulated replicas: all that decides is the real code."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from bench.simulation.sim_replica import ReplicaShape, SimReplica
from cluster.admission.energy_lease import LocalLeases
from cluster.admission.tenants import Tenants
from cluster.config import Config, TelemetrySection
from cluster.link.detokenize_worker import DetokenizeWorker, StreamTokens, deliver, detokenize
from cluster.link.reader_pace import ReaderPace
from cluster.link.replica_connection import ReplicaConnection
from cluster.link.replica_pool import ReplicaPool
from cluster.request.answer import Completed, TextDelta
from cluster.request.completion import Completion
from cluster.request.errors import DeadlinePassed, RouterError
from cluster.request.resume_token import ResumeSeal
from cluster.router.bookkeeping import Books
from cluster.router.caller import Caller
from cluster.router.continuation import Continuations
from cluster.router.energy_record import EnergyRecord
from cluster.router.gate import Gate
from cluster.router.refusal import Refusals
from cluster.router.resumption import Resumption
from cluster.router.route_finder import RouteFinder
from cluster.router.story_record import StoryRecord
from cluster.router.streams import Streams
from cluster.router.turns import Turns
from cluster.security.cache_salt import CacheSalts
from cluster.served_model import ServedModel
from cluster.telemetry.journal import Journal, Objective
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.tracing import Telemetry
from cluster.text.null_tokenizer import NullTokenizer
from cluster.text.text_threads import TextThreads
from protos import wattline_link_pb2 as link
from replicas.wire.caches import cache_from_wire

WATCH_S = 0.1


@dataclass(slots=True, kw_only=True)
class Told:
    """All that one caller got. `error` None and `completed` None: it went away."""

    arrived_s: float
    token_ids: list[int] = field(default_factory=list)
    first_s: float | None = None
    last_s: float | None = None
    num_ends: int = 0
    completed: Completed | None = None
    error: RouterError | None = None

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.arrived_s


class InlineWorker(DetokenizeWorker):
    """Makes text at once, so that there is no thread whose turns are left to chance."""

    def __init__(self) -> None:
        """Nothing to start."""

    def submit(self, step: Sequence[StreamTokens]) -> None:
        deliver([detokenize(*entry) for entry in step])


class World:
    """One model, its replicas, one router. Make it and use it on a virtual loop."""

    def __init__(self, config: Config, *, seed: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.random = Random(seed)
        section = config.models[0]
        self.model = ServedModel(
            section, NullTokenizer(section.null_engine.vocab_size), max_prompt_bytes=1 << 20
        )
        models = {self.model.name: self.model}
        self.pool = ReplicaPool(on_change=lambda: None)
        self.replicas: dict[str, SimReplica] = {}
        self.num_deaths = 0
        self._freeze_s = config.router.failover.freeze_s
        finder = RouteFinder(pool=self.pool, random=Random(seed))
        turns = Turns(finder=finder, random=Random(seed), clock_s=self.now_s)
        refusals = Refusals(Random(seed))
        self.gate = Gate(self.model, pool=self.pool, finder=finder, refusals=refusals, clock_s=self.now_s)
        metrics = RouterMetrics()
        self._telemetry = Telemetry(TelemetrySection(), router_id="simulated", version="0")
        objective = Objective(ttft_ms=section.slo.ttft_ms, tpot_ms=section.slo.tpot_ms)
        self.journal = Journal([(self.model.name, objective)])
        tenants = [one.to_tenant() for one in config.tenants]
        budgets_j = {one.name: one.joules_per_day for one in tenants if one.joules_per_day is not None}
        self.tenants = Tenants(tenants, leases=LocalLeases(budgets_j, wall_s=self.now_s), clock_s=self.now_s)
        self._streams = Streams(
            section=config.router,
            models=models,
            pool=self.pool,
            gates={self.model.name: self.gate},
            refusals=refusals,
            tenants=self.tenants,
            threads=TextThreads(1),
            salts=CacheSalts(b"simulated"),
            continuations=Continuations(seal=ResumeSeal(b"simulated"), pool=self.pool, turns=turns),
            books=Books(
                record=EnergyRecord(16),
                journal=self.journal,
                stories=StoryRecord(),
                metrics=metrics,
                telemetry=self._telemetry,
                ledger=None,
                clock_s=self.now_s,
            ),
            resumption=Resumption(
                section=config.router.failover, turns=turns, metrics=metrics, clock_s=self.now_s
            ),
            clock_s=self.now_s,
        )
        self._watching = asyncio.create_task(self._watch())

    def now_s(self) -> float:
        return self.loop.time()

    def add_replica(self, replica_id: str, shape: ReplicaShape, *, epoch: int = 1) -> SimReplica:
        """It attaches now."""
        replica = SimReplica(shape, clock_s=self.now_s)
        connection = ReplicaConnection(
            hello=replica.hello(replica_id, self.model.name),
            epoch=epoch,
            max_waiting=shape.limits.max_waiting,
            freeze_s=self._freeze_s,
            worker=InlineWorker(),
            pace=ReaderPace(),
            clock_s=self.now_s,
        )
        self.pool.attach(connection)
        replica.attach(
            connection,
            on_load=self.gate.pump,
            on_cache=lambda changes: self._note_cache(connection, changes),
            on_crash=lambda: self.kill(replica_id, epoch=epoch),
        )
        self.replicas[f"{replica_id}.{epoch}"] = replica
        return replica

    def kill(self, replica_id: str, *, epoch: int = 1) -> None:
        """Its process is gone, and the link with it. Counted in `num_deaths`."""
        self.num_deaths += 1
        self.replicas[f"{replica_id}.{epoch}"].kill()
        connection = self.pool.find(replica_id)
        if connection is not None and connection.epoch == epoch:
            self.pool.detach(connection)

    async def ask(
        self, completion: Completion, *, tenant: str = "default", deadline_s: float | None = None
    ) -> Told:
        """One request to its end. Cancel it, and it is cancelled as a caller's going away would."""
        told = Told(arrived_s=self.now_s())
        await self.serve(completion, told, tenant=tenant, deadline_s=deadline_s)
        return told

    async def serve(
        self, completion: Completion, told: Told, *, tenant: str = "default", deadline_s: float | None = None
    ) -> None:
        """As `ask`, into a record that outlives a cancellation."""
        ends_s = None if deadline_s is None else self.now_s() + deadline_s
        caller = Caller(
            request_id="simulated",
            tenant=tenant,
            span=self._telemetry.start_rpc("simulated", ()),
            time_remaining_s=lambda: None if ends_s is None else ends_s - self.now_s(),
            accept=_accept,
            interrupt=lambda error: None,
            arrived_s=told.arrived_s,
        )
        try:
            async with asyncio.timeout(deadline_s):
                async for event in self._streams.run(completion, caller):
                    self._note(told, event)
        except RouterError as error:
            told.error = error
        except TimeoutError:
            told.error = DeadlinePassed()

    async def close(self) -> None:
        """Every replica stops; what is on open bills is lost."""
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        for replica in self.replicas.values():
            replica.kill()
        for connection in self.pool:
            self.pool.detach(connection)

    def check_idle(self) -> None:
        """Assert that nothing is left of any request: no queue, no stream, no hold, no charge."""
        assert len(self.gate) == 0
        assert self._streams.in_flight == 0
        assert all(account.in_flight == 0 for account in self.tenants)
        for connection in self.pool:
            assert connection.in_flight == 0
            assert sum(view.unseen_requests for view in connection.lane_views()) == 0
        for replica in self.replicas.values():
            replica.check()

    def _note(self, told: Told, event: TextDelta | Completed) -> None:
        if isinstance(event, Completed):
            told.completed = event
            return
        if event.token_ids:
            told.last_s = self.now_s()
            told.first_s = told.first_s or told.last_s
            told.token_ids += event.token_ids
        told.num_ends += event.finish is not None

    def _note_cache(self, connection: ReplicaConnection, changes: Sequence[link.CacheChange]) -> None:
        if self.pool.find(connection.replica_id) is connection:
            for change in cache_from_wire(changes):
                owner = (connection.replica_id, change.lane)
                self.pool.prefixes.update(owner, added=change.added, removed=change.removed)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            for connection in self.pool:
                connection.check_progress()


async def _accept() -> None:
    """There are no headers to send."""
