"""One sentence out of Serve's tracebacks."""

from __future__ import annotations

from cluster.serving.failure_report import is_permanent, summarise_failure

REPORT = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
ray::ServeReplica:m:m.initialize_and_get_metadata() (pid=7, ip=127.0.0.1)
RuntimeError: Traceback (most recent call last):
  File "replica.py", line 1, in initialize
    await self._replica_impl.initialize()
ValueError: bad literal

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "supervisor.py", line 2, in start
    raise BadCheckpoint(text)
replicas.errors.BadCheckpoint: config.json: num_attention_heads is 7; tensor=2 does not divide it
"""


def test_the_last_exception_speaks() -> None:
    assert summarise_failure(REPORT) == "config.json: num_attention_heads is 7; tensor=2 does not divide it"


def test_a_wrong_checkpoint_is_permanent_and_a_lost_rank_is_not() -> None:
    assert is_permanent(REPORT)
    assert is_permanent("RankLost: the group did not start: rank 1 failed: BadParallelism: tensor=3")
    assert not is_permanent("replicas.errors.RankLost: rank 1 was killed or crashed")


def test_without_an_exception_the_last_line_speaks() -> None:
    assert summarise_failure("first\nsecond\n") == "second"


def test_silence_points_at_the_logs() -> None:
    assert summarise_failure("") == "no reason given; see the Serve logs"
