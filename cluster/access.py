"""What a client shows a router, and a channel that shows it: API key, certificates, or nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import grpc

from cluster.command_error import CommandError

MESSAGE_BYTES = 16 * 2**20
ASK_AGAIN = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["CANCELLED"],
                },
            }
        ]
    }
)
"""gRPC's service config of a client that outlives restarts of routers.

A call that reaches a server in the moment in which it says goodbye ends with CANCELLED before it began (gRPC
core turns it away without asking the router). gRPC repeats only calls that have had no answer yet, so nothing
is done twice; what the caller itself cancels is not repeated.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Paths of PEM files, and a key. `ca` turns TLS on; `cert` and `key_file` are for routers that ask."""

    ca: str = ""
    cert: str = ""
    key_file: str = ""
    server_name: str = ""
    """The name in the router's certificate, where it is not the address."""
    api_key: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()


def open_channel(address: str, access: Access) -> grpc.Channel:
    """A channel to one router; a Unix socket is never encrypted. Raises CommandError for a missing file."""
    options: list[tuple[str, str | int]] = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config", ASK_AGAIN),
        # A router that is started again is found soon.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    if not access.ca or address.startswith("unix:"):
        return grpc.insecure_channel(address, options=options)
    if access.server_name:
        options.append(("grpc.ssl_target_name_override", access.server_name))
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read(access.ca),
        private_key=_read(access.key_file) if access.key_file else None,
        certificate_chain=_read(access.cert) if access.cert else None,
    )
    return grpc.secure_channel(address, credentials, options=options)


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise CommandError(
            f"{path} cannot be read ({error.strerror}); give the path of a PEM file"
        ) from error
