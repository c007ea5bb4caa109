"""A replica without processes: the engine's own scheduler and the null engine's tokens, in virtual time.

Its steps take the null engine's time, and longer by the size of the batch where told so. Its meter counts
`power_w` while a step runs and `idle_power_w` else; each step's energy is divided among its members in
integers. It is killed, frozen, slowed or made to say stale things on order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.link.replica_connection import ReplicaConnection
from protos import wattline_link_pb2 as link
from replicas.config import EngineLimits, NullEngineConfig
from replicas.engine.load import LoadAverages
from replicas.engine.scheduled_step import ScheduledStep
from replicas.engine.scheduler import Scheduler
from replicas.link.protocol import PROTOCOL_VERSION
from replicas.plan import StepOutcome
from replicas.rank.null_runner import NullRunner
from replicas.request import FinishReason, SequenceDelta, StepMember, StepRecord, StepRows
from replicas.wire.caches import cache_to_wire
from replicas.wire.deltas import delta_to_wire
from replicas.wire.loads import load_to_wire
from replicas.wire.requests import request_from_wire

HEARTBEAT_S = 0.25
LINK_S = 0.0005
"""One way."""
NS_PER_S = 1e9
SOURCE = "fake"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaShape:
    """What kind of replica. `ms_per_sequence` is what each sequence of a batch adds to a step."""

    null: NullEngineConfig
    limits: EngineLimits
    ms_per_sequence: float = 0.0

    def step_s(self, *, num_prefill_tokens: int, num_rows: int) -> float:
        prefill_s = num_prefill_tokens / self.null.prefill_tokens_per_s
        return (self.null.step_ms + self.ms_per_sequence * num_rows) / 1e3 + prefill_s


class SimReplica:
    """Mutable; lives on a virtual loop."""

    def __init__(self, shape: ReplicaShape, *, clock_s: Callable[[], float]) -> None:
        self.shape = shape
        self.slowness = 1.0
        self.is_stale = False
        """Says nothing of its load or its caches while set."""
        self.busy_s = 0.0
        self.divided_mj = 0
        """Of the meter, while steps ran."""
        self.billed_mj = 0
        self.lost_mj = 0
        """On bills that nobody was told of: their requests were still open at the end."""
        self.num_running_max = 0
        self._clock_s = clock_s
        self._runner = NullRunner(replace(shape.null, step_ms=0.0, prefill_tokens_per_s=0.0), shape.limits)
        self._scheduler = Scheduler(shape.limits, self._runner.shape)
        self._averages = LoadAverages()
        self._on_load: Callable[[], None] = lambda: None
        self._on_cache: Callable[[Sequence[link.CacheChange]], None] = lambda _: None
        self._on_crash: Callable[[], None] = lambda: None
        self._work = asyncio.Event()
        self._awake = asyncio.Event()
        self._awake.set()
        self._bills: dict[int, int] = {}
        self._pending_cache: list[link.CacheChange] = []
        self._tasks: list[asyncio.Task[None]] = []

    def hello(self, replica_id: str, model: str) -> link.Hello:
        shape = self._runner.shape
        return link.Hello(
            protocol=PROTOCOL_VERSION,
            replica_id=replica_id,
            model=model,
            lanes=1,
            context_tokens=self._scheduler.context_tokens,
            max_sequences=self.shape.limits.max_sequences,
            vocab_size=shape.vocab_size,
            weights_digest=shape.weights_digest,
            block_tokens=self.shape.limits.block_tokens,
            load=self._load(),
            energy_source=SOURCE,
        )

    def attach(
        self,
        connection: ReplicaConnection,
        *,
        on_load: Callable[[], None],
        on_cache: Callable[[Sequence[link.CacheChange]], None],
        on_crash: Callable[[], None],
    ) -> None:
        """Begin to work for the router behind `connection`. `on_crash`: its engine failed, as told."""
        self._on_load, self._on_cache, self._on_crash = on_load, on_cache, on_crash
        work = (self._obey(connection), self._step(connection), self._beat(connection))
        self._tasks = [asyncio.create_task(one) for one in work]

    def freeze(self) -> None:
        """Neither speak nor listen nor work."""
        self._awake.clear()

    def thaw(self) -> None:
        self._awake.set()

    def kill(self) -> None:
        """It is gone between two events; what it had in hand is lost. Safe to call twice."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        self.lost_mj += sum(self._bills.values())
        self._bills.clear()

    def meter_mj(self, *, until_s: float) -> int:
        """What the whole replica drew until then: steps, and idle time at the idle power."""
        return self.divided_mj + round((until_s - self.busy_s) * self.shape.null.idle_power_w * 1e3)

    def check(self) -> None:
        """Assert that queues, rows and blocks agree, and that joules are conserved so far."""
        self._scheduler.check()
        assert self.divided_mj == self.billed_mj + self.lost_mj + sum(self._bills.values())
        assert self.num_running_max <= self.shape.limits.max_sequences

    async def _obey(self, connection: ReplicaConnection) -> None:
        while True:
            command = await connection.commands.get()
            await asyncio.sleep(LINK_S)
            await self._awake.wait()
            match command.WhichOneof("command"):
                case "submit":
                    request = request_from_wire(command.submit, now_ns=self._now_ns())
                    self._bills[request.request_id] = 0
                    self._scheduler.submit(request, now_ns=self._now_ns())
                case "cancel":
                    self._scheduler.cancel(command.cancel.request_id, now_ns=self._now_ns())
                case "stop":
                    self._scheduler.stop(command.stop.request_id, now_ns=self._now_ns())
            self._work.set()

    async def _step(self, connection: ReplicaConnection) -> None:
        while True:
            await self._awake.wait()
            if not self._scheduler.has_work:
                self._work.clear()
                await self._work.wait()
                continue
            started_s = self._clock_s()
            scheduled = self._scheduler.schedule(now_ns=self._now_ns())
            if scheduled is not None:
                try:
                    outcome = self._runner.launch(scheduled.plan).result()
                except RuntimeError:
                    self._on_crash()
                    return
                await asyncio.sleep(self._duration_s(scheduled))
                await self._awake.wait()
                self._commit(scheduled, outcome, started_s)
            deltas = self._scheduler.take_deltas()
            await asyncio.sleep(LINK_S)
            self._tell(connection, deltas)

    def _duration_s(self, scheduled: ScheduledStep) -> float:
        rows = scheduled.plan.rows
        self.num_running_max = max(self.num_running_max, len(rows))
        num_prefill_tokens = sum(len(row.token_ids) for row in rows if len(row.token_ids) > 1)
        return self.slowness * self.shape.step_s(num_prefill_tokens=num_prefill_tokens, num_rows=len(rows))

    def _commit(self, scheduled: ScheduledStep, outcome: StepOutcome, started_s: float) -> None:
        members = self._scheduler.commit(scheduled, outcome, now_ns=self._now_ns())
        ended_s = self._clock_s()
        self.busy_s += ended_s - started_s
        self._bill(members, round((ended_s - started_s) * self.shape.null.power_w * 1e3))
        self._averages.observe(
            StepRecord(
                step=scheduled.plan.step,
                start_ns=round(started_s * NS_PER_S),
                end_ns=round(ended_s * NS_PER_S),
                rows=StepRows.of(members),
            )
        )

    def _bill(self, members: tuple[StepMember, ...], energy_mj: int) -> None:
        """By new tokens, the remainder to the last; a sequence that ended meanwhile pays no more."""
        self.divided_mj += energy_mj
        open_members = [member for member in members if member.request_id in self._bills]
        num_tokens = sum(member.new_tokens for member in open_members)
        left_mj = energy_mj
        for member in open_members:
            share_mj = energy_mj * member.new_tokens // num_tokens
            self._bills[member.request_id] += share_mj
            left_mj -= share_mj
        if open_members:
            self._bills[open_members[-1].request_id] += left_mj
        else:
            self.lost_mj += left_mj

    def _tell(self, connection: ReplicaConnection, deltas: tuple[SequenceDelta, ...]) -> None:
        """One message with the step's tokens, then the joules of what ended."""
        self._pending_cache += cache_to_wire(self._scheduler.take_cache_changes())
        connection.heard()
        output = link.StepOutput(step=self._scheduler.step, deltas=[delta_to_wire(one) for one in deltas])
        if not self.is_stale:
            output.load.CopyFrom(self._load())
        connection.take_step(output)
        self._tell_cache()
        ended = [one for one in deltas if one.finish is not None]
        if ended:
            connection.take_energy(link.EnergyReport(requests=[self._final(one) for one in ended]))
        self._on_load()

    def _final(self, delta: SequenceDelta) -> link.RequestEnergy:
        energy_mj = self._bills.pop(delta.request_id, 0)
        self.billed_mj += energy_mj
        return link.RequestEnergy(
            request_id=delta.request_id,
            attempt=delta.attempt,
            decode_mj=energy_mj,
            wasted_mj=energy_mj if delta.finish is FinishReason.CANCELLED else 0,
            source=SOURCE,
            method="simulated",
            confidence_factor=1.0,
            final=True,
        )

    def _tell_cache(self) -> None:
        if not self.is_stale and self._pending_cache:
            self._on_cache(self._pending_cache)
            self._pending_cache = []

    async def _beat(self, connection: ReplicaConnection) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._awake.wait()
            connection.heard()
            if not self.is_stale:
                connection.take_load(self._load())
                self._tell_cache()
            self._on_load()

    def _load(self) -> link.LoadSnapshot:
        averages = self._averages
        load = load_to_wire(
            self._scheduler.load(
                step_ms=averages.step_ms,
                prefill_tokens_per_s=averages.prefill_tokens_per_s,
                decode_tokens_per_s=averages.decode_tokens_per_s,
            )
        )
        load.idle_power_w, load.active_power_w = self.shape.null.idle_power_w, self.shape.null.power_w
        return load

    def _now_ns(self) -> int:
        return round(self._clock_s() * NS_PER_S)
