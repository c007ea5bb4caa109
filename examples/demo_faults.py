"""The mistakes of sharding that a demonstration model must notice: each of them must spoil some answers.

Owns the list and how to make one mistake for a while in transformers' own model. `demo_proof.py` judges them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

RANK_COUNT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One mistake, and how to make it: `install` returns a function that takes it back."""

    name: str
    install: Callable[[], Callable[[], None]]


@contextmanager
def broken(fault: Fault) -> Iterator[None]:
    """The model computes with the fault inside of the block and rightly after it."""
    repair = fault.install()
    try:
        yield
    finally:
        repair()


def list_faults(model: PreTrainedModel) -> Sequence[Fault]:
    """All faults that apply to the architecture of `model`, in a fixed order."""
    layers = model.model.layers
    outputs = [layer.self_attn.o_proj for layer in layers]
    faults = [lost_features("heads", outputs, rank) for rank in range(RANK_COUNT)]
    if hasattr(model.config, "num_local_experts"):
        experts = [layer.block_sparse_moe.experts for layer in layers]
        routers = [layer.block_sparse_moe.router for layer in layers]
        faults += [lost_experts(experts, rank) for rank in range(RANK_COUNT)]
        return [*faults, default_attention_scale(model), weights_of_all_experts(routers)]
    downs = [layer.mlp.down_proj for layer in layers]
    faults += [lost_features("MLP", downs, rank) for rank in range(RANK_COUNT)]
    return [*faults, unscaled_rope(model)]


def lost_features(noun: str, linears: Sequence[Any], rank: int) -> Fault:
    """One rank's share of the input of row-parallel layers, and so its term of every all-reduce, is lost."""
    import torch

    def lose(module: Any, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        shares = list(arguments[0].chunk(RANK_COUNT, dim=-1))
        shares[rank] = torch.zeros_like(shares[rank])
        return (torch.cat(shares, dim=-1),)

    registers = [linear.register_forward_pre_hook for linear in linears]
    return hooked(f"{noun} of rank {rank} lost", registers, lose)


def lost_experts(experts: Sequence[Any], rank: int) -> Fault:
    """The experts that live on one rank contribute nothing."""

    def lose(module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states_ND, chosen_NK, weights_NK = arguments
        is_lost_NK = chosen_NK // (module.num_experts // RANK_COUNT) == rank
        return states_ND, chosen_NK, weights_NK.masked_fill(is_lost_NK, 0.0)

    registers = [each.register_forward_pre_hook for each in experts]
    return hooked(f"experts of rank {rank} lost", registers, lose)


def hooked(name: str, registers: Sequence[Callable[[Any], Any]], hook: Any) -> Fault:
    """A fault that is a hook on several modules."""

    def install() -> Callable[[], None]:
        handles = [register(hook) for register in registers]

        def repair() -> None:
            for handle in handles:
                handle.remove()

        return repair

    return Fault(name=name, install=install)


def weights_of_all_experts(routers: Sequence[Any]) -> Fault:
    """The weights of the chosen experts come from a softmax over all of them, and no longer add up to one."""

    def reweigh(module: Any, arguments: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits_NE, _, chosen_NK = output
        return logits_NE, logits_NE.softmax(dim=-1).gather(-1, chosen_NK), chosen_NK

    return hooked("expert weights not normalised", [each.register_forward_hook for each in routers], reweigh)


def default_attention_scale(model: PreTrainedModel) -> Fault:
    """Attention divides by the root of the head size and ignores `attention_multiplier`."""

    def set_scale(scale: float) -> None:
        for layer in model.model.layers:
            layer.self_attn.scaling = scale

    def install() -> Callable[[], None]:
        head_dim = model.model.layers[0].self_attn.head_dim
        set_scale(head_dim**-0.5)
        return lambda: set_scale(model.config.attention_multiplier)

    return Fault(name="attention_multiplier ignored", install=install)


def unscaled_rope(model: PreTrainedModel) -> Fault:
    """Positions turn at RoPE's plain frequencies; the llama3 scaling is ignored."""
    rotary = model.model.rotary_emb

    def install() -> Callable[[], None]:
        right = rotary.inv_freq
        rotary.inv_freq = rotary.compute_default_rope_parameters(model.config)[0]

        def repair() -> None:
            rotary.inv_freq = right

        return repair

    return Fault(name="RoPE scaling ignored", install=install)
