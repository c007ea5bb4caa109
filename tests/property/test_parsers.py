"""Whatever is read of what anybody sends: a valid request, or an error of ours, and nothing else.

The targets of `make fuzz`, with their seeds and spoilt copies of them instead of a search.
"""

from __future__ import annotations

from math import inf, nan

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos import wattline_ledger_pb2 as ledger
from tests.fuzz.targets import CHAT, COMPLETION, TARGETS
from tests.fuzzing import changed_json, spoilt

QUICK = settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
BODIES = {"openai-completion": COMPLETION, "openai-chat": CHAT}
FOUND = {
    "openai-completion": [
        b'{"model": "m", "prompt": "x", "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
    ],
    "config": [b"2001-99-99", b"[" * 5000, b"a: !!int x", b"\xff"],
    "credential": [b"Basic \xe9"],
    "keys": [b"acme: 0123456789ab sha256:" + b"0" * 64 + b" expires=9999-12-31"],
    "ledger-batch": [
        ledger.RecordRequest(replicas=[ledger.ReplicaSumsEntry(replica_id="x", **odd)]).SerializeToString()
        for odd in ({"at_s": nan}, {"at_s": inf}, {"epoch": 2**64 - 1}, {"meter_mj": 2**63})
    ]
    + [
        ledger.RecordRequest(requests=[ledger.ClosedRequestEntry(request_id="a", **odd)]).SerializeToString()
        for odd in (
            {"ended_s": 1e300},
            {"ttft_ms": nan},
            {"output_tokens": 2**62},
            {"energy": ledger.EnergyEntry(confidence_factor=nan)},
        )
    ],
}
"""Inputs that once raised something else."""


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_gives_a_request_or_an_error_of_ours(name: str) -> None:
    target = TARGETS[name]
    for content in (*target.seeds, *FOUND.get(name, ())):
        target.run(content)
    inputs = [st.binary(max_size=64), spoilt(st.sampled_from(target.seeds))]
    if name in BODIES:
        inputs.append(changed_json(BODIES[name]))
    QUICK(given(st.one_of(inputs))(lambda content: target.run(content)))()
