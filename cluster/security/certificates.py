"""What the router shows on its ports, from PEM files that may be replaced while it runs.

A handshake looks, once a second at most, whether the files changed. A pair that does not fit together, as
while one of two files has been replaced, is not taken: the old one stays until the new one is whole. Streams
under way keep the connection they have.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import grpc

from cluster.config import ConfigError
from cluster.security.watched_files import WatchedFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFiles:
    """Paths of PEM files. `peer_ca` None: peers are not asked for a certificate. `owner`: the section."""

    owner: str
    cert: Path
    key: Path
    peer_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.cert, self.key, *((self.peer_ca,) if self.peer_ca else ()))

    def load(self) -> ssl.SSLContext:
        """A server's context from the files as they are. Raises ConfigError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # Without a word for a password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(self.cert, self.key, password="")
            if self.peer_ca is not None:
                context.load_verify_locations(self.peer_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (ssl.SSLError, OSError) as error:
            files = ", ".join(str(path) for path in self.paths)
            raise ConfigError(
                f"{self.owner}: {files} make no certificate with its key ({error}); "
                "give PEM files that belong together, the key without a password"
            ) from error
        if self.peer_ca is not None and not context.cert_store_stats()["x509"]:
            raise ConfigError(
                f"{self.owner}: {self.peer_ca} has no certificate to trust; give the authority's"
            )
        return context


class Rotation:
    """The newest whole set of the files. Safe to call from several threads."""

    def __init__(self, files: CertificateFiles, *, clock_s: Callable[[], float] = monotonic) -> None:
        self._files = files
        self._watched = WatchedFiles(files.paths, clock_s=clock_s)
        self.context = files.load()
        self._said = ""

    def turned(self) -> bool:
        """Whether there is a newer set than at the last call; `context` then is of it."""
        if not self._watched.changed():
            return False
        try:
            self.context = self._files.load()
        except ConfigError as error:
            self._watched.look_again()
            if str(error) != self._said:
                logger.error("certificates_kept reason=%s", error)
            self._said = str(error)
            return False
        self._said = ""
        logger.info("certificates_reloaded owner=%s cert=%s", self._files.owner, self._files.cert)
        return True


def https_context(files: CertificateFiles, *, clock_s: Callable[[], float] = monotonic) -> ssl.SSLContext:
    """For a server that takes one context for good: it hands every handshake over to the newest."""
    rotation = Rotation(files, clock_s=clock_s)
    context = rotation.context

    def hand_over(connection: ssl.SSLObject, name: str | None, given: ssl.SSLContext) -> None:
        rotation.turned()
        connection.context = rotation.context

    # OpenSSL asks at every handshake, with and without a name in it.
    context.sni_callback = hand_over
    return context


def grpc_credentials(
    files: CertificateFiles, *, clock_s: Callable[[], float] = monotonic
) -> grpc.ServerCredentials:
    """For a gRPC port: asked for at every handshake. Raises ConfigError."""
    rotation = Rotation(files, clock_s=clock_s)

    def fetch() -> Any:
        """None: nothing new."""
        return _grpc_configuration(files) if rotation.turned() else None

    return grpc.dynamic_ssl_server_credentials(
        _grpc_configuration(files), fetch, require_client_authentication=files.peer_ca is not None
    )


def _grpc_configuration(files: CertificateFiles) -> Any:
    return grpc.ssl_server_certificate_configuration(
        [(files.key.read_bytes(), files.cert.read_bytes())],
        root_certificates=files.peer_ca.read_bytes() if files.peer_ca else None,
    )
