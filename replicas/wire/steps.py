"""One step: its tokens, its load, and who was in the forward pass."""

from __future__ import annotations

from protos import wattline_link_pb2 as link_pb2
from protos import wattline_rank_pb2 as rank_pb2
from replicas.request import ROW_BYTES, StepMember, StepRecord, StepRows
from replicas.step_report import StepReport, TokenColumns
from replicas.wire.caches import cache_from_wire, cache_to_wire
from replicas.wire.deltas import delta_from_wire, delta_to_wire
from replicas.wire.loads import load_from_wire, load_to_wire


def report_to_wire(report: StepReport) -> rank_pb2.StepFrame:
    return rank_pb2.StepFrame(
        output=link_pb2.StepOutput(
            step=report.step,
            tokens=columns_to_wire(report.tokens),
            deltas=[delta_to_wire(delta) for delta in report.deltas],
            load=load_to_wire(report.load),
        ),
        record=None if report.record is None else record_to_wire(report.record),
        cache=cache_to_wire(report.cache),
    )


def report_from_wire(message: rank_pb2.StepFrame) -> StepReport:
    return StepReport(
        step=message.output.step,
        tokens=columns_from_wire(message.output.tokens),
        deltas=tuple([delta_from_wire(delta) for delta in message.output.deltas]),
        load=load_from_wire(message.output.load),
        record=record_from_wire(message.record) if message.HasField("record") else None,
        cache=cache_from_wire(message.cache),
    )


def columns_to_wire(tokens: TokenColumns) -> link_pb2.TokenColumns | None:
    """None where there are none."""
    if not tokens:
        return None
    return link_pb2.TokenColumns(
        request_ids=tokens.request_ids,
        attempts=tokens.attempts,
        first_offsets=tokens.first_offsets,
        counts=tokens.counts,
        token_ids=tokens.token_ids,
    )


def columns_from_wire(message: link_pb2.TokenColumns) -> TokenColumns:
    """The columns may be of different lengths, if whoever wrote them is not of this house."""
    return TokenColumns(
        request_ids=message.request_ids[:],
        attempts=message.attempts[:],
        first_offsets=message.first_offsets[:],
        counts=message.counts[:],
        token_ids=message.token_ids[:],
    )


def record_to_wire(record: StepRecord) -> rank_pb2.StepRecord:
    return rank_pb2.StepRecord(
        step=record.step,
        start_ns=record.start_ns,
        end_ns=record.end_ns,
        request_ids=record.rows.request_ids,
        context_tokens=record.rows.context_tokens,
        others=[
            rank_pb2.OtherMember(
                index=index,
                new_tokens=member.new_tokens,
                is_prefill=member.is_prefill,
                wasted_tokens=member.wasted_tokens,
            )
            for index, member in record.rows.others
        ],
        experts_hit=record.experts_hit,
    )


def record_from_wire(message: rank_pb2.StepRecord) -> StepRecord:
    """ValueError: the columns are not parallel, or name a member that is not in them."""
    ids, contexts = message.request_ids, message.context_tokens
    if len(ids) != len(contexts) or len(ids) % ROW_BYTES:
        raise ValueError(
            f"request_ids of {len(ids)} bytes, context_tokens of {len(contexts)}: "
            f"give {ROW_BYTES} of both for each member"
        )
    rows = StepRows(request_ids=ids, context_tokens=contexts)
    if message.others:
        others = tuple([_other_from_wire(rows, other) for other in message.others])
        rows = StepRows(request_ids=ids, context_tokens=contexts, others=others)
    return StepRecord(
        step=message.step,
        start_ns=message.start_ns,
        end_ns=message.end_ns,
        rows=rows,
        experts_hit=message.experts_hit,
    )


def _other_from_wire(rows: StepRows, other: rank_pb2.OtherMember) -> tuple[int, StepMember]:
    index = other.index
    if index >= len(rows):
        raise ValueError(f"others.index={index}: there are {len(rows)} members, counted from 0")
    return index, StepMember(
        request_id=rows.ids[index],
        new_tokens=other.new_tokens,
        context_tokens=rows.contexts[index],
        is_prefill=other.is_prefill,
        wasted_tokens=other.wasted_tokens,
    )
