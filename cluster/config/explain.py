"""What is wrong with a configuration, one line per problem: key, value, limit and fix."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from cluster.config.section import Section

ALLOWED = {
    "greater_than_equal": "{ge} or more",
    "greater_than": "above {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "below {lt}",
    "too_short": "{min_length} entries or more",
    "too_long": "{max_length} entries or fewer",
    "string_too_short": "{min_length} characters or more",
    "string_too_long": "{max_length} characters or fewer",
    "string_pattern_mismatch": "letters, digits and . _ / -, the first a letter or digit",
    "string_type": "a text; put it in quotes",
    "literal_error": "{expected}",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "tuple_type": "a list; begin each entry with `- `",
    "model_type": "keys with values, as `key: value`",
}
"""What a key may hold, by the name pydantic gives the mistake."""
MAX_SHOWN_CHARS = 60


def explain_all(error: ValidationError) -> list[str]:
    """One sentence per problem."""
    problems = [dict(problem) for problem in error.errors()]
    return [_explain(problem) for problem in problems if not _is_echo(problem)]


def _is_echo(problem: dict[str, Any]) -> bool:
    """A model that is wrong is named by itself; that the list without it is too short says nothing new."""
    return problem["type"] == "too_short" and bool(problem["input"])


def _explain(problem: dict[str, Any]) -> str:
    """One sentence: key, value, limit and fix."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])[1:]
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(str(problem["loc"][-1]), _all_keys(), n=1)
        return f"{key}: unknown key; " + (f"did you mean {close[0]!r}?" if close else "remove it")
    if kind == "missing":
        return f"{key}: is missing; add it"
    if kind == "value_error":
        return f"{key}: {context['error']}" if key else str(context["error"])
    got = repr(problem["input"])
    got = got if len(got) <= MAX_SHOWN_CHARS else f"{got[:MAX_SHOWN_CHARS]}..."
    allowed = ALLOWED[kind].format_map(context) if kind in ALLOWED else problem["msg"]
    if kind == "literal_error" and isinstance(problem["input"], bool):
        allowed += "; put the word in quotes, YAML reads it as true or false"
    return f"{key}: got {got}; allowed: {allowed}"


def _all_keys() -> set[str]:
    return {name for section in Section.__subclasses__() for name in section.model_fields}
