"""What an answer took, as OpenAI's `usage` with our `energy` in it, and as headers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.energy.account import RequestEnergy, add_up
from cluster.request.answer import Completed, Usage, sum_usage
from cluster.router.wire import energy_trailers
from cluster.telemetry import semconv


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one HTTP request: the sum of its prompts. `energy` None: not known of all of them.

    `usage` counts a prompt once, as this protocol does, however many answers there are to it.
    """

    usage: Usage
    energy: RequestEnergy | None
    is_settled: bool

    def usage_document(self) -> dict[str, Any]:
        usage = self.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "wasted_tokens": usage.wasted_tokens,
            "energy": self.energy_document(),
        }

    def energy_document(self) -> dict[str, Any]:
        """Joules; null is unknown, and zero only ever a measurement."""
        energy, output_tokens = self.energy, self.usage.completion_tokens
        state = self.headers()[f"x-{semconv.TRAILER_ENERGY_STATE}"]
        if energy is None:
            return {"joules": None, "joules_per_output_token": None, "source": None, "state": state}
        joules = energy.total_mj / 1e3
        return {
            "joules": joules,
            "joules_per_output_token": joules / output_tokens if output_tokens else None,
            "prefill_joules": energy.prefill_mj / 1e3,
            "decode_joules": energy.decode_mj / 1e3,
            "static_joules": energy.static_mj / 1e3,
            "wasted_joules": energy.wasted_mj / 1e3,
            "source": energy.source,
            "method": energy.method,
            "confidence_factor": energy.confidence_factor,
            "state": state,
            "host_joules": None if energy.host_mj is None else energy.host_mj / 1e3,
        }

    def headers(self) -> dict[str, str]:
        """The trailers of gRPC, as headers."""
        trailers = energy_trailers(self.energy, is_settled=self.is_settled)
        return {f"x-{name}": value for name, value in trailers}


def figures_of(parts: Sequence[Completed], *, num_choices: int, has_answer: bool = True) -> Figures:
    """The figures of all prompts of a request. A token that was drawn but not wanted counts as wasted."""
    total = sum_usage([part.usage for part in parts])
    energies = [part.energy for part in parts]
    return Figures(
        usage=Usage(
            prompt_tokens=total.prompt_tokens // num_choices,
            cached_tokens=total.cached_tokens // num_choices,
            completion_tokens=total.completion_tokens if has_answer else 0,
            wasted_tokens=total.wasted_tokens + (0 if has_answer else total.completion_tokens),
        ),
        energy=None if None in energies else add_up(energies, repeated=[False] * len(parts)),
        is_settled=all(part.is_settled for part in parts),
    )
