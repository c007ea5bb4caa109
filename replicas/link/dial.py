"""How a replica proves to a router what it is, and asks the same of it: mutual TLS on the link."""

from __future__ import annotations

from pathlib import Path

import grpc
from grpc import aio

from replicas.config import LinkCredentials


def dial(
    target: str, credentials: LinkCredentials | None, options: tuple[tuple[str, int], ...]
) -> aio.Channel:
    """A channel, in plain text where there are no credentials.

    The files are read at every dial, so a replica shows its newest certificate when it comes back. Raises
    OSError where one cannot be read.
    """
    if credentials is None:
        return aio.insecure_channel(target, options)
    pem = grpc.ssl_channel_credentials(
        root_certificates=Path(credentials.ca).read_bytes(),
        private_key=Path(credentials.key).read_bytes(),
        certificate_chain=Path(credentials.cert).read_bytes(),
    )
    name = (("grpc.ssl_target_name_override", credentials.server_name),) if credentials.server_name else ()
    return aio.secure_channel(target, pem, (*options, *name))
