"""Everything one `wattline up` runs: a router child, a Ray, and one Serve application per model.

`start` returns when all are on their way, `progress` tells how far they are, `tend` keeps the router alive,
`stop` drains and leaves nothing behind. Used by `wattline up` and `wattline demo`; one thread calls it.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, replace

import psutil

from cluster.addresses import RouterAddresses
from cluster.client import CallError, Client
from cluster.command_error import CommandError
from cluster.config import Config
from cluster.replies import RouterState
from cluster.serving.deployments import Deployments
from cluster.serving.ledger_process import LedgerProcess
from cluster.serving.loading_note import Loading, read_loading
from cluster.serving.ray_session import RaySession, node_address
from cluster.serving.router_group import RouterGroup
from cluster.serving.run_folder import RunFolder, UpState

POLL_S = 0.1
EVERYWHERE = "0.0.0.0"
STATUS_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProgress:
    """A model on its way. `running` counts replicas ready for Serve, `attached` those at the router."""

    model: str
    wanted: int
    running: int
    attached: int
    failure: str = ""
    hint: str = ""
    loading: Loading | None = None

    @property
    def is_ready(self) -> bool:
        return self.attached >= self.wanted

    @property
    def stage(self) -> str:
        """Where it is, in words."""
        if self.is_ready:
            return "ready"
        if self.hint:
            return self.hint
        what = f"loading {self.loading.stage}" if self.loading else "starting ranks"
        return f"{what}, {self.attached} of {self.wanted} replicas ready" if self.wanted > 1 else what

    @property
    def fraction(self) -> float | None:
        """Of all replicas; None while nothing is known."""
        if not self.attached and not self.loading:
            return None
        loading = self.loading.fraction if self.loading and not self.is_ready else 0.0
        return min(1.0, (self.attached + loading) / self.wanted)


class Stack:
    """Owns router and Ray. `folder` is locked by the caller."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self._folder = folder
        self._config = config
        self._ray = RaySession(config, folder)
        self._routers = RouterGroup(config, folder)
        self._ledger = LedgerProcess(config, folder)
        self._deployments: Deployments | None = None
        self._client: Client | None = None
        self._each: tuple[Client, ...] = ()
        """One per router: the first is asked for most things, all for what they have."""
        self._state = UpState(pid=os.getpid(), created_s=psutil.Process().create_time())

    @property
    def addresses(self) -> RouterAddresses:
        """Of the first router; the ports for clients are those of all."""
        assert self._routers.addresses, "the router listens once `start` returned"
        return self._routers.addresses[0]

    @property
    def client(self) -> Client:
        assert self._client, "the router listens once `start` returned"
        return self._client

    def start(self) -> None:
        """Start router and Ray, and hand the models to Serve. Raises CommandError."""
        self._folder.write_state(self._state)
        self._ledger.start()
        self._routers.start()
        self._ray.start()
        while (routers := self._routers.poll_addresses()) is None:
            time.sleep(POLL_S)
        sockets = [f"unix:{self._folder.router_socket(index)}" for index in range(len(routers))]
        self._client = Client(",".join(sockets))
        self._each = tuple(Client(socket) for socket in sockets)
        addresses = routers[0]
        self._state = replace(
            self._state,
            grpc=addresses.grpc,
            http=addresses.http,
            link=addresses.link,
            ray=self._ray.address,
        )
        self._folder.write_state(self._state)
        self._deployments = Deployments(self._with_links(routers))
        self._deployments.deploy()

    def _with_links(self, routers: tuple[RouterAddresses, ...]) -> Config:
        """What replicas are told: where the router really listens, unless the file says where to dial."""
        if self._config.router.link_addresses:
            return self._config
        links = tuple(
            _dialable(router.link) if self._ray.is_owner else router.link.replace(EVERYWHERE, node_address())
            for router in routers
        )
        return self._config.with_router(link_addresses=links)

    def progress(self) -> tuple[ModelProgress, ...]:
        """How far every model is. Raises CommandError if one cannot be served."""
        assert self._deployments, "start the stack first"
        attached, loading = self._attached(), read_loading(self._folder.path)
        models = tuple(
            ModelProgress(
                model=one.model,
                wanted=one.wanted,
                running=one.running,
                attached=attached.get(one.model, 0),
                failure=one.failure,
                hint=one.hint,
                loading=loading.get(one.model),
            )
            for one in self._deployments.progress()
        )
        failures = [f"model {one.model!r} cannot be served: {one.failure}" for one in models if one.failure]
        if failures:
            raise CommandError("\n".join(failures))
        return models

    def shortages(self) -> list[str]:
        """Why models have fewer replicas than they should; it blocks while Ray is not well."""
        assert self._deployments, "start the stack first"
        return self._deployments.shortages()

    def mark_ready(self) -> None:
        """Tell other commands that every model answers."""
        self._state = replace(self._state, is_ready=True)
        self._folder.write_state(self._state)

    def tend(self) -> None:
        """Call often: starts dead routers again, bounds logs. Raises CommandError when one cannot live."""
        self._routers.tend()
        self._ledger.tend()
        self._folder.bound_logs()

    def roll_routers(self) -> None:
        """Replace the routers one after another; `tend` goes on with it. One alone has nobody to stand in."""
        self._routers.roll()

    @property
    def is_rolling(self) -> bool:
        """From `roll_routers` until the last one listens."""
        return self._routers.is_rolling

    def status(self) -> RouterState | None:
        """What the router says; None while it does not answer."""
        return _status_of(self.client)

    def _attached(self) -> dict[str, int]:
        """By model, the replicas that every router has: a caller may come to any of them."""
        states = [state for client in self._each if (state := _status_of(client))]
        if len(states) < len(self._each):
            return {}
        counts = [{model.name: model.num_ready for model in state.models} for state in states]
        return {name: min(count[name] for count in counts) for name in counts[0]}

    def stop(self) -> None:
        """Drain and end everything. Replicas go first, so that streams under way end through the router."""
        try:
            if self._deployments and not self._deployments.delete():
                logger.warning("drain_cut_short")
        finally:
            self._routers.stop()
            self._ledger.stop()
            self._ray.stop()
            for client in (*self._each, *([self._client] if self._client else [])):
                client.close()


def _status_of(client: Client) -> RouterState | None:
    """None while it does not answer."""
    try:
        return client.status(timeout_s=STATUS_TIMEOUT_S)
    except CallError:
        return None


def _dialable(address: str) -> str:
    """A socket bound to every interface is reached through loopback from here."""
    return address.replace(EVERYWHERE, "127.0.0.1") if address.startswith(EVERYWHERE) else address
