"""Names in `router.auth` that nobody has: a slip of the pen there locks a tenant out without a word. Pure.

They are told and not refused: a key may be made later, and a model be served again.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator

from cluster.config import AuthSection

MAX_SHOWN = 8
BY_KEY = "known by a key or auth.client_names"


def unknown_names(
    section: AuthSection, *, models: Collection[str], tenants: Collection[str]
) -> Iterator[str]:
    """A line for each. `models` are those that are served, `tenants` those with a key or a certificate."""
    for tenant, its_models in section.models.items():
        if tenant not in tenants:
            yield _line("router.auth.models", tenant, tenants, BY_KEY)
        for model in its_models:
            if model not in models:
                yield _line(f"router.auth.models[{tenant}]", model, models, "served here")
    for tenant in section.operators:
        if tenant not in tenants:
            yield _line("router.auth.operators", tenant, tenants, BY_KEY)


def _line(key: str, name: str, known: Collection[str], what: str) -> str:
    shown = ", ".join(sorted(known)[:MAX_SHOWN]) or "none"
    more = ", ..." if len(known) > MAX_SHOWN else ""
    close = difflib.get_close_matches(name, known, n=1)
    fix = f"did you mean {close[0]!r}?" if close else "correct it, unless it comes later"
    return f"{key}: got {name!r}; {what}: {shown}{more}; {fix}"
