"""What an entry of the ledger may say: nothing that SQLite or a sum of many entries could not hold. Pure.

The store refuses what is beyond, and routers keep it to themselves: an entry that breaks the sums would break
every report over its span, for as long as it is kept.
"""

from __future__ import annotations

from dataclasses import fields
from math import isfinite

from cluster.ledger.entries import BilledEnergy, ReplicaSums, RequestEntry

MAX_COUNT = 2**40
"""Of one request: tokens, or 305 kWh in millijoules. Eight million such requests add up to 63 bits."""
MAX_REPLICA_COUNT = 2**50
"""Of one life of a replica: 4 years at 8 kW in millijoules. Eight thousand such lives add up to 63 bits."""
MAX_TIME_S = 253_402_300_800.0
"""The year 10000, where calendars end."""
MAX_NAME_CHARS = 256
NAMES_OF_ONE = frozenset({"request_id", "replica_id"})


def problem_of(entry: RequestEntry | ReplicaSums) -> str | None:
    """What is wrong with it: field, value, limit and fix. None: nothing."""
    if isinstance(entry, ReplicaSums):
        return _problem_of("replicas", entry, max_count=MAX_REPLICA_COUNT)
    problem = _problem_of("requests", entry, max_count=MAX_COUNT)
    if problem is None and entry.energy is not None:
        problem = _problem_of("requests.energy", entry.energy, max_count=MAX_COUNT)
    return problem


def _problem_of(path: str, part: RequestEntry | ReplicaSums | BilledEnergy, *, max_count: int) -> str | None:
    for field in fields(part):
        value = getattr(part, field.name)
        name = f"{path}.{field.name}"
        if isinstance(value, str):
            if len(value) > MAX_NAME_CHARS:
                return f"{name}: has {len(value)} characters; at most {MAX_NAME_CHARS}; shorten it"
            if not value and field.name in NAMES_OF_ONE:
                return f"{name}: is empty; give each its own"
        elif isinstance(value, float):
            if not (isfinite(value) and 0.0 <= value <= MAX_TIME_S):
                return f"{name}: got {value:g}; 0 to {MAX_TIME_S:g} is allowed; correct it"
        elif isinstance(value, int) and not 0 <= value <= max_count:
            return f"{name}: got {value}; 0 to {max_count} is allowed; it cannot be true"
    return None
