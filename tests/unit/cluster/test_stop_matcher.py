"""Stop texts in a stream: found across pieces, cut before, and what only looked like one is sent."""

from __future__ import annotations

import pytest

from cluster.text.stop_matcher import StopMatcher


def run(stops: tuple[str, ...], *pieces: str) -> tuple[list[str], bool]:
    """What comes out for each piece, and for the flush; whether it stopped."""
    matcher = StopMatcher(stops)
    return [*(matcher.feed(piece) for piece in pieces), matcher.flush()], matcher.is_stopped


def test_text_without_a_stop_goes_straight_through() -> None:
    assert run(("END",), "abc", "def") == (["abc", "def", ""], False)


def test_a_stop_over_several_pieces_is_cut_and_nothing_follows() -> None:
    assert run(("END",), "abE", "N", "Dxyz", "more") == (["ab", "", "", "", ""], True)


def test_what_only_began_like_a_stop_is_sent_late() -> None:
    assert run(("END",), "abE", "N", "Xyz") == (["ab", "", "ENXyz", ""], False)
    assert run(("END",), "abEN") == (["ab", "EN"], False)


def test_a_beginning_inside_a_beginning_is_not_missed() -> None:
    assert run(("aab",), "a", "a", "a", "b", "c") == (["", "", "a", "", "", ""], True)


def test_the_stop_that_is_complete_first_wins() -> None:
    assert run(("abcd", "bc"), "xabcd") == (["xa", ""], True)


def test_of_two_that_end_together_the_longer_wins() -> None:
    assert run(("b", "ab"), "xab") == (["x", ""], True)


@pytest.mark.parametrize("stop", ["x", "\n", "é", "🙂"])
def test_a_stop_of_one_character_holds_nothing_back(stop: str) -> None:
    assert run((stop,), "ab", f"c{stop}d") == (["ab", "c", ""], True)
