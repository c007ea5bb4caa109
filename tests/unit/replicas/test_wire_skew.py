"""Routers and replicas of neighbouring versions talk: what one does not know, it does not mistake."""

from __future__ import annotations

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

from protos import wattline_link_pb2 as link
from replicas.wire.deltas import timing_from_wire

TRAIL = link.StepTrail(first_step=5, first_token_step=6, last_step=9, prefill_steps=2, decode_steps=3)


def timed(trail: link.StepTrail | None) -> link.SequenceDelta:
    timing = link.SequenceTiming(queue_us=1, decode_us=2, preemptions=3, trail=trail)
    return link.SequenceDelta(request_id=7, token_ids=[1, 2], timing=timing)


def older_delta(content: bytes) -> Message:
    """As a reader understands it whose link protocol has no trail."""
    protocol = descriptor_pb2.FileDescriptorProto()
    link.DESCRIPTOR.CopyToProto(protocol)
    (timing,) = (one for one in protocol.message_type if one.name == "SequenceTiming")
    (trail,) = (field for field in timing.field if field.name == "trail")
    timing.field.remove(trail)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(protocol)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("wattline.v1.SequenceDelta"))
    return kind.FromString(content)


def test_an_older_router_reads_all_but_the_trail() -> None:
    read = older_delta(timed(TRAIL).SerializeToString())
    read.DiscardUnknownFields()
    assert read.SerializeToString() == timed(None).SerializeToString()


def test_an_older_replicas_times_have_no_trail() -> None:
    timing = timing_from_wire(timed(None))
    assert timing is not None and timing.trail is None
    newer = timing_from_wire(timed(TRAIL))
    assert newer is not None and newer.trail is not None
