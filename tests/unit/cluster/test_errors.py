"""The table of errors: every one has a status, and the details that its callers can act on."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from cluster.request import errors
from cluster.request.errors import STATUS_CODES, RouterError, engine_error, status_of


def make_errors() -> list[RouterError]:
    return [
        errors.InvalidRequest(field="a.b", got=1, limit="2 to 3", fix="choose"),
        errors.Unauthenticated("no key"),
        errors.NotAllowed("not yours"),
        errors.UnknownModel(field="model", name="z", served=("x", "y")),
        errors.ResumeRefused("of another request"),
        errors.UnknownRequest("gone"),
        errors.UnknownReplica("gone"),
        errors.Overloaded("full", retry_after_ms=70),
        errors.LimitReached("spent", tenant="t", retry_after_ms=70),
        errors.SlowConsumer(limit_bytes=10),
        errors.NoReplica("none"),
        errors.ReplicaStopped(),
        errors.FailoverSpent("enough"),
        errors.Quarantined(),
        errors.DeadlinePassed(),
        errors.EngineFault("fault"),
    ]


def test_every_error_has_a_line_in_the_table() -> None:
    assert {type(error) for error in make_errors()} == set(STATUS_CODES) == set(RouterError.__subclasses__())


@pytest.mark.parametrize("error", make_errors(), ids=lambda error: type(error).__name__)
def test_status_and_details_agree(error: RouterError) -> None:
    status = status_of(error)
    packed = status_pb2.Status.FromString(dict(status.trailers)["grpc-status-details-bin"])
    assert (packed.code, packed.message) == (status.code.value[0], str(error))
    assert status.message == str(error)


def test_a_bad_field_is_in_the_details() -> None:
    status = status_of(errors.InvalidRequest(field="a.b", got=1, limit="2 to 3", fix="choose"))
    packed = status_pb2.Status.FromString(dict(status.trailers)["grpc-status-details-bin"])
    bad = error_details_pb2.BadRequest.FromString(packed.details[0].value)
    assert status.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (bad.field_violations[0].field, bad.field_violations[0].description) == (
        "a.b",
        "a.b: got 1; allowed: 2 to 3; choose",
    )


def test_only_exhaustion_pushes_back() -> None:
    assert (
        dict(status_of(errors.Overloaded("x", retry_after_ms=70)).trailers)["grpc-retry-pushback-ms"] == "70"
    )
    assert dict(status_of(errors.SlowConsumer(limit_bytes=1)).trailers)["grpc-retry-pushback-ms"] == "-1"
    assert "grpc-retry-pushback-ms" not in dict(status_of(errors.NoReplica("x")).trailers)


def test_an_unknown_engine_code_is_a_fault_without_details() -> None:
    assert str(engine_error("SEGFAULT", "rank 3 at 0xdead")) == "the engine failed this request"
