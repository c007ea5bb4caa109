"""The index says of each lane the longest beginning it holds, whatever was added, removed and forgotten."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.balancing.prefix_index import LaneKey, PrefixIndex
from replicas.engine.prefix_hash import extend_hashes

OWNERS: list[LaneKey] = [("a", 0), ("a", 1), ("b", 0)]
BLOCKS = [bytes([number]) * 16 for number in range(6)]
EVENTS = st.tuples(
    st.sampled_from(["update", "replace", "forget"]),
    st.sampled_from(OWNERS),
    st.lists(st.sampled_from(BLOCKS), max_size=4),
    st.lists(st.sampled_from(BLOCKS), max_size=4),
)


def play(index: PrefixIndex, events: list[tuple[str, LaneKey, list[bytes], list[bytes]]]) -> None:
    for kind, owner, added, removed in events:
        if kind == "update":
            index.update(owner, added=added, removed=removed)
        elif kind == "replace":
            index.replace(owner, added)
        else:
            index.forget(owner[0])
        index.check()


@settings(max_examples=150, derandomize=True, deadline=None)
@given(events=st.lists(EVENTS, max_size=12), prompt=st.lists(st.sampled_from(BLOCKS), max_size=6))
def test_a_match_is_what_a_plain_set_per_lane_would_say(
    events: list[tuple[str, LaneKey, list[bytes], list[bytes]]], prompt: list[bytes]
) -> None:
    index = PrefixIndex()
    play(index, events)
    held: dict[LaneKey, set[bytes]] = {owner: set() for owner in OWNERS}
    for kind, owner, added, removed in events:
        if kind == "forget":
            held.update({each: set() for each in OWNERS if each[0] == owner[0]})
        else:
            before = held[owner] - set(removed) if kind == "update" else set()
            held[owner] = before | set(added)
    expected = {}
    for owner, blocks in held.items():
        count = next((at for at, block in enumerate(prompt) if block not in blocks), len(prompt))
        if count:
            expected[owner] = count
    assert index.match(prompt) == expected


@settings(max_examples=50, derandomize=True, deadline=None)
@given(events=st.lists(EVENTS, max_size=12))
def test_it_never_holds_more_than_it_may(
    events: list[tuple[str, LaneKey, list[bytes], list[bytes]]],
) -> None:
    index = PrefixIndex(max_blocks=3)
    play(index, events)
    assert len(index) <= 3


def test_what_nobody_asked_for_longest_goes_first() -> None:
    index = PrefixIndex(max_blocks=2)
    index.update(OWNERS[0], added=BLOCKS[:2], removed=())
    assert index.match(BLOCKS[:1]) == {OWNERS[0]: 1}
    index.update(OWNERS[0], added=BLOCKS[2:3], removed=())
    assert index.match(BLOCKS[:1]) == {OWNERS[0]: 1}
    assert index.match(BLOCKS[1:2]) == {}


def test_one_tenant_does_not_find_what_another_has_cached() -> None:
    mine: list[bytes] = []
    yours: list[bytes] = []
    extend_hashes(mine, list(range(32)), block_tokens=16, salt=b"mine")
    extend_hashes(yours, list(range(32)), block_tokens=16, salt=b"yours")
    index = PrefixIndex()
    index.update(OWNERS[0], added=mine, removed=())
    assert index.match(mine) == {OWNERS[0]: 2}
    assert index.match(yours) == {}
