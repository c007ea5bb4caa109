"""Section `numerics`: whole small models on device kernels against transformers.

float32 logits against transformers' float32; bfloat16 logits and transformers' own bfloat16 against the same
weights in float64 (transformers keeps norms and softmax in float32 there, which is far below what is asked).
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bench.gpu_check.bare_model import BareModel, chunk_batch, make_bare_model
from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting
from bench.gpu_check.shapes import Shape, small_shapes, spec_of
from replicas.config import ParallelConfig
from replicas.models.checkpoint import Checkpoint
from replicas.models.weights import load_weights
from replicas.parallel.degrees import shard_of
from replicas.rank.batch import Batch

_FLOAT32_ERROR = 1e-4
_BFLOAT16_RATIO = {"granite-moe": 2.0}
"""How many times as far from float64 as transformers ours may be; a mixture may route a token elsewhere."""
_BLOCK_TOKENS = 16


def run(setting: Setting, report: SectionReport) -> None:
    for shape in small_shapes(is_tiny=setting.is_tiny):
        reference = _random_model(shape, setting)
        num_tokens = 9 if setting.is_tiny else 150
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, shape.config.vocab_size, (num_tokens,), generator=generator).to(setting.device)
        with tempfile.TemporaryDirectory(prefix="wattline-gpu-check-") as name:
            reference.save_pretrained(name)
            checked = (shape, reference, Path(name), ids, setting, report)
            report.attempt(f"{shape.name} in float32", partial(_check_float32, *checked))
            if not setting.is_cuda:
                report.skip("bfloat16 needs a GPU: Triton's interpreter multiplies no bfloat16 matrices")
                continue
            report.attempt(f"{shape.name} in bfloat16", partial(_check_bfloat16, *checked))


@torch.inference_mode()
def _check_float32(
    shape: Shape,
    reference: PreTrainedModel,
    folder: Path,
    ids: torch.Tensor,
    setting: Setting,
    report: SectionReport,
) -> None:
    expected = reference(ids[None]).logits[0]
    actual = our_logits(_load(shape, folder, setting, torch.float32), ids)
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    report.check(error <= _FLOAT32_ERROR, model=shape.name, dtype="float32", relative_error=error)


@torch.inference_mode()
def _check_bfloat16(
    shape: Shape,
    reference: PreTrainedModel,
    folder: Path,
    ids: torch.Tensor,
    setting: Setting,
    report: SectionReport,
) -> None:
    half = in_bfloat16(reference)
    exact = copy.deepcopy(half).double()(ids[None]).logits[0]
    theirs = half(ids[None]).logits[0].double()
    ours = our_logits(_load(shape, folder, setting, torch.bfloat16), ids).double()
    scale = exact.square().mean().sqrt()
    our_error = ((ours - exact).square().mean().sqrt() / scale).item()
    their_error = ((theirs - exact).square().mean().sqrt() / scale).item()
    report.check(
        our_error <= _BFLOAT16_RATIO.get(shape.name, 1.5) * their_error,
        model=shape.name,
        dtype="bfloat16",
        rms_error=our_error,
        transformers_rms_error=their_error,
        greedy_agrees=(ours.argmax(1) == exact.argmax(1)).double().mean().item(),
        transformers_greedy_agrees=(theirs.argmax(1) == exact.argmax(1)).double().mean().item(),
    )


def in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """As `from_pretrained` loads it: `to` alone rounds the rotary frequencies too, which stay float32."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        owner, _, own_name = name.rpartition(".")
        setattr(half.get_submodule(owner), own_name, buffer.clone())
    return half


def our_logits(model: BareModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of every token: a prompt, a later chunk that reads it from the cache, then single tokens."""
    parts = [model.decoder.logits(batch)[0] for batch in _teacher_batches(model, ids)]
    return torch.cat(parts)[:, : model.spec.vocab_size]


def _teacher_batches(model: BareModel, ids: torch.Tensor) -> Iterator[Batch]:
    num_tokens = len(ids)
    borders = [0, num_tokens // 2, num_tokens - 3, num_tokens - 2, num_tokens - 1, num_tokens]
    for start, end in itertools.pairwise(borders):
        batch = chunk_batch(model, ids[start:end], first_block=1, start_pos=start)
        yield replace(batch, sampled_S=torch.arange(end - start, device=ids.device))


def _load(shape: Shape, folder: Path, setting: Setting, dtype: torch.dtype) -> BareModel:
    spec = spec_of(shape)
    shard = shard_of(spec, ParallelConfig(), 0)
    with Checkpoint(folder) as checkpoint:
        weights = load_weights(
            checkpoint,
            spec,
            shard,
            device=setting.device,
            dtype=dtype,
            progress=lambda stage, done, total: None,
        )
    return make_bare_model(spec, shard, weights, num_blocks=16, block_tokens=_BLOCK_TOKENS)


@torch.no_grad()
def _random_model(shape: Shape, setting: Setting) -> PreTrainedModel:
    """Drawn larger than a fresh model's, so that attention and routing decide something."""
    model = shape.model(shape.config).to(setting.device).eval()
    if shape.name == "granite-moe":
        # transformers' grouped products know no float64.
        model.set_experts_implementation("eager")
    generator = torch.Generator(device=setting.device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0, 0.2, generator=generator)
        else:
            parameter.normal_(0.0, 2.0 * shape.config.hidden_size**-0.5, generator=generator)
    return model
