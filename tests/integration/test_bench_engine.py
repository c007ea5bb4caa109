"""The engine under test: a rank that cannot start ends the measurement with its last words."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.engine import EngineSetup, EngineUnderTest
from replicas.errors import RankLost


@pytest.mark.processes
async def test_a_rank_that_cannot_start_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    with pytest.raises(RankLost, match=r"the engine of .* ended: .*nothing"):
        async with EngineUnderTest(EngineSetup(source=str(tmp_path / "nothing"))):
            pass
