"""The command line teaches, answers at once, and says what is wrong in one sentence."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app, main
from cluster.command_error import CommandError
from cluster.commands.options import pick_model
from cluster.commands.sampling_options import parse_logit_bias
from cluster.config import Config
from cluster.servers.event_loop import GrpcEventLoop

COMMANDS = ("demo", "up", "down", "status", "chat", "generate", "router", "agent")


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["wattline", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_help_names_every_command_and_shows_examples() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    assert all(command in text for command in COMMANDS)
    assert "wattline demo" in text


@pytest.mark.parametrize("command", ["up", "down", "roll", "router", "ledger"])
def test_a_configuration_that_is_named_has_to_be_there(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, command, "-f", "nowhere.yaml") == 1
    assert capsys.readouterr().err.strip() == (
        "wattline: nowhere.yaml: cannot be read (No such file or directory); give a file with -f"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "usage:" in result.output.lower()


def test_help_imports_nothing_slow() -> None:
    slow = "ray torch grpc transformers pydantic psutil rich.table"
    script = f"import sys, cluster.cli; print([name for name in {slow.split()!r} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_version_is_the_package_s() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.startswith("wattline 0.")


def test_an_unknown_key_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "w.yaml"
    path.write_text('models: [{name: m, source: "null"}]\nruter: {}\n')
    assert run_main(monkeypatch, "up", "-f", str(path)) == 1
    assert "ruter: unknown key" in capsys.readouterr().err


def test_no_router_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "status", "--address", "127.0.0.1:1") == 1
    assert "no router at 127.0.0.1:1; start one with `wattline up" in capsys.readouterr().err


def test_down_without_a_stack_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WATTLINE_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "down") == 1
    assert f"nothing runs in {tmp_path}" in capsys.readouterr().err


def test_a_router_by_itself_runs_in_a_router_s_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def run_router(config: Config, *, addresses_path: Path | None = None) -> None:
        loops.append(asyncio.get_running_loop())

    monkeypatch.setattr("cluster.edge.serve.run_router", run_router)
    (tmp_path / "w.yaml").write_text('models: [{name: tiny, source: "null"}]')
    assert CliRunner().invoke(app, ["router", "-f", str(tmp_path / "w.yaml")]).exit_code == 0
    assert isinstance(loops[0], GrpcEventLoop)


def test_a_wrong_option_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, "chat", "--tempreture", "1") == 2


@pytest.mark.parametrize("option", [("--seed", str(2**64)), ("--max-tokens", str(2**32))])
def test_a_number_no_request_can_hold_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, option: tuple[str, str]
) -> None:
    assert run_main(monkeypatch, "generate", "hi", *option, "--address", "127.0.0.1:1") == 2


@pytest.mark.parametrize("pair", ["7", "seven=1", "7=much", "-1=2", f"{2**32}=1"])
def test_a_logit_bias_that_is_none_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pair: str
) -> None:
    assert run_main(monkeypatch, "generate", "hi", "--logit-bias", pair, "--address", "127.0.0.1:1") == 1
    assert f"--logit-bias {pair!r}" in capsys.readouterr().err


def test_logit_biases_are_token_and_bias() -> None:
    assert parse_logit_bias(["7=-100", "0=0.5"]) == {7: -100.0, 0: 0.5}


def test_a_conversation_has_no_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "chat", "--choices", "2", "--address", "127.0.0.1:1") == 1
    assert "a conversation goes on from one answer" in capsys.readouterr().err


def test_the_only_model_needs_no_name() -> None:
    assert pick_model(["a"], "") == "a"
    assert pick_model(["a", "b"], "b") == "b"
    with pytest.raises(CommandError, match="say which model with --model; served: a, b"):
        pick_model(["a", "b"], "")
