"""The life of one rank process: attach to its group, build its runner, then follow plans or make them.

Rank 0 dials the supervisor, runs the engine and publishes every plan; the others run what is published and
answer. A group is one failure domain: whatever goes wrong in a rank ends its process, the last words of
rank 0 are an `EngineFailure`, and the supervisor kills the rest. Knows no model: a factory gives the runner.
"""

from __future__ import annotations

import logging
import re
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from replicas.config import RankConfig
from replicas.engine.engine import Engine
from replicas.engine.prefill_pace import PrefillPace
from replicas.engine.scheduler import Scheduler
from replicas.errors import RankLost
from replicas.frames import (
    Cancel,
    Command,
    EngineFailure,
    LoadingProgress,
    RankSocket,
    Shutdown,
    Stop,
    Submit,
)
from replicas.long_lived import spare_the_collector
from replicas.parallel.channel import PlanFollower, PlanLeader, StepReply, digest_ids
from replicas.parallel.ring import RingFollower, RingLeader
from replicas.parallel.tcp import TcpFollower, TcpLeader
from replicas.plan import BuiltRunner, EngineShape, PendingStep, Progress, Runner, decode_plan
from replicas.rank.expert_report import ExpertReport
from replicas.rank.group_runner import GroupRunner
from replicas.request import EngineReady, FinishReason, GenerationRequest
from replicas.step_report import report_of

RunnerFactory = Callable[[RankConfig, Progress], BuiltRunner]

GOLDEN_REQUEST_ID = 0
GOLDEN_PROMPT_TOKENS = 4
GOLDEN_TOKENS = 3
MAX_GOLDEN_STEPS = 64
NS_PER_US = 1_000

logger = logging.getLogger(__name__)


def serve_rank(config: RankConfig, build: RunnerFactory) -> None:
    """Return after an orderly shutdown; raise for anything else."""
    if config.rank == 0:
        _lead(config, build)
    else:
        _follow(config, build)


def _lead(config: RankConfig, build: RunnerFactory) -> None:
    with RankSocket.connect(config.socket_path, timeout_s=config.attach_timeout_s) as supervisor:
        try:
            _serve(config, build, supervisor)
        except Exception as error:
            with suppress(RankLost):
                supervisor.send(EngineFailure(reason=f"{type(error).__name__}: {error}"))
            raise


def _serve(config: RankConfig, build: RunnerFactory, supervisor: RankSocket) -> None:
    """Build, warm up, and step until the supervisor says Shutdown. After an error nothing is closed in order:
    a runner whose peers are gone might wait for them."""

    def report(stage: str, done: int, total: int) -> None:
        supervisor.send(LoadingProgress(rank=0, stage=stage, done=done, total=total))

    leader = _open_leader(config)
    built = build(config, report)
    runner: Runner = built.runner if leader is None else GroupRunner(built.runner, leader)
    scheduler = Scheduler(config.limits, built.shape, num_lanes=config.parallel.num_lanes)
    pace = PrefillPace(stretch=config.limits.decode_stretch, is_packing=built.shape.device != "cpu")
    engine = Engine(runner, scheduler, lookahead=config.limits.lookahead, pace=pace)
    _warm_up(engine, built.shape, num_lanes=scheduler.num_lanes)
    if leader is not None:
        leader.timeout_s = config.collective_timeout_s
    spare_the_collector()
    supervisor.send(_ready(config, built.shape, scheduler, engine))
    _step_until_shutdown(engine, supervisor, ExpertReport(built.expert_loads))
    runner.close()


def _step_until_shutdown(engine: Engine, supervisor: RankSocket, report: ExpertReport) -> None:
    """Sleeps in the kernel while there is no work."""
    while True:
        for command in supervisor.receive(wait=not engine.has_work, timeout_s=report.wait_s):
            if isinstance(command, Shutdown):
                return
            _apply(engine, command)
        if engine.has_work:
            supervisor.send(report_of(engine.step()))
            report.note_step()
        if (loads := report.take()) is not None:
            supervisor.send(loads)


def _apply(engine: Engine, command: Command) -> None:
    match command:
        case Submit():
            engine.submit(command.request)
        case Cancel():
            engine.cancel(command.request_id)
        case Stop():
            engine.stop(command.request_id)


def _warm_up(engine: Engine, shape: EngineShape, *, num_lanes: int) -> None:
    """Generate golden tokens in every lane: a prefill and decodes whose logits must be finite."""
    prompt_ids = tuple(pos % shape.vocab_size for pos in range(GOLDEN_PROMPT_TOKENS))
    for lane in range(num_lanes):
        engine.submit(
            GenerationRequest(
                request_id=GOLDEN_REQUEST_ID - lane,
                prompt_ids=prompt_ids,
                max_tokens=GOLDEN_TOKENS,
                lane=lane,
            )
        )
    for _ in range(MAX_GOLDEN_STEPS):
        if not engine.has_work:
            engine.forget_averages()
            return
        for delta in engine.step().deltas:
            if delta.finish is FinishReason.ERROR:
                raise RankLost(f"the group cannot generate its golden token: {delta.error}")
    raise RankLost(f"the group has not generated its golden token after {MAX_GOLDEN_STEPS} steps")


def _ready(config: RankConfig, shape: EngineShape, scheduler: Scheduler, engine: Engine) -> EngineReady:
    return EngineReady(
        architecture=shape.architecture,
        lanes=scheduler.num_lanes,
        context_tokens=scheduler.context_tokens,
        max_sequences=config.limits.max_sequences,
        vocab_size=shape.vocab_size,
        block_tokens=config.limits.block_tokens,
        weights_digest=shape.weights_digest,
        dtype=shape.dtype,
        device=shape.device,
        eos_token_ids=shape.eos_token_ids,
        costs=shape.costs,
        load=engine.load,
        kernels=shape.kernels,
        quantization=shape.quantization,
    )


def _follow(config: RankConfig, build: RunnerFactory) -> None:
    follower = _open_follower(config)
    try:
        built = build(config, _no_report)
        spare_the_collector()
        _run_plans(built.runner, follower, lookahead=config.limits.lookahead)
    except Exception:
        follower.fail()
        raise
    built.runner.close()
    follower.close()


def _run_plans(runner: Runner, follower: PlanFollower, *, lookahead: int) -> None:
    """Launch each plan as it comes; answer it when `lookahead` more are under way.

    A step under way keeps no later plan waiting: rank 0 has it published before this device is done. Rank 0
    asks for answers as late, so the last ones before an idle time come with the next plan.
    """
    flights: deque[tuple[int, PendingStep, int]] = deque()
    newest_step = 0
    try:
        while (payload := follower.receive()) is not None:
            plan = decode_plan(payload)
            newest_step = plan.step
            flights.append((plan.step, runner.launch(plan), time.monotonic_ns()))
            while len(flights) > lookahead:
                step, pending, started_ns = flights.popleft()
                outcome = pending.result()
                follower.reply(
                    StepReply(
                        step=step,
                        compute_us=(time.monotonic_ns() - started_ns) // NS_PER_US,
                        experts_hit=outcome.experts_hit,
                        digest=digest_ids(outcome.sampled_ids),
                    )
                )
    except Exception:
        logger.error("rank_failed newest_step=%d", newest_step)
        raise


def _open_leader(config: RankConfig) -> PlanLeader | None:
    """Return when all ranks are attached; None for a group of one. Patient until the group is warm."""
    if config.num_ranks == 1:
        return None
    if config.rendezvous:
        return TcpLeader(
            socket.socket(fileno=config.rendezvous.plan_fd),
            size=config.num_ranks,
            epoch=config.epoch,
            attach_timeout_s=config.attach_timeout_s,
            timeout_s=config.attach_timeout_s,
        )
    return RingLeader(
        _ring_path(config),
        size=config.num_ranks,
        epoch=config.epoch,
        attach_timeout_s=config.attach_timeout_s,
        timeout_s=config.attach_timeout_s,
    )


def _open_follower(config: RankConfig) -> PlanFollower:
    if config.rendezvous:
        return TcpFollower(
            (config.rendezvous.host, config.rendezvous.plan_port),
            rank=config.rank,
            size=config.num_ranks,
            epoch=config.epoch,
            attach_timeout_s=config.attach_timeout_s,
        )
    return RingFollower(
        _ring_path(config),
        rank=config.rank,
        size=config.num_ranks,
        epoch=config.epoch,
        attach_timeout_s=config.attach_timeout_s,
    )


def _ring_path(config: RankConfig) -> Path:
    group = re.sub(r"[^A-Za-z0-9._-]", "_", config.group)
    return Path(config.shared_dir) / f"{group}.{config.epoch}.plans"


def _no_report(stage: str, done: int, total: int) -> None:
    """Only rank 0 has somebody to tell."""
