"""What the ledger store and its readers take: any bytes as a batch, kept and given back as they were."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from google.protobuf.message import DecodeError

from cluster.ledger.bounds import MAX_TIME_S, problem_of
from cluster.ledger.database import Database
from cluster.ledger.formats import report_to_csv, requests_to_jsonl, to_mlperf
from cluster.ledger.otlp import to_otlp
from cluster.ledger.report import Group, Site, make_report
from cluster.ledger.wire import (
    replica_from_wire,
    replica_to_wire,
    request_from_wire,
    request_to_wire,
    summary_from_wire,
    summary_to_wire,
)
from protos import wattline_ledger_pb2 as pb
from tests.ledger_entries import make_entry, make_replica_sums

RECORD = pb.RecordRequest(
    router_id="r",
    requests=[
        request_to_wire(make_entry("a")),
        request_to_wire(make_entry("b", outcome="cancelled", energy=None)),
    ],
    replicas=[replica_to_wire(make_replica_sums(source="tdp"))],
)
SUMMARY = pb.SummarizeResponse(
    requests=[pb.RequestSums(tenant="acme", model="m", source="counter", num_requests=1, output_tokens=7)],
    models=[pb.ModelSums(model="m", source="counter", meter_mj=9, idle_mj=9)],
)
SITE = Site(pue=1.2, carbon_g_per_kwh=300.0)


def fuzz_batch(content: bytes) -> None:
    """What is taken can be summed up and listed, and is what was sent."""
    with suppress(DecodeError):
        record = pb.RecordRequest.FromString(content)
        requests = [one for one in map(request_from_wire, record.requests) if problem_of(one) is None]
        replicas = [one for one in map(replica_from_wire, record.replicas) if problem_of(one) is None]
        with TemporaryDirectory(prefix="wl-") as folder:
            database = Database(Path(folder) / "ledger.db")
            num_new = database.record(requests, replicas)
            summary = database.summarize(since_s=0.0, until_s=MAX_TIME_S + 1.0)
            listed = list(database.list_requests(since_s=0.0, until_s=MAX_TIME_S + 1.0))
            database.close()
        known = {one.request_id: one for one in reversed(requests)}
        assert {one.request_id: one for one in listed} == known
        assert num_new == len(known) == sum(one.num_requests for one in summary.requests)
        assert summary_from_wire(summary_to_wire(summary)) == summary
        assert [request_from_wire(request_to_wire(one)) for one in listed] == listed


def fuzz_summary(content: bytes) -> None:
    """Whatever a store says can be reported, in every shape."""
    with suppress(DecodeError):
        summary = summary_from_wire(pb.SummarizeResponse.FromString(content))
        for group in Group:
            report = make_report(summary, by=group, site=SITE, since_s=0.0, until_s=1e9)
            report_to_csv(report)
            to_mlperf(report)
        to_otlp(summary, since_s=0.0, until_s=1e9)


def fuzz_listed(content: bytes) -> None:
    with suppress(DecodeError):
        list(requests_to_jsonl(map(request_from_wire, pb.ClosedRequests.FromString(content).requests)))
