"""Tokens in columns say what the deltas of a step said, and columns that do not fit are refused."""

from __future__ import annotations

import pytest

from replicas.request import FinishReason, LoadSnapshot, SequenceDelta, StepResult, TokenLogprobs
from replicas.step_report import TokenColumns, report_of

LOAD = LoadSnapshot(
    step=1, running=(1,), waiting=(0,), waiting_prefill_tokens=(0,), free_blocks=(1,), total_blocks=(1,)
)


def make_delta(request_id: int, *token_ids: int, finish: FinishReason | None = None) -> SequenceDelta:
    return SequenceDelta(request_id=request_id, attempt=2, first_offset=5, token_ids=token_ids, finish=finish)


def test_only_those_that_say_more_than_tokens_stay_deltas() -> None:
    plain, pair = make_delta(1, 7), make_delta(2, 8, 9)
    end = make_delta(3, 4, finish=FinishReason.LENGTH)
    said = SequenceDelta(
        request_id=4, attempt=0, first_offset=0, token_ids=(5,), logprobs=(TokenLogprobs(logprob=-1.0),)
    )
    report = report_of(StepResult(step=1, deltas=(plain, end, pair, said), load=LOAD, record=None))
    assert report.deltas == (end, said)
    assert list(report.tokens.runs()) == [(1, 2, 5, (7,)), (2, 2, 5, (8, 9))]
    assert report.all_deltas() == [plain, pair, end, said]
    assert report.num_tokens == 5


def test_one_token_each_needs_no_counts() -> None:
    columns = TokenColumns.of([(1, 0, 0, (7,)), (2, 0, 3, (8,))])
    assert columns.counts == []
    assert list(columns.runs()) == [(1, 0, 0, (7,)), (2, 0, 3, (8,))]


@pytest.mark.parametrize(
    "columns",
    [
        TokenColumns(request_ids=[1], attempts=[0], first_offsets=[0], token_ids=[7, 8]),
        TokenColumns(request_ids=[1], attempts=[], first_offsets=[0], token_ids=[7]),
        TokenColumns(request_ids=[1], attempts=[0], first_offsets=[0], counts=[2], token_ids=[7]),
        TokenColumns(request_ids=[1], attempts=[0], first_offsets=[0], counts=[1, 1], token_ids=[7, 8]),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: TokenColumns) -> None:
    with pytest.raises(ValueError):
        list(columns.runs())
