"""Who calls: from what a call carries to a tenant, the same for gRPC and HTTP.

    key in `authorization: Bearer KEY` or `x-api-key: KEY`     its line in the file of keys
    certificate, where callers are asked for one               its name in `auth.client_names`
    the router's own socket in its private folder               an operator of this machine
    nothing of this configured                                  the tenant `default`

Decides who somebody is and what they may do, never how much: that is admission's.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from pathlib import Path
from typing import Any

import grpc

from cluster.config import AuthSection
from cluster.request.errors import NotAllowed, Unauthenticated
from cluster.security.api_keys import KeyRing, find_tenant
from cluster.security.cache_salt import DEFAULT_TENANT

BEARER = "bearer "
BASIC = "basic "
SAN_KEY = "x509_subject_alternative_name"
CN_KEY = "x509_common_name"


class Need(Enum):
    """What a call asks of its caller."""

    TENANT = auto()
    """To be anybody."""
    OPERATOR = auto()
    """To be somebody who may see and steer the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """What a call carries. `peer_names`: of a verified certificate. `is_local`: by the private socket."""

    key: str = ""
    peer_names: tuple[str, ...] = ()
    is_local: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A caller. `models` None: all of them."""

    tenant: str = DEFAULT_TENANT
    is_operator: bool = False
    models: frozenset[str] | None = None

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models

    def check(self, need: Need) -> None:
        """Raises NotAllowed."""
        if need is Need.OPERATOR and not self.is_operator:
            raise NotAllowed(
                f"tenant {self.tenant!r} is no operator; use a key of one that auth.operators names"
            )


ANYBODY = Identity(is_operator=True)
"""Whoever calls where nobody is asked."""


class Authenticator:
    """Turns credentials into identities. Raises ConfigError where the file of keys cannot be used."""

    def __init__(
        self, section: AuthSection, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._section = section
        self._now = now
        self._ring = KeyRing(Path(section.keys_file)) if section.keys_file else None
        self._models = {tenant: frozenset(models) for tenant, models in section.models.items()}
        self._operators = frozenset(section.operators)

    @property
    def is_open(self) -> bool:
        """Nobody is asked who they are."""
        return not self._section.is_on

    @property
    def tenants(self) -> frozenset[str]:
        """Whom a key or a certificate can make known now."""
        keys = self._ring.keys.values() if self._ring else ()
        return frozenset([*(key.tenant for key in keys), *self._section.client_names.values()])

    def identify(self, credential: Credential) -> Identity:
        """Who it is. Raises Unauthenticated."""
        if self.is_open or credential.is_local:
            return ANYBODY
        tenant = self._tenant(credential)
        return Identity(
            tenant=tenant,
            is_operator=tenant in self._operators,
            models=self._models.get(tenant),
        )

    def _tenant(self, credential: Credential) -> str:
        """A key that is shown counts, also where it is wrong and the certificate would have done."""
        if credential.key:
            tenant = find_tenant(self._ring.keys, credential.key, now=self._now()) if self._ring else None
            if tenant is None:
                raise Unauthenticated("the API key is not known here, or its time is over; ask for a new one")
            return tenant
        for name in credential.peer_names:
            if (tenant := self._section.client_names.get(name)) is not None:
                return tenant
        if credential.peer_names:
            raise Unauthenticated("the certificate's name is no tenant's; see auth.client_names")
        raise Unauthenticated("no API key; send it as `authorization: Bearer KEY` or `x-api-key: KEY`")


def presented_key(pairs: Iterable[tuple[str, Any]], *, allows_basic: bool = False) -> str:
    """The key among metadata or headers, names in lower case; empty: there is none.

    `allows_basic`: also the password of HTTP's Basic scheme, which is what a browser can send.
    """
    found = ""
    for name, value in pairs:
        if name == "x-api-key" and isinstance(value, str):
            found = found or value.strip()
        elif name == "authorization" and isinstance(value, str):
            scheme = value[: len(BEARER)].lower()
            if scheme == BEARER:
                return value[len(BEARER) :].strip()
            if allows_basic and scheme.startswith(BASIC):
                return _password(value[len(BASIC) :])
    return found


def credential_of_call(context: grpc.aio.ServicerContext[Any, Any]) -> Credential:
    """What a gRPC call carries."""
    certificate = context.auth_context()
    names = (*certificate.get(SAN_KEY, ()), *certificate.get(CN_KEY, ()))
    return Credential(
        key=presented_key(context.invocation_metadata() or ()),
        peer_names=tuple(name.decode(errors="replace") for name in names),
        is_local=context.peer().startswith("unix:"),
    )


def _password(encoded: str) -> str:
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except ValueError:  # No base64, no ASCII, no UTF-8.
        return "?"
