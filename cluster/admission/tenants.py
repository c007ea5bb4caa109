"""The tenants of this router: their accounts, and what each request is charged and given back.

Joules are leased before they are needed: a tenant whose slice is spent waits for the next one at its next
request, and where none can be had, it is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic

from cluster.admission.energy_lease import LeaseSource, Wallet
from cluster.admission.tenant import OTHER, Tenant
from cluster.admission.tenant_account import TenantAccount
from cluster.energy.account import EnergyAccount

logger = logging.getLogger(__name__)

MAX_UNCONFIGURED = 1024
"""Tenants without a section that get an account of their own; any more share one."""
LEASE_TIMEOUT_S = 1.0
LEASE_RETRY_S = 1.0


class Charge:
    """What one request was charged so far. Mutable; settled once, or given back whole."""

    def __init__(self, account: TenantAccount, *, clock_s: Callable[[], float]) -> None:
        self.tenant = account.tenant
        self._account = account
        self._clock_s = clock_s
        self._tokens = 0
        self._energy_mj = 0
        self._is_settled = False

    def expect(self, *, tokens: int, energy_mj: int) -> None:
        """Its size is known: prompt and expected answer, and what they are expected to cost."""
        self._tokens, self._energy_mj = tokens, energy_mj
        self._account.charge_tokens(tokens, now_s=self._clock_s())
        if self._account.wallet is not None:
            self._account.wallet.reserve(energy_mj)

    def settle(self, *, tokens: int, energy: EnergyAccount) -> None:
        """It has ended; its joules follow."""
        self._is_settled = True
        self._account.charge_tokens(tokens - self._tokens, now_s=self._clock_s())
        wallet, expected_mj = self._account.wallet, self._energy_mj
        if wallet is not None:
            energy.when_settled(lambda: _settle(wallet, expected_mj, energy))

    def give_back(self) -> None:
        """Nothing was done for it, unless it was settled."""
        if self._is_settled:
            return
        self._account.charge_tokens(-self._tokens, now_s=self._clock_s())
        if self._account.wallet is not None:
            self._account.wallet.settle(self._energy_mj, spent_mj=0)


class Tenants:
    """Owned by the event loop."""

    def __init__(
        self,
        tenants: Iterable[Tenant],
        *,
        leases: LeaseSource,
        clock_s: Callable[[], float] = monotonic,
    ) -> None:
        self._leases = leases
        self._clock_s = clock_s
        self._accounts = {one.name: TenantAccount(one, now_s=clock_s()) for one in tenants}
        self._configured = frozenset(self._accounts)
        self._leasing: dict[str, asyncio.Task[None]] = {}

    def __iter__(self) -> Iterator[TenantAccount]:
        return iter(tuple(self._accounts.values()))

    def label(self, name: str) -> str:
        """A tenant's name where it is configured, else a word for all others."""
        return name if name in self._configured else OTHER

    def account(self, name: str) -> TenantAccount:
        """Of a tenant; one that is not configured has no limits."""
        known = self._accounts.get(name)
        if known is None:
            is_crowded = len(self._accounts) - len(self._configured) >= MAX_UNCONFIGURED
            name = OTHER if is_crowded else name
            known = self._accounts.setdefault(name, TenantAccount(Tenant(name=name), now_s=self._clock_s()))
        return known

    @contextmanager
    def charging(self, account: TenantAccount) -> Iterator[Charge]:
        """A request of this tenant is under way inside."""
        account.begin(now_s=self._clock_s())
        charge = Charge(account, clock_s=self._clock_s)
        try:
            yield charge
        finally:
            charge.give_back()
            account.end()

    async def lease_joules(self, account: TenantAccount) -> None:
        """Fill up an empty wallet, if there is a budget and something left of it. Returns at once else.

        One lease a tenant is under way, whoever waits for it; it is not lost with a caller who goes.
        """
        name, wallet = account.tenant.name, account.wallet
        if wallet is None or wallet.has_joules or self._clock_s() < account.no_joules_until_s:
            return
        leasing = self._leasing.get(name)
        if leasing is None:
            leasing = self._leasing[name] = asyncio.create_task(self._lease(account, wallet))
            leasing.add_done_callback(lambda _: self._leasing.pop(name))
        await asyncio.shield(leasing)

    async def close(self) -> None:
        """Give back what was leased and not spent."""
        await asyncio.gather(*self._leasing.values(), return_exceptions=True)
        for account in self._accounts.values():
            wallet = account.wallet
            if wallet is not None and wallet.day is not None and wallet.balance_mj > 0:
                unspent_mj, wallet.balance_mj = wallet.balance_mj, 0
                await self._leases.give_back(account.tenant.name, unspent_mj=unspent_mj, day=wallet.day)
        await self._leases.close()

    async def _lease(self, account: TenantAccount, wallet: Wallet) -> None:
        name = account.tenant.name
        try:
            async with asyncio.timeout(LEASE_TIMEOUT_S):
                grant = await self._leases.lease(name, want_mj=wallet.wanted_mj)
        except (TimeoutError, OSError) as error:
            logger.warning("lease_failed tenant=%s error=%s", name, type(error).__name__)
            account.no_joules_until_s = self._clock_s() + LEASE_RETRY_S
            return
        wallet.add(grant)
        if not wallet.has_joules:
            account.no_joules_until_s = self._clock_s() + max(LEASE_RETRY_S, grant.retry_after_s)


def _settle(wallet: Wallet, expected_mj: int, energy: EnergyAccount) -> None:
    wallet.settle(expected_mj, spent_mj=energy.energy.total_mj if energy.energy else 0)
