"""All links of one replica: one per address of every router it was told about.

Names are resolved again every few seconds, so routers come and go without a registry. An address that left
the name keeps its link while the stream lives, and is not dialled again after it. Called by `supervisor.py`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address

from replicas.config import LinkCredentials
from replicas.link.link import LinkHandler, LinkSession, RouterLink
from replicas.link.messages import Goodbye

REFRESH_S = 5.0
CLOSE_TIMEOUT_S = 2.0
MAX_LINKS = 256

logger = logging.getLogger(__name__)


Resolve = Callable[[str], Awaitable[tuple[str, ...]]]


async def resolve_target(address: str) -> tuple[str, ...]:
    """Every address behind `host:port`; `unix:/path` and IP addresses stay as they are.

    Of a name with both families only the IPv4 addresses: both lead to the same routers, and a second stream
    would take the place of the first. A name that cannot be resolved now has no address: it is asked for
    again at the next refresh.
    """
    if address.startswith("unix:"):
        return (address,)
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():
        raise ValueError(f"router address {address!r} is not host:port; write e.g. router.example:50052")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        logger.warning("router_name_unresolved host=%s error=%s", host, error.strerror)
        return ()
    has_ipv4 = any(family == socket.AF_INET for family, *_ in found)
    return tuple(
        _target(str(sockaddr[0]), int(port))
        for family, *_, sockaddr in found
        if family == socket.AF_INET or not has_ipv4
    )


class LinkPool:
    """Keeps the links of a replica; owned by its supervisor.

    `attached` maps the router's id to its session, and holds only live ones.
    """

    def __init__(
        self,
        *,
        addresses: Sequence[str],
        handler: LinkHandler,
        credentials: LinkCredentials | None = None,
        resolve: Resolve = resolve_target,
        refresh_s: float = REFRESH_S,
    ) -> None:
        self._addresses = tuple(addresses)
        self._handler = handler
        self._credentials = credentials
        self._resolve = resolve
        self._refresh_s = refresh_s
        self._links: dict[str, tuple[RouterLink, asyncio.Task[None]]] = {}
        self._is_closing = False
        self.attached: dict[str, LinkSession] = {}

    async def run(self) -> None:
        """Dial and re-dial until cancelled or closed. Raises what a link raised: that is our own mistake."""
        try:
            while not self._is_closing:
                await self._refresh()
                await self._watch()
        finally:
            if not self._is_closing:
                self._cancel()

    async def close(self, goodbye: Goodbye) -> None:
        """Say Goodbye on every link; return when it is out, bounded by `CLOSE_TIMEOUT_S`."""
        self._is_closing = True
        for link, task in self._links.values():
            link.close(goodbye)
            if not link.is_attached:
                task.cancel()
        if self._links:
            await asyncio.wait({task for _, task in self._links.values()}, timeout=CLOSE_TIMEOUT_S)
        self._cancel()

    def _cancel(self) -> None:
        for _, task in self._links.values():
            task.cancel()

    async def _refresh(self) -> None:
        resolved = await asyncio.gather(*(self._resolve(address) for address in self._addresses))
        wanted = {target for targets in resolved for target in targets}
        # An empty answer is an outage of the name service, not a cluster without routers.
        for gone in set(self._links) - wanted if wanted else set():
            link, task = self._links[gone]
            if not link.is_attached:
                task.cancel()
                del self._links[gone]
        new = sorted(wanted - set(self._links))
        for target in new[: MAX_LINKS - len(self._links)]:
            link = RouterLink(
                target=target,
                handler=self._handler,
                attached=self.attached,
                credentials=self._credentials,
            )
            self._links[target] = (link, asyncio.create_task(link.run(), name=f"link {target}"))

    async def _watch(self) -> None:
        """Until the next refresh is due, or a link's task ended."""
        tasks = {task for _, task in self._links.values()}
        if not tasks:
            await asyncio.sleep(self._refresh_s)
            return
        done, _ = await asyncio.wait(tasks, timeout=self._refresh_s, return_when=asyncio.FIRST_COMPLETED)
        for task in () if self._is_closing else done:
            task.result()


def _target(ip: str, port: int) -> str:
    return f"[{ip}]:{port}" if ip_address(ip).version == 6 else f"{ip}:{port}"
