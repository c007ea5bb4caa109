"""Why a replica could not start, out of what Serve reports: tracebacks within tracebacks."""

from __future__ import annotations

import re

MAX_REASON_CHARS = 500
RAISED = re.compile(r"^(?:(?:\w+\.)+\w+|\w*Error|\w*Exception): (?!Traceback)(.+)$")
"""The line of a traceback that names the exception, qualified unless it is built in."""

PERMANENT = ("BadCheckpoint: ", "BadParallelism: ", "SourceError: ")
"""Errors that the next attempt would meet again."""


def is_permanent(message: str) -> bool:
    """Is there no point in waiting for Serve's next attempts?"""
    return any(kind in message for kind in PERMANENT)


def summarise_failure(message: str) -> str:
    """The sentence of the last exception in Serve's report."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    raised = [match.group(1) for line in lines if (match := RAISED.match(line))]
    return (raised or lines or ["no reason given; see the Serve logs"])[-1][:MAX_REASON_CHARS]
