"""Options that several commands share, and what they default to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.command_error import CommandError

if TYPE_CHECKING:
    from cluster.client import Client
    from cluster.config import Config

DEFAULT_CONFIG = Path("wattline.yaml")
MAX_ROUTERS = 16
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
Ca = Annotated[
    str,
    typer.Option(
        "--ca", envvar="WATTLINE_CA", metavar="FILE", help="CA of the router's certificate; turns TLS on."
    ),
]
Cert = Annotated[
    str,
    typer.Option(
        "--cert",
        envvar="WATTLINE_CERT",
        metavar="FILE",
        help="Your certificate and its key in one file, where the router asks for it.",
    ),
]
ApiKey = Annotated[
    str,
    typer.Option("--api-key", envvar="WATTLINE_API_KEY", metavar="KEY", help="Better given by its variable."),
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
    """The address as given, else that of the running `up`, else the default port.

    The `up` of this user is reached by its own socket: nobody asks there for certificates and keys.
    """
    if address:
        return address
    from cluster.config import default_runtime_dir
    from cluster.serving.run_folder import RunFolder, read_state

    folder = default_runtime_dir()
    state = read_state(folder)
    if state is None or not state.grpc:
        return DEFAULT_ADDRESS
    own = [path for index in range(MAX_ROUTERS) if (path := RunFolder(folder).router_socket(index)).exists()]
    return ",".join(f"unix:{path}" for path in own) or state.grpc


def dial_router(address: str, *, ca: str, cert: str, api_key: str) -> Client:
    """A client of the router that these options mean."""
    from cluster.access import Access
    from cluster.client import Client

    return Client(find_router(address), Access(ca=ca, cert=cert, key_file=cert, api_key=api_key))


def pick_model(names: list[str], wanted: str) -> str:
    """The wanted model, or the only one."""
    if wanted:
        return wanted
    if len(names) == 1:
        return names[0]
    served = ", ".join(names) or "none"
    raise CommandError(f"say which model with --model; served: {served}")
