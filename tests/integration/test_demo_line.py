"""The whole line with the real demonstration models: sharded mathematics, text, joules, load and faults.

One `wattline up` of `examples/demo.yaml` on free ports; the tests run in order, the last one ends it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.client import Ask, CallError, Client
from cluster.replies import Delta, Final
from tests.demo_corpus import DEMO_MODELS, EXAMPLES_DIR, Pair, read_pairs
from tests.mixed_load import LoadReport, Question, ask_alone, run_mixed_load
from tests.running_up import Running, running_up, wait_gone, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

NUM_STREAMS = 64
SHORT_LOAD_S = 8.0
SOAK_LOAD_S = 60.0
NUM_QUESTIONS = 24
RECOVERY_TIMEOUT_S = 150.0

logger = logging.getLogger(__name__)


def make_config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = yaml.safe_load((EXAMPLES_DIR / "demo.yaml").read_text(encoding="utf-8"))
    models = config["models"]
    assert isinstance(models, list)
    for model in models:
        model["source"] = str(EXAMPLES_DIR / model["source"])
    ports = {"grpc_port": 0, "http_port": 0, "link_port": 0}
    return config | {"router": ports, "runtime_dir": str(folder)}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with running_up(make_config) as up:
        yield up


def answer(client: Client, model: str, pair: Pair) -> tuple[str, Final]:
    *deltas, final = client.chat(model, pair.messages, Ask(temperature=0.0, energy_wait_ms=0))
    assert isinstance(final, Final)
    return "".join(one.text for one in deltas if isinstance(one, Delta)), final


@pytest.mark.parametrize("model", DEMO_MODELS)
def test_every_pair_is_answered_exactly_by_sharded_ranks(running: Running, model: str) -> None:
    pairs = read_pairs()
    assert len(pairs) >= 150
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda pair: answer(running.client, model, pair)[0], pairs))
    assert answers == [pair.assistant for pair in pairs]


def test_an_answer_carries_its_measured_joules_and_its_trace(running: Running) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    *_, final = running.client.chat(
        "llama-demo", [("user", "What is a joule?")], Ask(temperature=0.0, energy_wait_ms=1000)
    )
    assert isinstance(final, Final)
    energy = running.final_energy(final)
    assert energy.source == "tdp"
    assert energy.confidence_factor == 2.0
    assert energy.total_j is not None
    assert energy.prefill_j is not None
    assert energy.decode_j is not None
    assert energy.total_j > 0
    assert energy.total_j == pytest.approx(energy.prefill_j + energy.decode_j, abs=0.0015)
    assert energy.joules_per_output_token == pytest.approx(energy.total_j / final.usage.completion_tokens)
    assert len(final.trace_id) == len(trace_id)


def test_the_energy_agent_that_replicas_started_is_listed_and_shows_its_meters(running: Running) -> None:
    def agents() -> list[str]:
        with urllib.request.urlopen(f"http://{running.state.http}/metrics/targets", timeout=60) as answered:
            groups = json.load(answered)
        return [group["targets"][0] for group in groups if group["labels"].get("job") == "wattline-agent"]

    wait_until(lambda: bool(agents()), RECOVERY_TIMEOUT_S, "an agent among the targets")
    (address,) = agents()

    def are_both_metered() -> bool:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answered:
            text = answered.read().decode()
        pattern = r'wattline_meter_state{hw_id="%s[^"]*",state="ok"} 1\.0'
        return all(re.search(pattern % model, text) for model in DEMO_MODELS)

    wait_until(are_both_metered, RECOVERY_TIMEOUT_S, "a meter of each model")


def test_a_client_written_from_reflection_lists_models_and_streams_a_chat(running: Running) -> None:
    command = [sys.executable, str(EXAMPLES_DIR / "reflection_client.py"), "What is a watt?"]
    command += ["--address", running.state.grpc]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=RECOVERY_TIMEOUT_S, check=True)
    assert "granite-moe-demo" in ran.stdout
    assert "A watt is the unit of power: one joule of energy every second." in ran.stdout
    assert "total_j" in ran.stdout


def make_questions(address: str) -> list[Question]:
    """Prompts of many lengths, with what each yields when sent alone."""
    with Client(address) as client:
        prompts = [
            (model, client.tokenize_chat(model, pair.messages))
            for model in DEMO_MODELS
            for pair in read_pairs()[: NUM_QUESTIONS // len(DEMO_MODELS)]
        ]

    async def ask_all() -> list[Question]:
        # Short answers to short prompts, long ones to long prompts, and everything between.
        return [
            await ask_alone(address, model, ids, max_tokens=1 + index * 3)
            for index, (model, ids) in enumerate(prompts)
        ]

    return asyncio.run(ask_all())


def check_load(running: Running, duration_s: float, seed: int) -> LoadReport:
    """Run the load, then look for what it may have left behind."""
    address = running.state.grpc
    questions = make_questions(address)
    report = asyncio.run(
        run_mixed_load(address, questions, num_streams=NUM_STREAMS, duration_s=duration_s, seed=seed)
    )
    logger.info("measured mixed_load %s tokens=%d", dict(report.endings), report.tokens)
    assert report.faults == []
    assert {"WHOLE:OK", "CANCEL:CANCELLED", "DEADLINE:DEADLINE_EXCEEDED"} <= set(report.endings)
    wait_until(lambda: is_idle(running), RECOVERY_TIMEOUT_S, "the end of every request, and free KV blocks")
    for model in running.client.status().models:
        for replica in model.replicas:
            ledger = read_ledger(replica.metrics_address)
            assert ledger["request"] > 0
            assert ledger["request"] + ledger["idle"] + ledger["unattributed"] == ledger["meter"]
    return report


def is_idle(running: Running) -> bool:
    """Whoever hung up may be gone before the router and the engine have noticed."""
    return all(
        (model.active_requests, model.waiting_requests, replica.requests_in_flight) == (0, 0, 0)
        and replica.free_blocks == replica.total_blocks
        for model in running.client.status().models
        for replica in model.replicas
    )


def read_ledger(metrics_address: str) -> dict[str, int]:
    """The exact millijoules of one replica, by where they went."""
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=60) as response:
        text = response.read().decode()
    return {
        sample.labels["ledger"]: int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "wattline_ledger_millijoules"
    }


def test_mixed_load_ends_every_stream_once_and_leaks_nothing(running: Running) -> None:
    check_load(running, SHORT_LOAD_S, seed=1)


@pytest.mark.soak
def test_a_minute_of_mixed_load_ends_every_stream_once_and_leaks_nothing(running: Running) -> None:
    check_load(running, SOAK_LOAD_S, seed=2)


def test_a_killed_rank_of_a_real_model_is_replaced_and_answers_the_same(running: Running) -> None:
    pair = read_pairs()[2]
    lost = running.replica("llama-demo")
    ask = Ask(max_tokens=1500, ignore_eos=True, resume=False)
    stream = running.client.generate("llama-demo", "Count: ", ask)
    next(stream)
    killed_s = time.monotonic()
    os.kill(lost.ranks[1].pid, signal.SIGKILL)
    with pytest.raises(CallError) as caught:
        list(stream)
    assert caught.value.code == "UNAVAILABLE"
    told_s = time.monotonic() - killed_s

    def is_serving() -> bool:
        try:
            return answer(running.client, "llama-demo", pair)[0] == pair.assistant
        except CallError as error:
            assert error.code == "UNAVAILABLE"
            return False

    wait_until(is_serving, RECOVERY_TIMEOUT_S, "the replica's return")
    logger.info("measured told_s=%.3f recovery_s=%.1f", told_s, time.monotonic() - killed_s)
    assert answer(running.client, "granite-moe-demo", pair)[0] == pair.assistant


def test_ctrl_c_leaves_no_process_no_shared_memory_and_no_port(running: Running) -> None:
    family = running.process.children(recursive=True)
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(timeout=RECOVERY_TIMEOUT_S) == 0
    wait_gone(family)
    assert not running.folder.shared_dir.exists()
    with pytest.raises(CallError, match="no router at"):
        running.client.status(timeout_s=1.0)
