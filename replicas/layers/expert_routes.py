"""Which local slot serves a token's choice of an expert, where hot experts have copies on several ranks.

With C copies of expert x, token t goes to copy t % C: every rank knows from the token's index alone, without
a word. A rank's slots are its own experts and then its spare slots. Shape letters: X all experts, R ranks,
T tokens, C choices per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRoutes:
    """One layer, one rank. `slots_XR[x, copy]` is the local slot, `num_slots` for a copy on another rank.

    Compiled kernels read both tensors by their addresses: they are written in place.
    """

    copies_X: torch.Tensor
    slots_XR: torch.Tensor
    num_slots: int

    @classmethod
    def empty(cls, *, num_experts: int, num_ranks: int, num_slots: int, device: torch.device) -> ExpertRoutes:
        return cls(
            copies_X=torch.ones(num_experts, dtype=torch.int64, device=device),
            slots_XR=torch.full((num_experts, num_ranks), num_slots, dtype=torch.int64, device=device),
            num_slots=num_slots,
        )

    def set(self, holders: Sequence[Sequence[int]], own_slots: dict[int, int], *, rank: int) -> None:
        """`holders[x]` are the ranks with expert x, in turn; `own_slots` where this one has its experts."""
        slots = torch.full(self.slots_XR.shape, self.num_slots, dtype=torch.int64)
        for expert, slot in own_slots.items():
            slots[expert, list(holders[expert]).index(rank)] = slot
        self.slots_XR.copy_(slots)
        self.copies_X.copy_(torch.tensor([len(ranks) for ranks in holders]))

    def slots_of(self, choices_TC: torch.Tensor) -> torch.Tensor:
        """The local slot of every choice, `num_slots` where another rank serves it."""
        turns_T1 = torch.arange(len(choices_TC), device=choices_TC.device).unsqueeze(1)
        copies_TC = turns_T1 % self.copies_X[choices_TC]
        return self.slots_XR[choices_TC, copies_TC]
