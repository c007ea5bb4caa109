"""What a process keeps is not looked through again."""

from __future__ import annotations

import gc

from replicas.long_lived import spare_the_collector


class Kept:
    """Something the collector follows."""


def test_what_is_there_is_out_of_the_collectors_sight() -> None:
    kept = Kept()
    assert any(each is kept for each in gc.get_objects())
    spare_the_collector()
    try:
        assert not any(each is kept for each in gc.get_objects())
    finally:
        gc.unfreeze()
