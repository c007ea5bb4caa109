"""A replica without an engine: speaks the link protocol over real gRPC and makes up tokens.

Token i of an answer is a hash of prompt and position, so a lost, doubled or swapped token shows; an answer
that another replica began goes on the same way. Tests, chaos runs and benchmarks decide when it steps, what
it says and how it leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from hashlib import blake2b
from time import monotonic
from typing import Self

import grpc

from protos import wattline_link_pb2 as link
from protos import wattline_link_pb2_grpc as link_grpc
from replicas.config import LinkCredentials
from replicas.link.dial import dial
from replicas.link.protocol import PROTOCOL_VERSION
from replicas.step_report import TokenColumns
from replicas.wire.steps import columns_to_wire

NUM_SPECIAL = 3
EOS = 2
HEARTBEAT_S = 0.25
MJ_PER_TOKEN = 250
HANG_UP_S = 5.0
"""For the router to end a stream after Goodbye."""

Tokens = Callable[[link.Submit, int], int]
"""Token at a position of an answer."""


class EnergyMode(Enum):
    """When a finished request's joules come."""

    AT_ONCE = auto()
    """Final, right behind the last token."""
    LATE = auto()
    """Provisional behind the last token, final when `close_energy` is called."""
    NEVER = auto()
    UNKNOWN = auto()
    """At once it is said that they will never be known."""


class Fate(Enum):
    """How a replica ends, or seems to."""

    KILLED = auto()
    """The link breaks without a word; what was on its way may be lost."""
    FAILED = auto()
    """Goodbye, because its group is lost."""
    DRAINED = auto()
    """Draining, then Goodbye with streams still under way."""
    LOST_WHILE_DRAINING = auto()
    """The same, but because its group is lost meanwhile."""
    FROZEN = auto()
    """It neither speaks nor listens until `thaw`."""


@dataclass(slots=True)
class Sequence:
    """One request under way."""

    submit: link.Submit
    ends_at_s: float | None
    num_tokens: int = 0
    """Of this attempt."""
    first_step: int = 0

    @property
    def next_offset(self) -> int:
        return self.submit.first_offset + self.num_tokens


@dataclass(slots=True, kw_only=True)
class FakeReplica:
    """Dial with `async with FakeReplica(...)`, or `attach` and `leave`. `step_s` 0: as fast as it can."""

    address: str
    model: str
    credentials: LinkCredentials | None = None
    replica_id: str = "replica-0"
    epoch: int = 1
    vocab_size: int = 1000
    context_tokens: int = 4096
    max_sequences: int = 64
    step_s: float = 0.0
    tokens_per_step: int = 1
    energy: EnergyMode = EnergyMode.AT_ONCE
    tokens: Tokens | None = None
    weights_digest: str = "w"
    tokenizer_digest: str = ""
    scores_prompts: bool = True
    cached_tokens: int = 0
    """Of every prompt, as it says."""
    tells_trail: bool = True
    """Older engines do not."""
    fate: Fate | None = None
    """What happens when it has made `fate_after` tokens, over all answers."""
    fate_after: int = 0
    num_tokens: int = 0
    commands: list[link.ToReplica] = field(default_factory=list)
    running: asyncio.Event = field(default_factory=asyncio.Event)
    """Steps happen only while it is set."""
    host_mj: int | None = None
    """Of each bill, beside it; None: no meter of the host."""
    _awake: asyncio.Event = field(default_factory=asyncio.Event)
    _ending: asyncio.Task[None] | None = None
    _sequences: dict[int, Sequence] = field(default_factory=dict)
    _unbilled: list[link.RequestEnergy] = field(default_factory=list)
    _arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _work: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _channel: grpc.aio.Channel | None = None
    _call: grpc.aio.StreamStreamCall[link.FromReplica, link.ToReplica] | None = None
    _step: int = 0
    _has_divided: bool = False

    async def __aenter__(self) -> Self:
        await self.attach()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    async def attach(self) -> None:
        """Dial, say Hello, and wait for the Welcome. Raises AioRpcError if the router refuses."""
        self._channel = dial(self.address, self.credentials, ())
        self._call = link_grpc.ReplicaLinkStub(self._channel).Attach()
        await self.send(link.FromReplica(hello=self.hello()))
        welcome = await self._call.read()
        if welcome is grpc.aio.EOF:
            raise grpc.aio.AioRpcError(
                await self._call.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), await self._call.details()
            )
        self.running.set()
        self._awake.set()
        self._tasks = [
            asyncio.create_task(work) for work in (self._read_commands(), self._run_steps(), self._beat())
        ]

    async def leave(self, *, says_goodbye: bool = True, is_lost: bool = False) -> None:
        """Go: politely, or as a process that was killed. Safe to call twice. `is_lost`: so it says."""
        reading, *speaking = self._tasks or (None,)
        async with self._writing:  # A write that is cancelled under way would break the stream.
            for task in speaking:
                task.cancel()
        self._awake.set()
        if self._call is not None and not self._call.done() and says_goodbye:
            with suppress(grpc.RpcError, asyncio.InvalidStateError, TimeoutError):
                await self.send(link.FromReplica(goodbye=link.Goodbye(reason="test", is_lost=is_lost)))
                await self._call.done_writing()
                async with asyncio.timeout(HANG_UP_S):
                    await self._call.code()
        if reading is not None:
            reading.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._call is not None:
            self._call.cancel()
        if self._channel is not None:
            await self._channel.close()

    def freeze(self) -> None:
        """Neither speak nor listen, like a stopped process."""
        self._awake.clear()

    async def thaw(self) -> None:
        """Go on as if nothing had been: the tokens of one step come out before any command is read."""
        await self.step()
        self._awake.set()

    async def end(self, fate: Fate) -> None:
        match fate:
            case Fate.KILLED:
                await self.leave(says_goodbye=False)
            case Fate.FAILED:
                await self.leave()
            case Fate.DRAINED:
                await self.say_draining()
                await self.leave()
            case Fate.LOST_WHILE_DRAINING:
                await self.say_draining()
                await self.leave(is_lost=True)
            case Fate.FROZEN:
                self.freeze()

    async def send(self, message: link.FromReplica) -> None:
        """Write one message of this replica's life (or of the `epoch` it carries)."""
        assert self._call is not None
        message.epoch = message.epoch or self.epoch
        async with self._writing:
            await self._call.write(message)

    async def say_draining(self) -> None:
        await self.send(link.FromReplica(draining=link.Draining(reason="test")))

    async def report_ledger(self, *totals: link.LedgerTotals) -> None:
        """What its energy ledger has divided so far; before the first time, that it had divided nothing."""
        heartbeat = link.Heartbeat(load=self.load())
        if not self._has_divided:
            self._has_divided = True
            nothing = [link.LedgerTotals(source=each.source) for each in totals]
            await self.send(link.FromReplica(heartbeat=heartbeat, ledger=nothing))
        await self.send(link.FromReplica(heartbeat=heartbeat, ledger=totals))

    async def refuse(self, request_id: int, error: link.SequenceError) -> None:
        """End one request with an error."""
        self._sequences.pop(request_id, None)
        delta = link.SequenceDelta(
            request_id=request_id,
            attempt=0,
            finish=link.ENGINE_FINISH_ERROR,
            error=error,
        )
        await self.send(link.FromReplica(step=link.StepOutput(step=self._step, deltas=[delta])))

    async def close_energy(self) -> None:
        """Send the final joules of everything that ended in `LATE` mode."""
        report, self._unbilled = self._unbilled, []
        for entry in report:
            entry.final = True
        await self.send(link.FromReplica(energy=link.EnergyReport(requests=report)))

    async def wait_command(self, kind: str, *, count: int = 1) -> link.ToReplica:
        """The `count`-th command of a kind (submit, cancel, stop, drain), once it came."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.received(kind)) >= count)
            return self.received(kind)[count - 1]

    def received(self, kind: str) -> list[link.ToReplica]:
        return [command for command in self.commands if command.WhichOneof("command") == kind]

    def hello(self) -> link.Hello:
        return link.Hello(
            protocol=PROTOCOL_VERSION,
            replica_id=self.replica_id,
            model=self.model,
            architecture="NullForCausalLM",
            tensor_parallel=1,
            expert_parallel=1,
            layout="shared",
            lanes=1,
            context_tokens=self.context_tokens,
            max_sequences=self.max_sequences,
            vocab_size=self.vocab_size,
            weights_digest=self.weights_digest,
            tokenizer_digest=self.tokenizer_digest,
            engine_version="test",
            dtype="float32",
            device="cpu",
            energy_source="fake",
            block_tokens=16,
            eos_token_ids=[EOS],
            load=self.load(),
        )

    def load(self) -> link.LoadSnapshot:
        return link.LoadSnapshot(
            step=self._step,
            running=[len(self._sequences)],
            waiting=[0],
            waiting_prefill_tokens=[0],
            free_blocks=[1000 - len(self._sequences)],
            total_blocks=[1000],
            step_ms=self.step_s * 1e3,
            prefill_tokens_per_s=50_000.0,
        )

    async def step(self) -> None:
        """One engine step: tokens of every sequence in one message, then the joules of those that ended."""
        self._step += 1
        deltas, ended = [], []
        for request_id, sequence in list(self._sequences.items()):
            delta = self._advance(sequence)
            deltas.append(delta)
            if delta.finish:
                del self._sequences[request_id]
                ended.append(sequence)
        output = make_output(self._step, deltas, self.load())
        await self._send_with_bill(output, ended)

    def _advance(self, sequence: Sequence) -> link.SequenceDelta:
        submit = sequence.submit
        sequence.first_step = sequence.first_step or self._step
        first_offset = sequence.next_offset
        token_ids: list[int] = []
        finish = link.ENGINE_FINISH_NONE
        if sequence.ends_at_s is not None and monotonic() > sequence.ends_at_s:
            finish = link.ENGINE_FINISH_DEADLINE
        while not finish and len(token_ids) < self.tokens_per_step:
            token_ids.append((self.tokens or self._hash_token)(submit, first_offset + len(token_ids)))
            if token_ids[-1] in submit.stop_token_ids:
                finish = link.ENGINE_FINISH_STOP
            elif sequence.num_tokens + len(token_ids) >= submit.max_tokens:
                finish = link.ENGINE_FINISH_LENGTH
        sequence.num_tokens += len(token_ids)
        self.num_tokens += len(token_ids)
        return link.SequenceDelta(
            request_id=submit.request_id,
            attempt=submit.attempt,
            first_offset=first_offset,
            token_ids=token_ids,
            finish=finish,
            timing=self._timing(sequence) if finish else None,
            logprobs=_logprobs(submit, first_offset, len(token_ids)),
            prompt_logprobs=_prompt_logprobs(submit) if self._is_first(sequence, token_ids) else (),
        )

    def _timing(self, sequence: Sequence) -> link.SequenceTiming:
        return link.SequenceTiming(
            queue_us=100,
            prefill_us=2000,
            decode_us=1000 * sequence.num_tokens,
            cached_tokens=self.cached_tokens,
            wasted_tokens=0,
            trail=self._trail(sequence) if self.tells_trail else None,
        )

    def _trail(self, sequence: Sequence) -> link.StepTrail | None:
        """It is in every step from its first on; the last of its gaps counts as the longest."""
        first, last = sequence.first_step, self._step
        if not first:
            return None
        gap = link.TokenGap(duration_us=1000, end_us=1000 * sequence.num_tokens, step=last)
        return link.StepTrail(
            first_step=first,
            first_token_step=first,
            last_step=last,
            prefill_steps=1,
            decode_steps=last - first,
            longest_gap=gap if last > first else None,
        )

    def _is_first(self, sequence: Sequence, token_ids: list[int]) -> bool:
        return self.scores_prompts and sequence.num_tokens == len(token_ids)

    def _hash_token(self, submit: link.Submit, pos: int) -> int:
        """The tokens that were delivered before are no part of the prompt."""
        prompt_ids = submit.prompt_ids[: len(submit.prompt_ids) - submit.first_offset]
        return hash_token(prompt_ids, pos, vocab_size=self.vocab_size)

    async def _send_with_bill(self, output: link.StepOutput, ended: list[Sequence]) -> None:
        """The bill is written before anybody can know of an end, and sent behind it."""
        bill = self._bill(ended) if ended and self.energy is not EnergyMode.NEVER else None
        await self.send(link.FromReplica(step=output))
        if bill is not None:
            await self.send(link.FromReplica(energy=bill))

    def _bill(self, ended: list[Sequence]) -> link.EnergyReport:
        if self.energy is EnergyMode.UNKNOWN:
            entries = [_unknown_energy(sequence) for sequence in ended]
        else:
            is_final = self.energy is EnergyMode.AT_ONCE
            entries = [_energy(sequence, is_final=is_final, host_mj=self.host_mj) for sequence in ended]
        if self.energy is EnergyMode.LATE:
            self._unbilled += entries
        return link.EnergyReport(requests=entries)

    async def _read_commands(self) -> None:
        assert self._call is not None
        async for command in _messages(self._call):
            await self._awake.wait()
            match command.WhichOneof("command"):
                case "submit":
                    deadline_ms = command.submit.deadline_ms
                    ends_at_s = monotonic() + deadline_ms / 1e3 if deadline_ms else None
                    self._sequences[command.submit.request_id] = Sequence(command.submit, ends_at_s)
                    self._work.set()
                case "cancel":
                    self._sequences.pop(command.cancel.request_id, None)
                case "stop":
                    await self._finish_now(command.stop.request_id)
                case "drain":
                    await self.say_draining()
            async with self._arrived:
                self.commands.append(command)
                self._arrived.notify_all()

    async def _finish_now(self, request_id: int) -> None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        delta = link.SequenceDelta(
            request_id=request_id,
            attempt=sequence.submit.attempt,
            first_offset=sequence.next_offset,
            finish=link.ENGINE_FINISH_STOP,
            timing=self._timing(sequence),
        )
        await self._send_with_bill(
            link.StepOutput(step=self._step, deltas=[delta], load=self.load()), [sequence]
        )

    async def _run_steps(self) -> None:
        while True:
            await self.running.wait()
            await self._awake.wait()
            if not self._sequences:
                self._work.clear()
                await self._work.wait()
                continue
            await self.step()
            if self.fate is not None and self.num_tokens >= self.fate_after:
                self.freeze()
                self._ending, self.fate = asyncio.create_task(self.end(self.fate)), None
            await asyncio.sleep(self.step_s)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._awake.wait()
            await self.send(link.FromReplica(heartbeat=link.Heartbeat(load=self.load())))


def hash_token(prompt_ids: Iterable[int], pos: int, *, vocab_size: int) -> int:
    """What a fake replica says at a position of its answer."""
    prompt = b"".join(token_id.to_bytes(4, "little") for token_id in prompt_ids)
    digest = blake2b(prompt + pos.to_bytes(4, "little"), digest_size=4).digest()
    return NUM_SPECIAL + int.from_bytes(digest, "little") % (vocab_size - NUM_SPECIAL)


async def _messages(
    call: grpc.aio.StreamStreamCall[link.FromReplica, link.ToReplica],
) -> AsyncIterator[link.ToReplica]:
    """Commands until the router hangs up; `read`, because the Welcome was read so too."""
    while isinstance(message := await call.read(), link.ToReplica):
        yield message


def _logprobs(submit: link.Submit, first_offset: int, count: int) -> list[link.EngineLogprobs]:
    """Minus its offset for a token, and one less for each alternative."""
    if not submit.sampling.HasField("logprobs"):
        return []
    top_ids = range(submit.sampling.logprobs)
    return [
        link.EngineLogprobs(logprob=-pos, top_ids=top_ids, top_logprobs=[-pos - each for each in top_ids])
        for pos in range(first_offset, first_offset + count)
    ]


def _prompt_logprobs(submit: link.Submit) -> list[link.EngineLogprobs]:
    """The same for the tokens of a prompt but the first, by their positions, where asked for."""
    return _logprobs(submit, 1, len(submit.prompt_ids) - 1) if submit.prompt_logprobs else []


def _unknown_energy(sequence: Sequence) -> link.RequestEnergy:
    submit = sequence.submit
    return link.RequestEnergy(request_id=submit.request_id, attempt=submit.attempt, final=True)


def _energy(sequence: Sequence, *, is_final: bool, host_mj: int | None) -> link.RequestEnergy:
    return link.RequestEnergy(
        request_id=sequence.submit.request_id,
        attempt=sequence.submit.attempt,
        prefill_mj=1000,
        decode_mj=MJ_PER_TOKEN * sequence.num_tokens,
        static_mj=300,
        source="fake",
        method="step-ledger/1",
        window_ms=30.0,
        confidence_factor=1.0,
        final=is_final,
        host_mj=host_mj,
    )


def make_output(
    step: int, deltas: list[link.SequenceDelta], load: link.LoadSnapshot | None = None
) -> link.StepOutput:
    """As a replica says it: in columns where there is nothing to say but tokens."""
    rich = [one for one in deltas if one.finish or one.logprobs or one.prompt_logprobs]
    plain = [one for one in deltas if one not in rich]
    columns = TokenColumns.of(
        [(one.request_id, one.attempt, one.first_offset, tuple(one.token_ids)) for one in plain]
    )
    return link.StepOutput(step=step, tokens=columns_to_wire(columns), deltas=rich, load=load)
