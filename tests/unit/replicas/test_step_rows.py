"""The columns of a step record say what its members did, and columns that do not fit are refused."""

from __future__ import annotations

import pytest

from protos import wattline_rank_pb2 as rank_pb2
from replicas.request import StepMember, StepRows
from replicas.wire.steps import record_from_wire

MEMBERS = (
    StepMember(request_id=2**40, new_tokens=1, context_tokens=9, is_prefill=False),
    StepMember(request_id=5, new_tokens=7, context_tokens=16, is_prefill=True, wasted_tokens=3),
    StepMember(request_id=6, new_tokens=1, context_tokens=0, is_prefill=False, wasted_tokens=1),
)
COLUMN = bytes(16)


def test_rows_say_what_their_members_did() -> None:
    rows = StepRows.of(MEMBERS)
    assert rows.members() == MEMBERS
    assert [index for index, _ in rows.others] == [1, 2]
    assert (len(rows), rows.num_decoding, rows.num_new_tokens, rows.num_prompt_tokens) == (3, 2, 9, 7)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (rank_pb2.StepRecord(request_ids=COLUMN, context_tokens=COLUMN[:8]), "of 16 bytes"),
        (rank_pb2.StepRecord(request_ids=COLUMN[:9], context_tokens=COLUMN[:9]), "give 8 of both"),
        (
            rank_pb2.StepRecord(
                request_ids=COLUMN, context_tokens=COLUMN, others=[rank_pb2.OtherMember(index=2)]
            ),
            "others.index=2: there are 2 members",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(record: rank_pb2.StepRecord, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        record_from_wire(record)
