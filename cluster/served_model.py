"""One configured model as the router sees it: its tokenizer, its bounds, and what it has done so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from cluster.balancing.output_estimate import OutputEstimate
from cluster.config import ModelSection
from cluster.energy.account import RequestEnergy
from cluster.energy.ledger_book import LedgerBook
from cluster.energy.rates import EnergyRate, TokenRate
from cluster.request.errors import NotAllowed, UnknownModel
from cluster.request.validation import RequestBounds
from cluster.security.auth import Identity
from cluster.text.tokenizer import Tokenizer


class ServedModel:
    """Mutable counters; owned by the event loop. Totals count since the router started."""

    def __init__(self, section: ModelSection, tokenizer: Tokenizer, *, max_prompt_bytes: int) -> None:
        self.section = section
        self.tokenizer = tokenizer
        self.bounds = RequestBounds(
            max_prompt_bytes=max_prompt_bytes,
            max_output_tokens=section.limits.max_output_tokens,
            vocab_size=tokenizer.vocab_size,
            has_chat_template=tokenizer.has_chat_template,
        )
        self.active_requests = 0
        self.requests_total = 0
        self.refused_total = 0
        self.prompt_tokens_total = 0
        self.output_tokens_total = 0
        self.energy_mj_total = 0
        self.output_estimate = OutputEstimate()
        self.token_rate = TokenRate()
        self.energy_rate = EnergyRate()
        self.ledger = LedgerBook()

    @property
    def name(self) -> str:
        return self.section.name

    def energy_source(self, announced: Iterable[str], *, now_s: float) -> str:
        """The one that is shown; others are kept beside it, never added to it. Empty: unknown.

        That of the last bill; once its meter counts no more, that of a ledger which still divides one. Before
        any joule, what the replicas `announced`.
        """
        counting = [source for source in self.ledger.sums if self.ledger.power(source, now_s=now_s)]
        billed = self.energy_rate.source
        known = (billed, *self.ledger.sums, *announced)
        return counting[0] if counting and billed not in counting else next(filter(None, known), "")

    @contextmanager
    def one_more_active(self) -> Iterator[None]:
        """Count a request from its admission to its end."""
        self.active_requests += 1
        self.requests_total += 1
        try:
            yield
        finally:
            self.active_requests -= 1

    def add_energy(self, energy: RequestEnergy, *, output_tokens: int) -> None:
        """The settled joules of one request."""
        self.energy_mj_total += energy.total_mj
        self.energy_rate.add(energy_mj=energy.total_mj, output_tokens=output_tokens, source=energy.source)


def find_model(
    models: Mapping[str, ServedModel], name: str, identity: Identity, *, field: str = "model"
) -> ServedModel:
    """A model that this caller may use; `field` is where it was named.

    Raises UnknownModel, which names those the caller may use, or NotAllowed.
    """
    model = models.get(name)
    if model is None:
        raise UnknownModel(field=field, name=name, served=tuple(filter(identity.may_use, models)))
    if not identity.may_use(name):
        raise NotAllowed(f"tenant {identity.tenant!r} may not use this model; see ListModels")
    return model
