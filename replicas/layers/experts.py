"""Mixture of experts: which experts a token goes to, and the sum of what they make of it.

Routing is the same on every rank; a rank runs its own experts and gives a partial sum. Three ways to run
them: a loop over the experts hit (CPU), two grouped products without a word to the host (CUDA, bfloat16, the
one type these products take there), and all experts over all tokens (CUDA, other types; slow).
Shape letters: T tokens, H hidden, F hidden columns, X all experts, E local experts, C choices per token,
M = T*C token-expert pairs, S the pairs of local experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from replicas.layers.expert_routes import ExpertRoutes
from replicas.layers.linear import gate, linear, linear_into
from replicas.models.weights import ExpertWeights, LayerWeights


def mix_experts(
    x_TH: torch.Tensor,
    weights: ExpertWeights,
    tally_X: torch.Tensor,
    *,
    num_choices: int,
    first_expert: int,
    routes: ExpertRoutes | None = None,
) -> tuple[torch.Tensor, torch.Tensor | int]:
    """The local experts' part of the output [T, H], and how many distinct experts were hit on all ranks.

    `tally_X`, int64, counts the tokens that each expert gets. With `routes`, some experts have copies.
    """
    choices_TC, shares_TC = route(x_TH, weights.router_XH, num_choices)
    tally_X.index_add_(0, choices_TC.reshape(-1), torch.ones_like(choices_TC).reshape(-1))
    run: Callable[..., tuple[torch.Tensor, torch.Tensor | int]] = run_loop
    if x_TH.device.type != "cpu":
        run = run_grouped if x_TH.dtype == torch.bfloat16 else run_all
    if routes is not None:
        # Local slots take the numbers of the first experts, and whatever runs elsewhere that of the next.
        out_TH, _ = run(x_TH, weights, routes.slots_of(choices_TC), shares_TC, 0)
        return out_TH, torch.zeros_like(tally_X).index_fill_(0, choices_TC.reshape(-1), 1).sum()
    return run(x_TH, weights, choices_TC, shares_TC, first_expert)


class StackedExperts:
    """The experts of all layers as torch has them, one stack per layer; spare slots come last."""

    def __init__(self, layers: Sequence[LayerWeights]) -> None:
        self._layers = layers

    def expert_tensors(self, layer: int, slot: int) -> tuple[torch.Tensor, ...]:
        """Gate and up in one, and down."""
        experts = self._layers[layer].ffn
        assert isinstance(experts, ExpertWeights)
        return experts.gate_up_E2FH[slot], experts.down_EHF[slot]

    def put_expert(self, layer: int, slot: int, tensors: Sequence[torch.Tensor]) -> None:
        for own, tensor in zip(self.expert_tensors(layer, slot), tensors, strict=True):
            own.copy_(tensor.view(own.shape))


def route(x_TH: torch.Tensor, router_XH: torch.Tensor, num_choices: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best experts of every token, and their shares: a softmax over the chosen logits, in float32."""
    logits_TX = linear(x_TH, router_XH).float()
    top_TC, choices_TC = logits_TX.topk(num_choices, dim=-1)
    return choices_TC, top_TC.softmax(dim=-1).to(x_TH.dtype)


def run_loop(
    x_TH: torch.Tensor,
    weights: ExpertWeights,
    choices_TC: torch.Tensor,
    shares_TC: torch.Tensor,
    first_expert: int,
) -> tuple[torch.Tensor, int]:
    """Pairs sorted by expert; two products per expert hit, everything else once for all pairs."""
    num_choices = choices_TC.shape[1]
    num_local, double_size, _ = weights.gate_up_E2FH.shape
    choices_M = choices_TC.reshape(-1)
    counts = torch.bincount(choices_M, minlength=weights.router_XH.shape[0]).tolist()
    begin = sum(counts[:first_expert])
    local_counts = counts[first_expert : first_expert + num_local]
    pairs_S = choices_M.argsort(stable=True)[begin : begin + sum(local_counts)]
    tokens_S = pairs_S.div(num_choices, rounding_mode="floor")
    x_SH = x_TH.index_select(0, tokens_S)
    gate_up_S2F = x_TH.new_empty((len(pairs_S), double_size))
    spans = _spans(local_counts)
    for expert, start, end in spans:
        linear_into(gate_up_S2F[start:end], x_SH[start:end], weights.gate_up_E2FH[expert])
    hidden_SF = gate(gate_up_S2F)
    y_SH = torch.empty_like(x_SH)
    for expert, start, end in spans:
        linear_into(y_SH[start:end], hidden_SF[start:end], weights.down_EHF[expert])
    y_SH *= shares_TC.reshape(-1).index_select(0, pairs_S).unsqueeze(1)
    return torch.zeros_like(x_TH).index_add_(0, tokens_S, y_SH), sum(count > 0 for count in counts)


def run_grouped(
    x_TH: torch.Tensor,
    weights: ExpertWeights,
    choices_TC: torch.Tensor,
    shares_TC: torch.Tensor,
    first_expert: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs sorted with local experts first; group ends stay on the device, so a graph can capture it."""
    num_tokens, num_choices = choices_TC.shape
    num_experts, num_local = weights.router_XH.shape[0], weights.gate_up_E2FH.shape[0]
    expert_M = (choices_TC.reshape(-1) - first_expert) % num_experts
    order_M = expert_M.argsort(stable=True)
    all_X = torch.arange(num_experts, device=x_TH.device)
    counts_X = (expert_M.unsqueeze(1) == all_X).sum(0)
    ends_E = counts_X[:num_local].cumsum(0).to(torch.int32)
    x_MH = x_TH.index_select(0, order_M.div(num_choices, rounding_mode="floor"))
    gate_up_M2F = functional.grouped_mm(x_MH, weights.gate_up_E2FH.transpose(1, 2), offs=ends_E)
    y_MH = functional.grouped_mm(gate(gate_up_M2F), weights.down_EHF.transpose(1, 2), offs=ends_E)
    # Rows of other ranks' experts are whatever was in memory: replaced, not multiplied by zero.
    is_local_M1 = (torch.arange(len(order_M), device=x_TH.device) < ends_E[-1]).unsqueeze(1)
    y_MH = torch.where(is_local_M1, y_MH, 0.0)
    unsorted_MH = torch.empty_like(y_MH).index_copy_(0, order_M, y_MH)
    y_TCH = unsorted_MH.view(num_tokens, num_choices, -1) * shares_TC.unsqueeze(2)
    return y_TCH.sum(dim=1), (counts_X > 0).sum()


def run_all(
    x_TH: torch.Tensor,
    weights: ExpertWeights,
    choices_TC: torch.Tensor,
    shares_TC: torch.Tensor,
    first_expert: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every local expert over every token, with a share of zero where it was not chosen."""
    num_experts, num_local = weights.router_XH.shape[0], weights.gate_up_E2FH.shape[0]
    shares_TX = shares_TC.new_zeros((len(x_TH), num_experts)).scatter_(1, choices_TC, shares_TC)
    y_TH = torch.zeros_like(x_TH)
    for expert in range(num_local):
        hidden_TF = gate(linear(x_TH, weights.gate_up_E2FH[expert]))
        share_T1 = shares_TX[:, first_expert + expert].unsqueeze(1)
        y_TH += linear(hidden_TF, weights.down_EHF[expert]) * share_T1
    is_hit_X = torch.zeros(num_experts, dtype=torch.int64, device=x_TH.device)
    return y_TH, is_hit_X.index_fill_(0, choices_TC.reshape(-1), 1).sum()


def _spans(counts: list[int]) -> list[tuple[int, int, int]]:
    """(expert, start, end) of every expert with pairs."""
    spans, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            spans.append((expert, start, start + count))
            start += count
    return spans
