"""What a ledger says of itself up the link: whole millijoules, split by phase, that add up and never fall."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protos.wattline_link_pb2 import FromReplica
from replicas.energy.ledger import Ledger
from replicas.energy.meter import Reading, Source
from replicas.link.codec import add_ledger
from replicas.link.messages import LedgerState
from replicas.request import EngineCosts, StepMember, StepRecord, StepRows
from replicas.supervisor.energy_account import EnergySums

MS = 1_000_000
COSTS = EngineCosts(
    active_params=1_000_000,
    shared_weight_bytes=2_000_000,
    expert_bytes=0,
    num_layers=2,
    attention_dim=64,
    kv_bytes_per_token=256,
)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5000)), max_size=40))
def test_prefill_and_decode_are_all_that_requests_took(windows: list[tuple[bool, bool, int]]) -> None:
    ledger = Ledger(costs=COSTS, idle_power_w=0.0)
    ledger.add_reading(Reading(t_ns=0, energy_mj=0, source=Source.COUNTER))
    meter_mj = 0
    before = ledger.totals()
    for number, (has_prefill, has_decode, new_mj) in enumerate(windows):
        start_ns = number * 10 * MS
        phases = [True] * has_prefill + [False] * has_decode
        members = tuple(
            StepMember(request_id=index + 1, new_tokens=9 if phase else 1, context_tokens=8, is_prefill=phase)
            for index, phase in enumerate(phases)
        )
        ledger.add_step(
            StepRecord(step=number, start_ns=start_ns, end_ns=start_ns + 9 * MS, rows=StepRows.of(members))
        )
        meter_mj += new_mj
        ledger.add_reading(Reading(t_ns=start_ns + 10 * MS, energy_mj=meter_mj, source=Source.COUNTER))
        ledger.advance(start_ns + 10 * MS)
        now = ledger.totals()
        assert now.requests_mj - now.prefill_mj >= before.requests_mj - before.prefill_mj
        assert now.requests_mj + now.idle_mj + now.unattributed_mj == now.meter_mj
        assert now.static_mj <= now.requests_mj
        for name in ("prefill_mj", "static_mj", "wasted_mj", "meter_mj", "closed_until_ns"):
            assert getattr(now, name) >= getattr(before, name)
        before = now


def test_the_sums_go_up_the_link_by_source_with_their_confidence() -> None:
    sums = EnergySums(request_mj=30, idle_mj=5, unattributed_mj=1, meter_mj=36, prefill_mj=10, static_mj=4)
    message = FromReplica()
    add_ledger(message, LedgerState(until_ns=7, sums={Source.TDP: sums}, agent_metrics_addresses=("host:9",)))
    (entry,) = message.ledger
    assert list(message.agent_metrics_addresses) == ["host:9"]
    assert (entry.until_ns, entry.source, entry.confidence_factor) == (7, "tdp", 2.0)
    assert (entry.prefill_mj, entry.decode_mj, entry.idle_mj, entry.unattributed_mj) == (10, 20, 5, 1)
    assert (entry.meter_mj, entry.static_mj, entry.wasted_mj) == (36, 4, 0)


def test_before_the_meter_spoke_nothing_is_said() -> None:
    message = FromReplica()
    add_ledger(message, None)
    assert message == FromReplica()
