"""One step: its tokens, its load, and who was in the forward pass."""

from __future__ import annotations

from protos import wattline_link_pb2 as link_pb2
from protos import wattline_rank_pb2 as rank_pb2
from replicas.request import StepMember, StepRecord
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
        record=None if report.record is None else _record_to_wire(report.record),
        cache=cache_to_wire(report.cache),
    )


def report_from_wire(message: rank_pb2.StepFrame) -> StepReport:
    return StepReport(
        step=message.output.step,
        tokens=columns_from_wire(message.output.tokens),
        deltas=tuple([delta_from_wire(delta) for delta in message.output.deltas]),
        load=load_from_wire(message.output.load),
        record=_record_from_wire(message.record) if message.HasField("record") else None,
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


def _record_to_wire(record: StepRecord) -> rank_pb2.StepRecord:
    members = record.members
    return rank_pb2.StepRecord(
        step=record.step,
        start_ns=record.start_ns,
        end_ns=record.end_ns,
        request_ids=[member.request_id for member in members],
        new_tokens=[member.new_tokens for member in members],
        context_tokens=[member.context_tokens for member in members],
        is_prefill=[member.is_prefill for member in members],
        wasted_tokens=[member.wasted_tokens for member in members],
        experts_hit=record.experts_hit,
    )


def _record_from_wire(message: rank_pb2.StepRecord) -> StepRecord:
    columns = zip(
        message.request_ids,
        message.new_tokens,
        message.context_tokens,
        message.is_prefill,
        message.wasted_tokens,
        strict=True,
    )
    return StepRecord(
        step=message.step,
        start_ns=message.start_ns,
        end_ns=message.end_ns,
        members=tuple(map(StepMember._make, columns)),
        experts_hit=message.experts_hit,
    )
