"""Whether two engines gave the same first tokens, and if not, whether float rounding explains it.

Where the best two logits are closer than rounding, either token is right, and all after it may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

NEAR_TIE_LOGITS = 1e-3
"""Logits closer than this are a tie: engines that sum in another order differ by about 1e-5 to 1e-4."""

Gap = Callable[[Sequence[int], int, int], float]
"""(tokens so far, a token, another) to the distance of their next-token logits, in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Over the first tokens of every request: the same, another choice at a tie, or different.

    `widest_gap` is the largest distance of two logits between which the engines chose differently.
    """

    same: int
    near_ties: int
    different: int
    widest_gap: float


def compare_heads(
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    gap: Gap,
) -> Agreement:
    """Judge each request by the first token in which the two differ."""
    gaps = []
    for prompt, mine, other in zip(prompts, ours, theirs, strict=True):
        at = next(
            (index for index, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]), None
        )
        if at is not None:
            gaps.append(abs(gap([*prompt, *mine[:at]], mine[at], other[at])))
    near_ties = sum(one <= NEAR_TIE_LOGITS for one in gaps)
    return Agreement(
        same=len(prompts) - len(gaps),
        near_ties=near_ties,
        different=len(gaps) - near_ties,
        widest_gap=round(max(gaps, default=0.0), 5),
    )


class ReferenceGap:
    """The gap by transformers in float32; the model is loaded when the first mismatch asks for it."""

    def __init__(self, model: Path) -> None:
        self._folder = model
        self._model: object = None

    def __call__(self, tokens: Sequence[int], one: int, other: int) -> float:
        import torch
        from transformers import AutoModelForCausalLM

        if self._model is None:
            self._model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32).eval()
        assert callable(self._model)
        with torch.inference_mode():
            logits_V = self._model(torch.tensor([list(tokens)])).logits[0, -1]
        return float(logits_V[one] - logits_V[other])
