"""The idle energy a request answers for, over the last hour."""

from __future__ import annotations

import pytest

from cluster.energy.idle_share import IdleShare


def test_a_request_answers_for_idle_energy_as_for_the_energy_of_requests() -> None:
    share = IdleShare()
    assert share.of_mj("counter", 100) is None
    share.note({"counter": (0, 500)}, now_s=0.0)
    assert share.of_mj("counter", 100) is None
    share.note({"counter": (1_000, 500)}, now_s=1.0)
    assert share.of_mj("counter", 100) == 50.0
    assert share.of_mj("tdp", 100) is None


def test_what_was_more_than_an_hour_ago_is_forgotten() -> None:
    share = IdleShare()
    for minute in range(200):
        busy = minute >= 100
        requests_mj = 1_000 * max(0, minute - 99)
        share.note({"counter": (requests_mj, 300 * min(minute, 100))}, now_s=60.0 * minute)
        if busy and minute > 170:
            assert share.of_mj("counter", 1_000) == pytest.approx(0.0)
    assert share.of_mj("tdp", 1) is None
