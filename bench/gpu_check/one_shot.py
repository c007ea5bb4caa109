"""Section `one-shot`: questions that only a GPU answers once, and that decide which implementation serves.

Which attention would `attention: auto` take at pages of 16 and 256 tokens, by the engine's own trial and
times; and is `grouped_mm` faster than the expert kernels, from 1 token to a prompt chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from bench.gpu_check.case import draw
from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting
from replicas.attention_choice import NEVER_NS, AttentionChoice, pick_faster
from replicas.config import EngineLimits
from replicas.layers.attention import PagedKV
from replicas.layers.experts import route, run_grouped
from replicas.layers.triton.combine import combine_experts
from replicas.layers.triton.expert_lists import list_pairs
from replicas.layers.triton.grouped_linear import PairLists, down_experts, gated_experts
from replicas.layers.triton.page_attention import PageAttention
from replicas.layers.triton.router import choose_experts
from replicas.models.weights import ExpertWeights
from replicas.rank.attention_probe import AttentionProbe, ProbedSteps
from replicas.rank.device_clock import DeviceClock

_PAGES = (16, 256)
"""The default, and the least that varlen reads."""


def run(setting: Setting, report: SectionReport) -> None:
    _page_sizes(setting, report)
    _grouped(setting, report)


def _page_sizes(setting: Setting, report: SectionReport) -> None:
    for page in _PAGES:
        if not report.has_time():
            report.skip(f"pages of {page}: out of time")
            continue
        report.attempt(f"pages of {page}", partial(_probe_pages, page, setting, report))


@torch.inference_mode()
def _probe_pages(page: int, setting: Setting, report: SectionReport) -> None:
    """The trial and the times by which a replica chooses: Llama-3.1-8B's heads, and a cache that is full with
    256 sequences of 1024 tokens."""
    rows, tokens, chunk = (2, page, 4) if setting.is_tiny else (256, 1024, 2048)
    num_heads, num_kv_heads, head_dim = (4, 2, 16) if setting.is_tiny else (32, 8, 128)
    kv = PagedKV(
        num_layers=1,
        num_blocks=1 + rows * tokens // page,
        block_tokens=page,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        device=setting.device,
        dtype=setting.dtype,
    )
    limits = EngineLimits(max_sequences=rows, step_tokens=chunk, block_tokens=page)
    steps = ProbedSteps(limits=limits, num_heads=num_heads, context_tokens=16 * tokens)
    pages = PageAttention(scale=head_dim**-0.5)
    probe = AttentionProbe(pages, kv, steps, DeviceClock(has_graphs=True))
    refusal = probe.refusal()
    if not setting.is_cuda:
        report.row(item=f"pages of {page}", auto="triton", refusal=refusal)
        return
    decodes, prompt = probe.decode_timings(), probe.chunk_timing()
    for timing in (*decodes, prompt):
        varlen_us = "refused" if timing.varlen_ns == NEVER_NS else timing.varlen_ns / 1e3
        report.row(
            item=f"pages of {page}",
            decode_rows=timing.rows,
            triton_us=timing.triton_ns / 1e3,
            varlen_us=varlen_us,
        )
    choice = AttentionChoice(reason=refusal) if refusal else pick_faster(decodes, prompt)
    report.row(item=f"pages of {page}", auto=str(choice))


def _grouped(setting: Setting, report: SectionReport) -> None:
    experts, choices = (4, 2) if setting.is_tiny else (32, 8)
    hidden, size = (64, 32) if setting.is_tiny else (1024, 512)
    weights = ExpertWeights(
        router_XH=draw((experts, hidden), setting.dtype, setting.device, scale=hidden**-0.5),
        gate_up_E2FH=draw((experts, 2 * size, hidden), setting.dtype, setting.device, scale=hidden**-0.5),
        down_EHF=draw((experts, hidden, size), setting.dtype, setting.device, scale=size**-0.5),
    )
    counts = torch.empty(experts, dtype=torch.int32, device=setting.device)
    slots = torch.arange(1, 2049, device=setting.device)
    for tokens in (1, 4) if setting.is_tiny else (1, 2, 4, 8, 16, 32, 64, 128, 256, 2048):
        x = draw((tokens, hidden), setting.dtype, setting.device, seed=tokens)

        def ours(x: torch.Tensor = x) -> torch.Tensor:
            chosen, shares = choose_experts(functional.linear(x, weights.router_XH), slots[: len(x)], choices)
            pairs = list_pairs(chosen, counts, first_expert=0, num_local=experts)
            lists = PairLists(pairs_ET=pairs, counts_X=counts, first_expert=0, num_choices=choices)
            y = down_experts(gated_experts(x, weights.gate_up_E2FH, lists), weights.down_EHF, lists)
            return combine_experts(y, chosen, shares, first_expert=0, num_local=experts)

        def theirs(x: torch.Tensor = x) -> torch.Tensor:
            chosen, shares = route(x, weights.router_XH, choices)
            return run_grouped(x, weights, chosen, shares, 0)[0]

        if not report.has_time():
            report.skip(f"experts from {tokens} tokens on: out of time")
            return
        report.attempt(f"experts, {tokens} tokens", partial(_compare, ours, theirs, tokens, setting, report))


def _compare(
    ours: Callable[[], torch.Tensor],
    theirs: Callable[[], torch.Tensor],
    tokens: int,
    setting: Setting,
    report: SectionReport,
) -> None:
    mine = ours()
    row: dict[str, object] = {"item": "experts", "tokens": tokens, "ours_us": setting.time_s(ours) * 1e6}
    try:
        other = theirs()
        row["grouped_mm_us"] = setting.time_s(theirs) * 1e6
        row["difference"] = ((mine - other).abs().max() / mine.abs().max()).item()
    except (AttributeError, RuntimeError) as refusal:
        row["grouped_mm"] = f"refused: {str(refusal)[:200]}"
    report.row(**row)
