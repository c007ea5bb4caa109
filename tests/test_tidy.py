"""The style as a test: sizes, forbidden words, module docstrings, where protobuf code may be imported."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cluster", "replicas", "autoscale", "protos")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FORBIDDEN_FILE_NAMES = {"utils.py", "common.py", "helpers.py", "manager.py", "misc.py"}
MARKS = re.compile(r"\b(TODO(?!\(#\d+\))|FIXME|XXX|HACK)\b")

# Where bytes become domain objects. A new name here needs a reason.
PROTOBUF_EDGES = {
    "cluster/client.py",
    "cluster/commands/story_screen.py",
    "cluster/resuming.py",
    "cluster/foreign/sampling_body.py",
    "cluster/oip/asks.py",
    "cluster/oip/descriptions.py",
    "cluster/oip/responses.py",
    "cluster/oip/service.py",
    "cluster/oip/tensors.py",
    "cluster/oip/wire_name.py",
    "cluster/openai/asks.py",
    "cluster/status_replies.py",
    "cluster/router/cluster_service.py",
    "cluster/request/errors.py",
    "cluster/edge/health.py",
    "cluster/edge/reflection.py",
    "cluster/ledger/leases.py",
    "cluster/ledger/process.py",
    "cluster/ledger/reading.py",
    "cluster/ledger/recorder.py",
    "cluster/ledger/service.py",
    "cluster/ledger/wire.py",
    "cluster/link/plausibility.py",
    "cluster/link/messages.py",
    "cluster/link/server.py",
    "cluster/link/replica_connection.py",
    "cluster/request/validation.py",
    "cluster/edge/process.py",
    "cluster/router/service.py",
    "cluster/router/story_wire.py",
    "cluster/router/siblings.py",
    "cluster/router/wire.py",
    "replicas/energy/agent.py",
    "replicas/energy/agent_messages.py",
    "replicas/energy/agent_client.py",
    "replicas/frames.py",
    "replicas/link/link.py",
    "replicas/link/codec.py",
    "replicas/wire/caches.py",
    "replicas/wire/deltas.py",
    "replicas/wire/engines.py",
    "replicas/wire/loads.py",
    "replicas/wire/requests.py",
    "replicas/wire/steps.py",
    "replicas/wire/trails.py",
}


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [ROOT / name for name in listed if "_pb2" not in name and (ROOT / name).exists()]


def product_sources() -> list[Path]:
    return [path for path in sources() if path.relative_to(ROOT).parts[0] in PACKAGES]


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(), ids=identify)
def test_no_mark_of_unfinished_work(path: Path) -> None:
    if path == Path(__file__).resolve():
        return
    marks = [line for line in path.read_text().splitlines() if MARKS.search(line)]
    assert not marks


@pytest.mark.parametrize("path", product_sources(), ids=identify)
def test_a_file_has_one_noun(path: Path) -> None:
    text = path.read_text()
    assert path.name not in FORBIDDEN_FILE_NAMES
    assert len(text.splitlines()) <= MAX_FILE_LINES
    tree = ast.parse(text)
    if text.strip():
        assert ast.get_docstring(tree), "a module docstring says what the file owns"
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long


def test_protobuf_is_imported_only_at_the_edges() -> None:
    users = {
        identify(path)
        for path in product_sources()
        if re.search(r"^\s*(from|import) .*_pb2", path.read_text(), re.MULTILINE)
    }
    assert users <= PROTOBUF_EDGES


def test_only_the_config_reads_the_environment() -> None:
    readers = {
        identify(path) for path in product_sources() if re.search(r"os\.(environ|getenv)", path.read_text())
    }
    assert readers <= ENVIRONMENT_READERS


# `config` reads settings; others may only hand an environment on, to their children or to a library that is
# told in no other way.
ENVIRONMENT_READERS = {
    "cluster/config/load.py",
    "cluster/serving/ray_environment.py",
    "cluster/serving/rank_host.py",
    "replicas/parallel/rendezvous.py",
    "replicas/supervisor/rank_group.py",
}
