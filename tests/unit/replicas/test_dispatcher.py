"""Commands reach the engine in its numbering; deltas and bills reach the right link, once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from replicas.config import EngineLimits, ReplicaConfig
from replicas.energy.ledger import Ledger
from replicas.energy.meter import Reading, Source
from replicas.frames import Cancel, Command, Stop, Submit
from replicas.link.link import LinkSession
from replicas.link.messages import Drain, EnergyStatement, ReplicaCard
from replicas.link.outbox import Outbox, Parcel
from replicas.request import (
    EngineCosts,
    EngineReady,
    FinishReason,
    GenerationRequest,
    LoadSnapshot,
    SequenceDelta,
    SequenceTiming,
    StepMember,
    StepRecord,
    StepResult,
    StepRows,
)
from replicas.step_report import TokenColumns, report_of
from replicas.supervisor.dispatcher import Dispatcher
from replicas.supervisor.energy_account import EnergyAccount

MS = 1_000_000
COSTS = EngineCosts(
    active_params=1_000_000,
    shared_weight_bytes=2_000_000,
    expert_bytes=0,
    num_layers=2,
    attention_dim=64,
    kv_bytes_per_token=256,
)
TIMING = SequenceTiming(
    queue_us=1, prefill_us=2, decode_us=3, cached_tokens=0, wasted_tokens=4, preemptions=0
)


def make_load(step: int = 0) -> LoadSnapshot:
    return LoadSnapshot(
        step=step,
        running=(0,),
        waiting=(0,),
        waiting_prefill_tokens=(0,),
        free_blocks=(8,),
        total_blocks=(8,),
    )


def make_card(*, max_sequences: int = 2, max_waiting: int = 1) -> ReplicaCard:
    limits = EngineLimits(max_sequences=max_sequences, max_waiting=max_waiting)
    engine = EngineReady(
        architecture="Null",
        lanes=1,
        context_tokens=64,
        max_sequences=max_sequences,
        vocab_size=100,
        block_tokens=16,
        weights_digest="w",
        dtype="float32",
        device="cpu",
        eos_token_ids=(2,),
        costs=COSTS,
        load=make_load(),
    )
    config = ReplicaConfig(model="m", source="null", replica_id="r", routers=(), limits=limits)
    return ReplicaCard(
        config=config,
        epoch=3,
        engine=engine,
        ranks=(),
        tokenizer_digest="",
        engine_version="0",
        host="h",
        supervisor_pid=1,
        metrics_address="",
    )


def make_request(request_id: int, *, attempt: int = 1) -> GenerationRequest:
    return GenerationRequest(request_id=request_id, attempt=attempt, prompt_ids=(5,), max_tokens=4)


def make_delta(
    engine_id: int, token_ids: tuple[int, ...], *, attempt: int = 1, finish: FinishReason | None = None
) -> SequenceDelta:
    return SequenceDelta(
        request_id=engine_id,
        attempt=attempt,
        first_offset=0,
        token_ids=token_ids,
        finish=finish,
        timing=None if finish is None else TIMING,
    )


@dataclass
class Desk:
    """A dispatcher, what it sent to the engine, and a clock."""

    has_meter: bool = False
    max_waiting: int = 1
    sent: list[Command] = field(default_factory=list)
    now_ns: int = 0

    def __post_init__(self) -> None:
        self.energy: EnergyAccount | None = None
        if self.has_meter:
            self.energy = EnergyAccount(Ledger(costs=COSTS, idle_power_w=0.0), clock=lambda: self.now_ns)
        self.dispatcher = Dispatcher(
            card=make_card(max_waiting=self.max_waiting), send=self.sent.append, energy=self.energy
        )

    def attach(self, router_id: str) -> LinkSession:
        session = LinkSession(router_id=router_id, target=router_id, outbox=Outbox())
        self.dispatcher.on_attached(session)
        return session

    def step(self, *deltas: SequenceDelta, record: StepRecord | None = None) -> None:
        result = StepResult(step=9, deltas=deltas, load=make_load(9), record=record)
        self.dispatcher.on_step(report_of(result))


NOTHING = Parcel(
    step=0,
    tokens=TokenColumns(request_ids=[], attempts=[], first_offsets=[], counts=[], token_ids=[]),
    deltas=(),
    energy=(),
    draining=None,
    goodbye=None,
)


async def take(session: LinkSession) -> Parcel:
    """What waits; nothing of it where nothing does."""
    session.outbox.nudge()
    return await session.outbox.take()


async def deltas(session: LinkSession) -> tuple[SequenceDelta, ...]:
    parcel = await take(session)
    return (*parcel.tokens.deltas(), *parcel.deltas)


async def test_each_link_gets_its_own_deltas_under_its_own_numbers() -> None:
    desk = Desk()
    a, b = desk.attach("a"), desk.attach("b")
    desk.dispatcher.on_command(a, Submit(request=make_request(7)))
    desk.dispatcher.on_command(b, Submit(request=make_request(7)))
    assert [command.request.request_id for command in desk.sent if isinstance(command, Submit)] == [1, 2]
    desk.step(make_delta(1, (11,)), make_delta(2, (22,)))
    assert await deltas(a) == (make_delta(7, (11,)),)
    assert await deltas(b) == (make_delta(7, (22,)),)
    assert desk.dispatcher.load().engine.step == 9


async def test_a_cancelled_request_is_heard_no_more() -> None:
    desk = Desk()
    link = desk.attach("a")
    desk.dispatcher.on_command(link, Submit(request=make_request(7)))
    desk.dispatcher.on_command(link, Cancel(request_id=7))
    desk.dispatcher.on_command(link, Cancel(request_id=7))
    desk.dispatcher.on_command(link, Stop(request_id=7))
    assert desk.sent[1:] == [Cancel(request_id=1)]
    desk.step(make_delta(1, (), finish=FinishReason.CANCELLED))
    assert await deltas(link) == ()
    assert desk.dispatcher.num_in_flight == 0
    assert desk.dispatcher.idle.is_set()


async def test_what_other_replicas_had_is_counted_over_all_links_until_it_has_given_a_few_tokens() -> None:
    desk = Desk()
    moved = replace(make_request(7), attempt=0, first_offset=9)
    for name, request in (
        ("a", moved),
        ("b", make_request(7, attempt=1)),
        ("c", replace(moved, first_offset=0)),
    ):
        desk.dispatcher.on_command(desk.attach(name), Submit(request=request))
    assert desk.dispatcher.num_unproven == 2
    desk.step(make_delta(1, (11, 12)), make_delta(2, (21,), attempt=1))
    desk.step(make_delta(1, (13, 14)))
    assert desk.dispatcher.num_unproven == 1


async def test_a_newer_attempt_replaces_the_older_one() -> None:
    desk = Desk()
    link = desk.attach("a")
    desk.dispatcher.on_command(link, Submit(request=make_request(7, attempt=1)))
    desk.dispatcher.on_command(link, Submit(request=make_request(7, attempt=2)))
    assert desk.sent[1] == Cancel(request_id=1)
    desk.step(make_delta(1, (11,), attempt=1), make_delta(2, (22,), attempt=2))
    assert await deltas(link) == (make_delta(7, (22,), attempt=2),)


async def test_an_attempt_sent_twice_is_taken_once() -> None:
    desk = Desk()
    link = desk.attach("a")
    for _ in range(2):
        desk.dispatcher.on_command(link, Submit(request=make_request(7)))
    assert len(desk.sent) == 1


async def test_more_than_engine_and_queue_hold_is_refused() -> None:
    desk = Desk(max_waiting=1)
    link = desk.attach("a")
    for request_id in range(4):
        desk.dispatcher.on_command(link, Submit(request=make_request(request_id)))
    (refused,) = await deltas(link)
    assert (refused.request_id, refused.finish) == (3, FinishReason.ERROR)
    assert refused.error is not None
    assert refused.error[0] == "RESOURCE_EXHAUSTED"
    assert len(desk.sent) == 3


async def test_a_lost_link_cancels_its_requests_and_no_others() -> None:
    desk = Desk()
    a, b = desk.attach("a"), desk.attach("b")
    desk.dispatcher.on_command(a, Submit(request=make_request(1)))
    desk.dispatcher.on_command(b, Submit(request=make_request(1)))
    desk.dispatcher.on_lost(a, "gone")
    assert desk.sent[2:] == [Cancel(request_id=1)]
    desk.step(make_delta(1, (), finish=FinishReason.CANCELLED), make_delta(2, (22,)))
    assert await take(a) == NOTHING
    assert await deltas(b) == (make_delta(1, (22,)),)


async def test_draining_tells_all_links_and_refuses() -> None:
    desk = Desk()
    early = desk.attach("a")
    desk.dispatcher.on_command(early, Drain(reason="update"))
    late = desk.attach("b")
    for link in (early, late):
        parcel = await take(link)
        assert parcel.draining == "update"
    desk.dispatcher.on_command(early, Submit(request=make_request(1)))
    parcel = await take(early)
    assert parcel is not None
    (refused,) = parcel.deltas
    assert refused.error == ("UNAVAILABLE", "the replica takes no new requests: update")
    assert parcel.energy == (EnergyStatement(request_id=1, attempt=1, joules=None),), "nobody waits for it"
    assert desk.sent == []


async def test_a_fenced_group_says_nothing() -> None:
    desk = Desk()
    link = desk.attach("a")
    desk.dispatcher.on_command(link, Submit(request=make_request(1)))
    desk.dispatcher.fence()
    desk.step(make_delta(1, (11,)))
    assert await take(link) == NOTHING
    assert desk.dispatcher.idle.is_set()


async def test_wasted_tokens_are_counted_also_for_requests_nobody_hears() -> None:
    desk = Desk()
    link = desk.attach("a")
    desk.dispatcher.on_command(link, Submit(request=make_request(1)))
    desk.dispatcher.on_lost(link, "gone")
    desk.step(make_delta(1, (), finish=FinishReason.CANCELLED))
    assert desk.dispatcher.wasted_tokens == 4


async def test_without_a_meter_energy_is_said_to_be_unknown_and_nothing_waits_for_it() -> None:
    desk = Desk()
    link = desk.attach("a")
    desk.dispatcher.on_command(link, Submit(request=make_request(1)))
    desk.step(make_delta(1, (11,), finish=FinishReason.STOP))
    parcel = await take(link)
    assert parcel.energy == (EnergyStatement(request_id=1, attempt=1, joules=None),)
    assert desk.dispatcher.billed.is_set()
    load = desk.dispatcher.load()
    assert (load.energy_source, load.joules_per_token, load.power_w) == ("", None, None)


def make_record(engine_id: int, *, start_ns: int, end_ns: int) -> StepRecord:
    member = StepMember(request_id=engine_id, new_tokens=1, context_tokens=0, is_prefill=True)
    return StepRecord(step=1, start_ns=start_ns, end_ns=end_ns, rows=StepRows.of([member]))


async def test_the_bill_follows_the_answer_under_the_links_number() -> None:
    desk = Desk(has_meter=True)
    assert desk.energy is not None
    link = desk.attach("a")
    desk.energy.add_reading(Reading(t_ns=0, energy_mj=0, source=Source.FAKE))
    desk.dispatcher.on_command(link, Submit(request=make_request(7)))
    desk.now_ns = 100 * MS
    record = make_record(1, start_ns=0, end_ns=100 * MS)
    desk.step(make_delta(1, (11,), finish=FinishReason.STOP), record=record)
    assert not desk.dispatcher.billed.is_set()
    assert len(await deltas(link)) == 1
    desk.now_ns = 110 * MS
    desk.energy.add_reading(Reading(t_ns=100 * MS, energy_mj=4_000, source=Source.FAKE))
    desk.dispatcher.settle_energy()
    parcel = await take(link)
    (statement,) = parcel.energy
    joules = statement.joules
    assert joules is not None
    assert joules is not None
    assert (statement.request_id, statement.attempt, joules.total_mj, joules.final) == (7, 1, 4_000, True)
    assert desk.dispatcher.billed.is_set()
    assert desk.dispatcher.load().energy_source == "fake"


async def test_a_meter_that_is_lost_leaves_energy_unknown() -> None:
    desk = Desk(has_meter=True)
    link = desk.attach("a")
    desk.dispatcher.on_command(link, Submit(request=make_request(7)))
    desk.step(make_delta(1, (11,), finish=FinishReason.STOP), record=make_record(1, start_ns=0, end_ns=1))
    assert not desk.dispatcher.billed.is_set()
    desk.dispatcher.lose_meter()
    assert desk.dispatcher.billed.is_set()
    parcel = await take(link)
    assert parcel.energy == (EnergyStatement(request_id=7, attempt=1, joules=None),)


async def test_a_request_that_ran_before_the_meter_spoke_is_said_to_be_unknown() -> None:
    desk = Desk(has_meter=True)
    assert desk.energy is not None
    link = desk.attach("a")
    desk.dispatcher.on_command(link, Submit(request=make_request(7)))
    desk.step(make_delta(1, (11,), finish=FinishReason.STOP), record=make_record(1, start_ns=0, end_ns=1))
    desk.now_ns = 200 * MS
    for at_ms in (50, 100):
        desk.energy.add_reading(Reading(t_ns=at_ms * MS, energy_mj=at_ms, source=Source.FAKE))
    desk.dispatcher.settle_energy()
    parcel = await take(link)
    assert parcel.energy == (EnergyStatement(request_id=7, attempt=1, joules=None),)
    assert desk.dispatcher.billed.is_set()


async def test_a_refused_request_has_cost_nothing_and_its_router_hears_so() -> None:
    desk = Desk(has_meter=True)
    assert desk.energy is not None
    link = desk.attach("a")
    desk.dispatcher.begin_drain("update")
    desk.dispatcher.on_command(link, Submit(request=make_request(7)))
    parcel = await take(link)
    assert parcel is not None
    assert parcel.energy == (EnergyStatement(request_id=7, attempt=1, joules=None),)
    desk.energy.add_reading(Reading(t_ns=0, energy_mj=0, source=Source.FAKE))
    desk.dispatcher.on_command(link, Submit(request=make_request(8)))
    parcel = await take(link)
    assert parcel is not None
    (statement,) = parcel.energy
    joules = statement.joules
    assert joules is not None
    assert (statement.request_id, joules.total_mj, joules.host_mj, joules.final) == (8, 0, 0, True)


async def test_a_cancelled_request_still_gets_its_bill() -> None:
    desk = Desk(has_meter=True)
    assert desk.energy is not None
    link = desk.attach("a")
    desk.energy.add_reading(Reading(t_ns=0, energy_mj=0, source=Source.FAKE))
    desk.dispatcher.on_command(link, Submit(request=make_request(7)))
    desk.dispatcher.on_command(link, Cancel(request_id=7))
    desk.now_ns = 50 * MS
    record = make_record(1, start_ns=0, end_ns=50 * MS)
    desk.step(make_delta(1, (), finish=FinishReason.CANCELLED), record=record)
    desk.energy.add_reading(Reading(t_ns=50 * MS, energy_mj=100, source=Source.FAKE))
    desk.dispatcher.settle_energy()
    parcel = await take(link)
    assert parcel.deltas == ()
    assert [entry.joules.total_mj for entry in parcel.energy if entry.joules and entry.joules.final] == [100]


async def test_who_leaves_bills_what_another_replica_will_finish() -> None:
    desk = Desk(has_meter=True)
    assert desk.energy is not None
    link = desk.attach("a")
    desk.energy.add_reading(Reading(t_ns=0, energy_mj=0, source=Source.FAKE))
    for request_id in (7, 8):
        desk.dispatcher.on_command(link, Submit(request=make_request(request_id)))
    desk.dispatcher.on_command(link, Cancel(request_id=8))
    desk.now_ns = 50 * MS
    desk.step(make_delta(1, (11,)), record=make_record(1, start_ns=0, end_ns=50 * MS))
    desk.energy.add_reading(Reading(t_ns=50 * MS, energy_mj=100, source=Source.FAKE))
    desk.dispatcher.fence()
    await take(link)
    desk.dispatcher.bill_unfinished()
    parcel = await take(link)
    (statement,) = parcel.energy
    joules = statement.joules
    assert joules is not None
    assert (statement.request_id, statement.attempt) == (7, 1)
    assert (joules.total_mj, joules.final) == (100, False)
