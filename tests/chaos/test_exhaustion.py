"""A host that runs out of something. Case 25 of the fault matrix."""

from __future__ import annotations

import asyncio
import resource
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.client import Ask, Client
from replicas.rank.null_runner import null_continuation
from tests.integration.test_router_loss import NULL, PROMPT, answer, two_routers

NUM_TOKENS = 300
SPARE_FDS = 8


@pytest.mark.processes
@pytest.mark.chaos
@pytest.mark.slow
async def test_a_router_without_descriptors_keeps_its_streams_and_recovers() -> None:
    """Case 25. Promise: connections beyond the limit wait or fail, streams go on, and it serves again."""
    ask = Ask(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    async with two_routers() as (router, _):
        pid, (host, _, port) = router.process.pid, router.addresses.http.rpartition(":")
        allowed = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        with Client(router.addresses.grpc) as client:
            before = await asyncio.to_thread(answer, client, ask)
            in_use = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (in_use + SPARE_FDS, allowed[1]))
            crowd = []
            for _ in range(8 * SPARE_FDS):
                with suppress(OSError):
                    crowd.append(await asyncio.open_connection(host, int(port)))
            during = await asyncio.to_thread(answer, client, ask)
            for _, writer in crowd:
                writer.close()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, allowed)
        with Client(router.addresses.grpc) as client:
            after = await asyncio.to_thread(answer, client, ask)
        assert router.process.returncode is None
    expected = null_continuation(PROMPT, NUM_TOKENS, NULL)
    assert before.token_ids == during.token_ids == after.token_ids == expected
