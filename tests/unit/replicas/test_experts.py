"""Both ways to run experts give what transformers' Granite MoE gives, whole or as sums over ranks."""

from __future__ import annotations

import pytest
import torch
from transformers import GraniteMoeConfig
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeForCausalLM

from replicas.layers.experts import mix_experts, route, run_all, run_grouped, run_loop
from replicas.layers.linear import linear, linear_into
from replicas.models.weights import ExpertWeights

H, F, X, C = 32, 16, 8, 3


def make_weights(seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    return ExpertWeights(
        router_XH=torch.randn(X, H, generator=generator),
        gate_up_E2FH=torch.randn(X, 2 * F, H, generator=generator),
        down_EHF=torch.randn(X, H, F, generator=generator),
    )


def local_part(whole: ExpertWeights, first: int, count: int) -> ExpertWeights:
    return ExpertWeights(
        router_XH=whole.router_XH,
        gate_up_E2FH=whole.gate_up_E2FH[first : first + count],
        down_EHF=whole.down_EHF[first : first + count],
    )


def make_tokens(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, H, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def reference(x_TH: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    config = GraniteMoeConfig(
        hidden_size=H,
        intermediate_size=F,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=16,
        num_local_experts=X,
        num_experts_per_tok=C,
    )
    block = GraniteMoeForCausalLM(config).model.layers[0].block_sparse_moe
    parts = dict(block.named_parameters())
    assert len(parts) == 3
    for name, parameter in parts.items():
        source = (
            weights.router_XH
            if "router" in name
            else weights.down_EHF
            if "down" in name
            else weights.gate_up_E2FH
        )
        parameter.copy_(source)
    out = block(x_TH.unsqueeze(0))
    y_1TH = out[0] if isinstance(out, tuple) else out
    assert isinstance(y_1TH, torch.Tensor)
    return y_1TH.squeeze(0)


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 70])
def test_the_mixture_is_that_of_transformers(num_tokens: int) -> None:
    x_TH, weights = make_tokens(num_tokens), make_weights()
    tally_X = torch.ones(X, dtype=torch.int64)
    y_TH, hit = mix_experts(x_TH, weights, tally_X, num_choices=C, first_expert=0)
    choices_TC, _ = route(x_TH, weights.router_XH, C)
    assert torch.equal(tally_X - 1, choices_TC.flatten().bincount(minlength=X))
    torch.testing.assert_close(y_TH, reference(x_TH, weights), rtol=1e-4, atol=1e-3)
    choices_TC, _ = route(x_TH, weights.router_XH, C)
    assert hit == len(set(choices_TC.flatten().tolist()))


@pytest.mark.parametrize("num_tokens", [1, 5, 70])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_all_ways_agree_and_ranks_add_up(num_tokens: int, num_ranks: int) -> None:
    x_TH, weights = make_tokens(num_tokens), make_weights()
    choices_TC, shares_TC = route(x_TH, weights.router_XH, C)
    whole_TH, whole_hit = run_loop(x_TH, weights, choices_TC, shares_TC, 0)
    total_TH = torch.zeros_like(x_TH)
    for first in range(0, X, X // num_ranks):
        part = local_part(weights, first, X // num_ranks)
        loop_TH, loop_hit = run_loop(x_TH, part, choices_TC, shares_TC, first)
        for run in (run_grouped, run_all):
            other_TH, other_hit = run(x_TH, part, choices_TC, shares_TC, first)
            torch.testing.assert_close(other_TH, loop_TH, rtol=1e-4, atol=1e-3)
            assert loop_hit == int(other_hit) == whole_hit
        total_TH += loop_TH
    torch.testing.assert_close(total_TH, whole_TH, rtol=1e-4, atol=1e-3)


def test_shares_of_a_token_add_up_to_one() -> None:
    _, shares_TC = route(make_tokens(6), make_weights().router_XH, C)
    torch.testing.assert_close(shares_TC.sum(dim=1), torch.ones(6))


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 40])
def test_a_product_is_the_same_whichever_way_it_is_run(num_tokens: int) -> None:
    x_TH, weight_OH = make_tokens(num_tokens), make_weights().gate_up_E2FH[0]
    wanted = x_TH.double() @ weight_OH.double().t()
    into = torch.empty(num_tokens, 2 * F)
    linear_into(into, x_TH, weight_OH)
    for ours in (linear(x_TH, weight_OH), into):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5)
