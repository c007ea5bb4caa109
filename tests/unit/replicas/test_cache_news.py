"""Routers hear what prefix caches hold: all of it once, then the changes, and all again after too many."""

from __future__ import annotations

from replicas.engine.cache_log import CacheLog
from replicas.link.cache_news import CacheNews
from replicas.request import CacheChange
from replicas.supervisor.cache_mirror import CacheMirror

A, B, C = (bytes([number]) * 16 for number in range(3))


def test_a_log_keeps_the_net_change_in_order() -> None:
    log = CacheLog()
    for block_hash, is_filed in ((A, True), (B, True), (A, False), (C, True)):
        log.note(block_hash, is_filed=is_filed)
    assert log.take() == ((B, C), ())
    log.note(B, is_filed=False)
    log.note(C, is_filed=False)
    log.note(C, is_filed=True)
    assert log.take() == ((), (B,))
    assert log.take() == ((), ())


def test_a_mirror_holds_what_the_changes_leave() -> None:
    mirror = CacheMirror()
    assert mirror.snapshot() == ()
    mirror.apply((CacheChange(lane=0, added=(A, B)), CacheChange(lane=1, added=(A,))))
    mirror.apply((CacheChange(lane=0, added=(C,), removed=(A,)),))
    assert mirror.snapshot() == (
        CacheChange(lane=0, added=(B, C), is_snapshot=True),
        CacheChange(lane=1, added=(A,), is_snapshot=True),
    )


def test_a_router_needs_a_snapshot_first_and_after_too_many_changes() -> None:
    news = CacheNews(max_pending_blocks=2)
    change = CacheChange(lane=0, added=(A,), removed=(B,))
    news.add((change,))
    assert news.take() is None
    news.add((change,))
    assert news.take() == (change,)
    assert news.take() == ()
    news.add((change, change))
    assert news.take() is None
    assert news.take() == ()
