"""The engine under test: a rank that cannot start ends the measurement with its last words."""

from __future__ import annotations

import pytest

from bench.engine import EngineSetup, EngineUnderTest
from replicas.config import NullEngineConfig
from replicas.errors import RankLost


@pytest.mark.processes
async def test_a_rank_that_cannot_start_is_an_error_and_not_a_wait() -> None:
    stillborn = EngineSetup(source="null", null=NullEngineConfig(fail_at_step=1))
    with pytest.raises(RankLost, match="the engine of null ended: rank 0"):
        async with EngineUnderTest(stillborn):
            pass
