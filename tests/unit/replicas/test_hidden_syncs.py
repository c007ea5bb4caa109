"""Between the upload of a step and the fetch of its tokens, nothing looks at a value on the device.

The device is PyTorch's `meta` device, whose tensors have shapes and no values: whatever reads one (`item`,
`tolist`, `nonzero`, a mask as an index, `bool`) raises. Any other way for host data to reach an operation (a
tensor made of a list, an index on the CPU), which on CUDA would wait for the stream, raises too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from replicas.config import EngineLimits, ParallelConfig
from replicas.layers.experts import run_all, run_grouped
from replicas.layers.triton.sequences import DeviceSequences
from replicas.layers.triton.varlen import chunk_part, decode_part, find_varlen, varlen_attention
from replicas.models.checkpoint import Checkpoint
from replicas.models.config_file import read_spec
from replicas.models.weights import ExpertWeights, LayerWeights, MlpWeights, ModelWeights, load_weights
from replicas.parallel.collectives import SoloCollectives
from replicas.parallel.degrees import shard_of
from replicas.plan import LAST_SAMPLED, NewRow, PlannedRow, StepPlan
from replicas.rank.device_steps import DeviceSupport
from replicas.rank.graphs import EagerBackend, GraphBackend
from replicas.rank.runner import ModelRunner
from replicas.rank.transfer import Bytes, Fetch
from replicas.request import SamplingParams
from tests.checkpoints import make_granite, make_granite_moe, make_llama
from tests.rank_threads import make_rank_config

LIMITS = EngineLimits(max_sequences=8, step_tokens=32, block_tokens=4, num_blocks=32, context_tokens=64)
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.3),
    SamplingParams(num_logprobs=2),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=20, seed=7),
    SamplingParams(logit_bias=((7, 3.0), (400, -2.0))),
    SamplingParams(temperature=0.9, min_p=0.05, seed=9, num_logprobs=0),
)
META = torch.device("meta")
RunExperts = Callable[..., tuple[torch.Tensor, torch.Tensor | int]]


@dataclass(slots=True)
class CountingTransfer:
    """The only way to the device and back; counts both."""

    num_sent: int = 0
    num_fetched: int = 0

    def send(self, packed: Bytes) -> torch.Tensor:
        self.num_sent += 1
        return torch.empty(len(packed), dtype=torch.uint8, device=META)

    def fetch(self, tensors: tuple[torch.Tensor, ...]) -> Fetch:
        assert all(tensor.device == META for tensor in tensors)
        self.num_fetched += 1
        return NeverRead()


class NeverRead:
    def wait(self) -> tuple[torch.Tensor, ...]:
        raise AssertionError("a launch does not wait")


class OnDeviceOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations that see a tensor of the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [*args, *(kwargs or {}).values()]
        nested = [item for value in given if isinstance(value, list | tuple) for item in value]
        for value in (*given, *nested):
            assert not isinstance(value, torch.Tensor) or value.device == META, f"{func} reads the host"
        return func(*args, **(kwargs or {}))


def on_device_only() -> OnDeviceOnly:
    return OnDeviceOnly()  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class TwoRanks:
    """Rank 0 of two, whose other rank is not there: shapes are all that matters."""

    rank: int = 0
    size: int = 2
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(0).expand(2, *x.shape)

    def all_gather_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return x.new_empty((sum(counts), *x.shape[1:]))

    def reduce_scatter_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        return x[: counts[self.rank]]

    def barrier(self, timeout_s: float | None = None) -> None:
        pass

    def set_timeout(self, timeout_s: float) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def to_meta(weights: ModelWeights) -> ModelWeights:
    def layer_of(layer: LayerWeights) -> LayerWeights:
        ffn: MlpWeights | ExpertWeights = layer.ffn
        if isinstance(ffn, MlpWeights):
            ffn = replace(ffn, gate_up_2FH=ffn.gate_up_2FH.to(META), down_HF=ffn.down_HF.to(META))
        else:
            ffn = replace(
                ffn,
                router_XH=ffn.router_XH.to(META),
                gate_up_E2FH=ffn.gate_up_E2FH.to(META),
                down_EHF=ffn.down_EHF.to(META),
            )
        return replace(
            layer,
            attention_norm_H=layer.attention_norm_H.to(META),
            qkv_QH=layer.qkv_QH.to(META),
            out_HA=layer.out_HA.to(META),
            ffn_norm_H=layer.ffn_norm_H.to(META),
            ffn=ffn,
        )

    return ModelWeights(
        embedding_VH=weights.embedding_VH.to(META),
        layers=tuple(layer_of(layer) for layer in weights.layers),
        final_norm_H=weights.final_norm_H.to(META),
        head_VH=weights.head_VH.to(META),
    )


def make_meta_runner(
    source: Path, transfer: CountingTransfer, graphs: GraphBackend | None, *, num_ranks: int
) -> ModelRunner:
    parallel = ParallelConfig(tensor=num_ranks)
    config = make_rank_config(source.parent, rank=0, parallel=parallel, source=str(source), limits=LIMITS)
    spec = read_spec(source)
    shard = shard_of(spec, parallel, 0)
    with Checkpoint(source) as checkpoint:
        weights = load_weights(
            checkpoint,
            spec,
            shard,
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            progress=lambda stage, done, total: None,
        )
    return ModelRunner(
        config,
        SoloCollectives() if num_ranks == 1 else TwoRanks(),
        spec=spec,
        shard=shard,
        weights=to_meta(weights),
        weights_digest="",
        support=DeviceSupport(transfer=transfer, graphs=graphs),
    )


def plans() -> list[StepPlan]:
    """Prefills of every kind of row, a chunk that does not sample; then decodes beside a chunk, and alone."""
    count = len(SAMPLINGS)
    new_rows = tuple(
        NewRow(row=row, sampling=sampling, history=(3, 4, 5) if sampling.has_penalties else ())
        for row, sampling in enumerate(SAMPLINGS)
    )
    prompts = tuple(
        PlannedRow(row=row, start_pos=0, token_ids=(3, 4, 5), new_blocks=(row + 1,), samples=True)
        for row in range(count)
    )
    long = NewRow(row=count, sampling=SamplingParams())
    chunk = PlannedRow(row=count, start_pos=0, token_ids=(9,) * 6, new_blocks=(20, 21), samples=False)
    rest = PlannedRow(row=count, start_pos=6, token_ids=(9,) * 4, new_blocks=(22,), samples=True)

    def decodes(rows: range, pos: int) -> tuple[PlannedRow, ...]:
        return tuple(
            PlannedRow(
                row=row,
                start_pos=pos,
                token_ids=(LAST_SAMPLED,),
                new_blocks=(row + 10,) if pos % 4 == 0 else (),
                samples=True,
            )
            for row in rows
        )

    steps = [
        (new_rows, prompts),
        ((long,), (chunk,)),
        ((), (*decodes(range(count), 3), rest)),
        ((), decodes(range(count), 4)),
        ((), decodes(range(2), 5)),
    ]
    return [
        StepPlan(step=step, freed_rows=(), new_rows=new, rows=rows)
        for step, (new, rows) in enumerate(steps, 1)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": make_llama(root / "llama"),
        "granite": make_granite(root / "granite"),
        "granite-moe": make_granite_moe(root / "granite-moe", vocab_size=515),
    }


@pytest.mark.parametrize("graphs", [None, EagerBackend()], ids=["eager", "graphs"])
@pytest.mark.parametrize(("name", "num_ranks"), [("llama", 2), ("granite", 1), ("granite-moe", 1)])
def test_a_launch_sends_once_and_waits_for_nothing(
    sources: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    graphs: GraphBackend | None,
    num_ranks: int,
) -> None:
    transfer = CountingTransfer()
    runner = make_meta_runner(sources[name], transfer, graphs, num_ranks=num_ranks)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor is made of host data on the way")

    for maker in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, maker, refuse)
    with on_device_only():
        for index, plan in enumerate(plans(), 1):
            runner.launch(plan)
            assert (transfer.num_sent, transfer.num_fetched) == (index, index)


def test_the_watch_sees_what_it_is_for() -> None:
    x = torch.zeros(3, device=META)
    with on_device_only(), pytest.raises(AssertionError, match="reads the host"):
        x[torch.zeros(1, dtype=torch.int64)]
    for read in (x.tolist, x.sum().item, x.nonzero, lambda: x[x > 0], lambda: bool(x.any())):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


@pytest.mark.parametrize("num_decodes", [0, 3, 5])
def test_varlen_attention_needs_no_value_from_the_device(num_decodes: int) -> None:
    """Torch's own function takes what we give it; bounds are host integers: a graph can record a decode."""
    attend = find_varlen()
    if attend is None:
        pytest.skip("this torch has no varlen attention over pages")
    num_chunks = 5 - num_decodes
    q_TND = torch.zeros((9, 4, 8), dtype=torch.bfloat16, device=META)
    sequences = DeviceSequences(
        tables_BP=torch.zeros((5, 2), dtype=torch.int32, device=META),
        lengths_B=torch.zeros(5, dtype=torch.int32, device=META),
        starts_C1=torch.zeros(num_chunks + 1, dtype=torch.int32, device=META),
        num_decodes=num_decodes,
        max_chunk_tokens=4,
        max_context_tokens=512,
    )
    cache = torch.zeros((3, 256, 2, 8), dtype=torch.bfloat16, device=META)
    with on_device_only():
        for part in (decode_part(sequences), chunk_part(sequences)):
            assert len(part.starts_B1) == len(part.cached_B1) == len(part.lengths_B) + 1
            out_TND = varlen_attention(attend, q_TND, cache, cache, part, scale=1.0)
            assert out_TND.shape == q_TND.shape


@pytest.mark.parametrize(("run", "dtype"), [(run_grouped, torch.bfloat16), (run_all, torch.float32)])
def test_experts_need_no_value_from_the_device(run: RunExperts, dtype: torch.dtype) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=META, dtype=dtype)

    weights = ExpertWeights(router_XH=empty(8, 16), gate_up_E2FH=empty(4, 64, 16), down_EHF=empty(4, 16, 32))
    choices_TC = torch.zeros((5, 2), dtype=torch.int64, device=META)
    with on_device_only():
        out_TH, hit = run(empty(5, 16), weights, choices_TC, empty(5, 2), 4)
    assert (out_TH.shape, out_TH.dtype) == ((5, 16), dtype)
    assert isinstance(hit, torch.Tensor) and hit.device == META
