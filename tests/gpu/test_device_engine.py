"""An engine on the device kernels gives the tokens of torch: uploads, padded decode steps, prefix reuse.

On a GPU through CUDA graphs, elsewhere in Triton's interpreter, where a graph is a run on the same buffers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replicas.attention_choice import VARLEN_ALONE
from replicas.config import EngineLimits
from replicas.rank.device_kernels import TRITON_KERNELS, VARLEN_KERNELS, load_device_kernels
from replicas.rank.device_steps import DeviceSupport
from replicas.rank.graphs import CudaGraphBackend, EagerBackend
from replicas.rank.transfer import CudaTransfer, HostTransfer
from replicas.request import GenerationRequest, SamplingParams
from tests.checkpoints import make_granite_moe, make_llama
from tests.engine_answers import answer, make_runner
from tests.varlen_reference import Recorded, varlen_reference

LIMITS = EngineLimits(
    max_sequences=3, step_tokens=24, block_tokens=16, num_blocks=24, context_tokens=64, lookahead=1
)
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(repetition_penalty=1.4, num_logprobs=1),
)


def make_requests() -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(0)
    beginning = tuple(torch.randint(3, 500, (18,), generator=generator).tolist())
    return [
        GenerationRequest(
            request_id=index, prompt_ids=(*beginning[: 18 - 6 * index], 7), max_tokens=3, sampling=sampling
        )
        for index, sampling in enumerate(SAMPLINGS)
    ]


def make_support(device: torch.device) -> DeviceSupport:
    kernels = load_device_kernels()
    assert kernels is not None
    if device.type == "cuda":
        return DeviceSupport(transfer=CudaTransfer(device), graphs=CudaGraphBackend(), kernels=kernels)
    return DeviceSupport(transfer=HostTransfer(), graphs=EagerBackend(), kernels=kernels)


@pytest.mark.parametrize("name", ["llama", "granite-moe"])
def test_kernels_and_graphs_give_the_tokens_of_torch(tmp_path: Path, device: torch.device, name: str) -> None:
    torch.set_num_threads(1)
    folder = tmp_path / name
    source = (
        make_llama(folder, head_dim=16, seed=10)
        if name == "llama"
        else make_granite_moe(folder, vocab_size=515, seed=13)
    )
    host = make_runner(source, replace(LIMITS, lookahead=0))
    wanted = answer(host, replace(LIMITS, lookahead=0), make_requests())
    runner = make_runner(source, LIMITS, make_support(device), device=device)
    assert runner.kernels == TRITON_KERNELS
    if device.type == "cuda":
        runner.warmup()
    ours = answer(runner, LIMITS, make_requests())
    assert ours.tokens == wanted.tokens
    assert ours.finishes == wanted.finishes
    assert (sum(ours.experts_hit) > 0) == (name == "granite-moe")
    runner.close()


def test_rows_of_padding_are_no_load_of_any_expert(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    limits = replace(LIMITS, lookahead=0)
    source = make_granite_moe(tmp_path, vocab_size=515, seed=13)
    requests = [GenerationRequest(request_id=0, prompt_ids=(5, 6, 7), max_tokens=3)]
    host = make_runner(source, limits)
    wanted = answer(host, limits, requests)
    monkeypatch.setattr("replicas.rank.runner.bucket_sizes", lambda most_rows: (most_rows,))
    runner = make_runner(source, limits, make_support(device), device=device)
    if device.type == "cuda":
        runner.warmup()
    ours = answer(runner, limits, requests)
    assert ours.tokens == wanted.tokens
    assert ours.experts_hit == wanted.experts_hit
    assert runner.experts.loads() == host.experts.loads()
    runner.close()


def test_a_warm_engine_serves_by_the_attention_it_settled_on(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch's own runs, `make gpu-check` asks the same of it."""
    if device.type == "cuda":
        pytest.skip("a graph records no attention of a host")
    torch.set_num_threads(1)
    limits = replace(LIMITS, max_sequences=1, step_tokens=4)
    requests = [GenerationRequest(request_id=0, prompt_ids=(5, 6, 7, 8, 9, 10), max_tokens=3)]
    source = make_llama(tmp_path, head_dim=16, seed=10)
    host = make_runner(source, replace(limits, lookahead=0))
    wanted = answer(host, replace(limits, lookahead=0), requests)
    recorded = Recorded(varlen_reference)
    monkeypatch.setattr("replicas.layers.triton.layers.find_varlen", lambda: recorded)
    runner = make_runner(source, limits, make_support(device), device=device)
    assert runner.kernels == TRITON_KERNELS
    monkeypatch.setattr("replicas.rank.runner.settle_attention", lambda *_: VARLEN_ALONE)
    runner.warmup()
    assert runner.kernels == VARLEN_KERNELS
    recorded.calls.clear()
    assert answer(runner, limits, requests).tokens == wanted.tokens
    assert {args[5] for args, _ in recorded.calls} == {4, 2, 1}
    runner.close()
