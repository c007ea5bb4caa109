"""Joules of a request: provisional, then final once; remembered for the last requests only."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.config import ModelSection
from cluster.energy.account import EnergyAccount, RequestEnergy
from cluster.energy.ledger_book import LedgerSums, ReplicaLedger
from cluster.energy.rates import LAST_REQUESTS, EnergyRate, TokenRate
from cluster.request.answer import Usage
from cluster.request.errors import UnknownRequest
from cluster.router.energy_record import EnergyRecord, FinishedRequest
from cluster.router.wire import energy_message, energy_trailers
from cluster.served_model import ServedModel
from cluster.text.null_tokenizer import NullTokenizer
from protos import wattline_inference_pb2 as pb

USAGE = Usage(prompt_tokens=6, cached_tokens=0, completion_tokens=4, wasted_tokens=0)
PROVISIONAL = RequestEnergy(
    prefill_mj=1000,
    decode_mj=2000,
    static_mj=500,
    wasted_mj=0,
    source="counter",
    method="step-ledger/1",
    window_ms=30.0,
    confidence_factor=1.05,
    is_final=False,
)
FINAL = replace(PROVISIONAL, decode_mj=3000, is_final=True)


def make_finished(request_id: str) -> FinishedRequest:
    return FinishedRequest(request_id=request_id, model="m", usage=USAGE, account=EnergyAccount())


def test_the_record_forgets_what_was_longest_not_asked_for() -> None:
    record = EnergyRecord(2)
    record.add(make_finished("a"))
    record.add(make_finished("b"))
    record.find("a")
    record.add(make_finished("c"))
    assert (len(record), record.find("a").request_id, record.find("c").request_id) == (2, "a", "c")
    with pytest.raises(UnknownRequest):
        record.find("b")


async def test_final_joules_settle_an_account_once() -> None:
    account = EnergyAccount()
    settled: list[RequestEnergy | None] = []
    account.when_settled(lambda: settled.append(account.energy))
    account.update(PROVISIONAL)
    assert (account.energy, account.is_settled, settled) == (PROVISIONAL, False, [])
    account.update(FINAL)
    account.update(PROVISIONAL)
    account.settle()
    assert (account.energy, account.is_final, settled) == (FINAL, True, [FINAL])
    account.when_settled(lambda: settled.append(None))
    assert settled == [FINAL, None]


async def test_a_wait_ends_with_the_final_joules_or_in_time() -> None:
    account = EnergyAccount()
    await account.wait(0.001)
    asyncio.get_running_loop().call_soon(account.update, FINAL)
    await account.wait(60.0)
    assert account.is_final


def test_joules_on_the_wire_are_per_token_too() -> None:
    message = energy_message(FINAL, USAGE, is_settled=True)
    assert (message.total_j, message.prefill_j, message.decode_j, message.static_j) == (4.0, 1.0, 3.0, 0.5)
    assert (message.joules_per_output_token, message.joules_per_total_token) == (1.0, 0.4)
    assert message.state == pb.ENERGY_STATE_FINAL
    assert energy_trailers(FINAL, is_settled=True) == (
        ("wattline-energy-state", "final"),
        ("wattline-energy-joules", "4.000"),
        ("wattline-energy-source", "counter"),
    )


def test_unknown_joules_are_unset_everywhere() -> None:
    message = energy_message(None, USAGE, is_settled=False)
    assert not any(message.HasField(name) for name in ("total_j", "joules_per_output_token"))
    assert energy_trailers(None, is_settled=False) == (("wattline-energy-state", "provisional"),)


def test_joules_that_will_never_be_known_are_not_called_provisional() -> None:
    assert energy_message(None, USAGE, is_settled=True) == pb.Energy(state=pb.ENERGY_STATE_UNSPECIFIED)
    assert energy_trailers(None, is_settled=True) == (("wattline-energy-state", "unknown"),)


def test_no_tokens_no_joules_per_token() -> None:
    message = energy_message(FINAL, replace(USAGE, completion_tokens=0), is_settled=True)
    assert not message.HasField("joules_per_output_token")
    assert message.joules_per_total_token == pytest.approx(4.0 / 6)


def test_token_rate_is_over_the_last_ten_seconds() -> None:
    rate = TokenRate()
    assert rate.per_second(now_s=100.0) == 0.0
    for second in range(100, 120):
        rate.add(50, now_s=second + 0.25)
        rate.add(50, now_s=second + 0.75)
    assert rate.per_second(now_s=120.0 - 1e-9) == pytest.approx(100.0)
    assert rate.per_second(now_s=200.0) == 0.0


def test_the_source_that_is_shown_is_the_one_that_counts() -> None:
    section = ModelSection(name="m", source="null")
    model = ServedModel(section, NullTokenizer(vocab_size=8), max_prompt_bytes=8)
    assert model.energy_source((), now_s=0.0) == ""
    assert model.energy_source(("", "counter"), now_s=0.0) == "counter"
    for source in ("counter", "power_integrated"):
        for second in (1, 2):
            sums = {source: LedgerSums(meter_mj=second, idle_mj=second)}
            book = ReplicaLedger(
                replica_id=source, epoch=1, until_ns=second * 10**9, sums=sums, confidence_factors={}
            )
            model.ledger.add(book, now_s=10.0 if source == "counter" else 20.0)
    assert model.energy_source((), now_s=12.0) == "counter"
    model.add_energy(FINAL, output_tokens=4)
    assert model.energy_source((), now_s=20.0) == "power_integrated"
    assert model.energy_source((), now_s=90.0) == "counter"


def test_energy_rate_is_a_ratio_of_sums_of_one_source() -> None:
    rate = EnergyRate()
    first = rate.joules_per_output_token
    assert first is None
    rate.add(energy_mj=1000, output_tokens=1, source="tdp")
    for _ in range(LAST_REQUESTS):
        rate.add(energy_mj=3000, output_tokens=2, source="counter")
    assert (rate.joules_per_output_token, rate.source) == (1.5, "counter")
