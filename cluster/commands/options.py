"""Options that several commands share, and what they default to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.command_error import CommandError

if TYPE_CHECKING:
    from cluster.config import Config

DEFAULT_CONFIG = Path("wattline.yaml")
DEFAULT_ADDRESS = "127.0.0.1:50051"
ENERGY_WAIT_MS = 500
"""A person does not notice, and the joules are final."""

MAX_UINT32 = 2**32 - 1
"""What a field of a request can hold."""

ConfigFile = Annotated[
    Path, typer.Option("--file", "-f", help="The configuration.", show_default=True, metavar="FILE")
]
Address = Annotated[
    str,
    typer.Option(
        "--address",
        "-a",
        metavar="HOST:PORT",
        help=f"The router. Default: the one that `wattline up` runs here, else {DEFAULT_ADDRESS}.",
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", "-n", min=1, max=MAX_UINT32, help="Tokens of the answer, at most."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


def read_config(path: Path) -> Config:
    """The configuration. Raises ConfigError, whose text is for the user."""
    from cluster.config import load_config

    return load_config(path)


def find_router(address: str) -> str:
    """The address as given, else that of the running `up`, else the default port."""
    if address:
        return address
    from cluster.config import default_runtime_dir
    from cluster.serving.run_folder import read_state

    state = read_state(default_runtime_dir())
    return state.grpc if state and state.grpc else DEFAULT_ADDRESS


def pick_model(names: list[str], wanted: str) -> str:
    """The wanted model, or the only one."""
    if wanted:
        return wanted
    if len(names) == 1:
        return names[0]
    served = ", ".join(names) or "none"
    raise CommandError(f"say which model with --model; served: {served}")
