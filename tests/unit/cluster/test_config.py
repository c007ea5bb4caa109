"""The configuration file: what is wrong with it is said in sentences that name key, value, limit and fix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.config import ConfigError, load_config, parse_config
from cluster.ledger.location import ledger_path

MODEL = {"name": "m", "source": "null"}


def problems(raw: Mapping[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(dict(raw), origin="w.yaml")
    return str(caught.value).splitlines()


def in_model(**keys: object) -> list[str]:
    return problems({"models": [{**MODEL, **keys}]})


def test_a_mistake_in_a_model_is_one_line_and_does_not_blame_the_list() -> None:
    assert in_model(limits={"step_tokens": 3}) == [
        "w.yaml: models[0].limits.step_tokens: got 3; allowed: 16 or more"
    ]


def test_every_mistake_has_its_line() -> None:
    raw = {"models": [MODEL], "router": {"grpc_port": 99999}, "energy": {"meter": "guess"}}
    assert problems(raw) == [
        "w.yaml: router.grpc_port: got 99999; allowed: 65535 or less",
        "w.yaml: energy.meter: got 'guess'; allowed: 'auto', 'nvml', 'rapl', 'zeus', 'cpu-model' or 'fake'",
    ]


def test_an_unknown_key_comes_with_the_one_that_was_meant() -> None:
    assert problems({"models": [MODEL], "ruter": {}}) == [
        "w.yaml: ruter: unknown key; did you mean 'router'?"
    ]
    assert in_model(zzzz=1) == ["w.yaml: models[0].zzzz: unknown key; remove it"]


def test_our_own_rules_speak_for_themselves() -> None:
    assert problems({"models": [MODEL, MODEL]}) == [
        "w.yaml: models: name 'm' is used twice; give each model its own"
    ]
    assert in_model(replicas={"min": 3, "max": 2}) == [
        "w.yaml: models[0].replicas: max=2 is below min=3; raise max"
    ]
    assert in_model(source=None)[0].startswith("w.yaml: models[0].source: is empty; give a folder or hub id")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"parallel": {"expert": 2, "layout": "scatter"}},
            "models[0].parallel.layout: got 'scatter'; allowed: 'shared' or 'dispatch'",
        ),
        (
            {"parallel": {"tensor": 2, "expert": 2, "layout": "dispatch"}},
            "models[0].parallel: parallel.layout is 'dispatch' with tensor=2 and expert=2; it splits experts "
            "alone: set tensor to 1 and expert to the number of ranks, 2 or more",
        ),
        (
            {"device": "cuda", "parallel": {"expert": 2, "layout": "dispatch"}},
            "models[0]: parallel.layout dispatch and parallel.spare_experts run on CPU ranks only; "
            "set layout to shared and spare_experts to 0, or device to cpu",
        ),
        (
            {"attention": "varlen", "device": "cuda"},
            "models[0]: attention is 'varlen', but limits.block_tokens is 16; varlen reads pages of a "
            "multiple of 256 tokens: set it to 256 (or set attention to auto)",
        ),
        (
            {"parallel": {"tensor": 4, "hosts": 3}},
            "models[0].parallel: parallel.hosts=3 with 4 ranks: hosts have equally many; set hosts to one of "
            "1, 2, 4, or change tensor and expert",
        ),
        ({"parallel": {"tensor": "two"}}, "models[0].parallel.tensor: got 'two'; allowed: a whole number"),
        (
            {"limits": {"drain_s": float("nan")}},
            "models[0].limits.drain_s: got nan; allowed: a finite number",
        ),
        ({"limits": {"ready_timeout_s": float("inf")}}, "got inf; allowed: a finite number"),
        ({"limits": {"num_blocks": 1}}, "models[0].limits.num_blocks: got 1; allowed: 2 or more, or 0"),
        ({"limits": {"context_tokens": 4}}, "got 4; allowed: 16 or more, or 0 for what fits"),
        ({"name": "a b"}, "models[0].name: got 'a b'; allowed: letters, digits and . _ / -"),
        ({"limits": 3}, "models[0].limits: got 3; allowed: keys with values"),
        ({"kernels": False}, "allowed: 'auto', 'float32' or 'off'; put the word in quotes"),
    ],
    ids=str,
)
def test_a_wrong_value_is_shown_with_what_is_allowed(keys: dict[str, object], said: str) -> None:
    (line,) = in_model(**keys)
    assert said in line


@pytest.mark.parametrize("address", ["router", ":5", "router:0", "router:99999", "a..b:1", "http://x:1"])
def test_what_a_replica_cannot_dial_is_said_before_it_loads_a_model(address: str) -> None:
    good = ["router.example:50052", "[::1]:1", "10.0.0.7:65535", "unix:/run/link.sock"]
    assert parse_config({"models": [MODEL], "router": {"link_addresses": good}})
    assert problems({"models": [MODEL], "router": {"link_addresses": [*good, address]}}) == [
        f"w.yaml: router.link_addresses: {address!r} is not host:port; write e.g. router.example:50052"
    ]


def test_no_model_is_a_mistake_of_its_own() -> None:
    assert problems({"models": []}) == ["w.yaml: models: got []; allowed: 1 entries or more"]
    assert problems({"models": 3}) == ["w.yaml: models: got 3; allowed: a list; begin each entry with `- `"]


def test_a_file_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(path)


@pytest.mark.parametrize("content", ["models: []\nmodels: []", "models: [{name: a, limits: {}, limits: {}}]"])
def test_a_key_that_is_there_twice_is_a_mistake(tmp_path: Path, content: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"key '(models|limits)' is there twice; remove one"):
        load_config(path)


def test_what_only_calls_itself_a_mapping_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text("models: !!map [a]")
    with pytest.raises(ConfigError, match="is not YAML: expected a mapping node"):
        load_config(path)


def test_paths_are_relative_to_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "w.yaml"
    path.write_text('models: [{name: a, source: "null"}]\nledger: {path: books/l.db}\nruntime_dir: ~/run\n')
    config = load_config(path)
    assert ledger_path(config) == tmp_path / "books/l.db"
    assert config.runtime_dir == str(tmp_path / "home/run")
