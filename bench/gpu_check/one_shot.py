"""Section `one-shot`: questions that only a GPU answers once, and that decide which implementation serves.

Does torch's varlen attention take pages of 16, 64 and 256 tokens, is it right, and is it faster than ours;
and is `grouped_mm` faster than the expert kernels for 1 to 256 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from bench.gpu_check.attention_cases import HeadShape, decode_case, prefill_case
from bench.gpu_check.case import KernelCase, draw
from bench.gpu_check.report import SectionReport
from bench.gpu_check.setting import Setting
from replicas.layers.experts import route, run_grouped
from replicas.layers.triton.combine import combine_experts
from replicas.layers.triton.expert_lists import list_pairs
from replicas.layers.triton.grouped_linear import PairLists, down_experts, gated_experts
from replicas.layers.triton.router import choose_experts
from replicas.layers.triton.varlen import find_varlen, varlen_attention
from replicas.models.weights import ExpertWeights

_PAGES = (16, 64, 256)


def run(setting: Setting, report: SectionReport) -> None:
    _page_sizes(setting, report)
    _grouped(setting, report)


def _page_sizes(setting: Setting, report: SectionReport) -> None:
    attend = find_varlen()
    if not setting.is_cuda or attend is None:
        why = "it runs on CUDA alone" if attend else "this torch's varlen_attn takes no block table"
        report.skip(f"varlen attention over pages: {why}")
        if not setting.is_cuda:
            return
    for page in _PAGES:
        heads = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128, page_tokens=page)
        cases = {
            "decode 64 x 1024": decode_case(heads, (1024,) * 64, dtype=setting.dtype, device=setting.device),
            "prefill 2048": prefill_case(heads, ((0, 2048),), dtype=setting.dtype, device=setting.device),
        }
        for name, case in cases.items():
            report.attempt(
                f"pages of {page}, {name}", partial(_time_pages, page, name, case, setting, report)
            )


def _time_pages(page: int, name: str, case: KernelCase, setting: Setting, report: SectionReport) -> None:
    ours_s = setting.time_s(case.launch, budget_s=0.1)
    report.row(item=f"pages of {page}", case=name, ours_us=ours_s * 1e6)
    if find_varlen() is not None:
        _try_varlen(page, name, setting, report)


def _try_varlen(page: int, name: str, setting: Setting, report: SectionReport) -> None:
    """On inputs of its own: dense random pages, checked against our kernel's answer."""
    attend = find_varlen()
    assert attend is not None
    batch, length, chunk = (64, 1024, 1) if name.startswith("decode") else (1, 2048, 2048)
    pages_each = -(-length // page)
    size = (1 + batch * pages_each, page, 8, 128)
    keys, values = (draw(size, setting.dtype, setting.device, seed=seed) for seed in (1, 2))
    q = draw((batch * chunk, 32, 128), setting.dtype, setting.device, seed=3)
    table = torch.arange(1, 1 + batch * pages_each, device=setting.device, dtype=torch.int32)
    lengths = torch.full((batch,), length, device=setting.device, dtype=torch.int32)
    starts = torch.arange(0, batch * chunk + 1, chunk, device=setting.device, dtype=torch.int32)
    scale = 128**-0.5

    def theirs() -> torch.Tensor:
        return varlen_attention(
            attend,
            q,
            keys,
            values,
            table.view(batch, pages_each),
            lengths,
            starts,
            scale=scale,
            max_chunk_tokens=chunk,
            max_context_tokens=length,
        )

    try:
        answer = theirs()
        expected = _plain(q.view(batch, chunk, 32, 128), keys[1:], values[1:], scale)
        error = (answer.view_as(expected).double() - expected.double()).abs().max().item()
        time_s = setting.time_s(theirs, budget_s=0.1)
    except (RuntimeError, ValueError, NotImplementedError) as refusal:
        report.row(item=f"pages of {page}", case=name, varlen=f"refused: {str(refusal)[:200]}")
        return
    report.row(item=f"pages of {page}", case=name, varlen_us=time_s * 1e6, varlen_error=error)


def _plain(q_BTND: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """torch's own attention over the same tokens, which lie in order."""
    batch, chunk = q_BTND.shape[:2]
    k, v = (cache.reshape(batch, -1, *cache.shape[2:]).transpose(1, 2).float() for cache in (keys, values))
    out = functional.scaled_dot_product_attention(
        q_BTND.transpose(1, 2).float(), k, v, is_causal=chunk > 1, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def _grouped(setting: Setting, report: SectionReport) -> None:
    experts, choices = (4, 2) if setting.is_tiny else (32, 8)
    hidden, size = (64, 32) if setting.is_tiny else (1024, 512)
    weights = ExpertWeights(
        router_XH=draw((experts, hidden), setting.dtype, setting.device, scale=hidden**-0.5),
        gate_up_E2FH=draw((experts, 2 * size, hidden), setting.dtype, setting.device, scale=hidden**-0.5),
        down_EHF=draw((experts, hidden, size), setting.dtype, setting.device, scale=size**-0.5),
    )
    counts = torch.empty(experts, dtype=torch.int32, device=setting.device)
    for tokens in (1, 4) if setting.is_tiny else (1, 2, 4, 8, 16, 32, 64, 128, 256):
        x = draw((tokens, hidden), setting.dtype, setting.device, seed=tokens)

        def ours(x: torch.Tensor = x) -> torch.Tensor:
            chosen, shares = choose_experts(functional.linear(x, weights.router_XH), choices)
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
