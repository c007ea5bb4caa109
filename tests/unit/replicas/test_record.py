"""Records: what a frozen slotted dataclass gives, but the check of assignments."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from replicas.record import record


@record
class Place:
    row: int
    tokens: tuple[int, ...] = ()


def test_a_record_is_compared_and_hashed_by_its_values() -> None:
    assert Place(row=1) == Place(row=1, tokens=())
    assert {Place(row=1), Place(row=1), Place(row=2)} == {Place(row=2), Place(row=1)}
    assert replace(Place(row=1), row=3) == Place(row=3)


def test_a_record_takes_keywords_alone_and_no_other_attribute() -> None:
    assert [one.name for one in fields(Place)] == ["row", "tokens"]
    assert not hasattr(Place(row=1), "__dict__")
    with pytest.raises(TypeError):
        Place(1)  # type: ignore[call-arg]
