"""The traces that a line of a log names."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

MAX_LOGGED_TRACES = 32


def list_traces(trace_ids: Iterable[str]) -> str:
    """Each once, and no more than a line can hold. Empty ones are of requests without a trace."""
    return ",".join(islice(dict.fromkeys(filter(None, trace_ids)), MAX_LOGGED_TRACES))
