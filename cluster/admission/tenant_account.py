"""How far one tenant is from each of its limits. Pure: time comes in. Owned by the event loop."""

from __future__ import annotations

from cluster.admission.energy_lease import Wallet
from cluster.admission.tenant import LimitHit, Tenant
from cluster.admission.token_bucket import TokenBucket

CONCURRENT_RETRY_S = 0.25


class TenantAccount:
    """Mutable. Every `begin` has its `end`."""

    def __init__(self, tenant: Tenant, *, now_s: float) -> None:
        self.tenant = tenant
        self.in_flight = 0
        self.wallet = None if tenant.joules_per_day is None else Wallet(tenant.joules_per_day)
        self.no_joules_until_s = 0.0
        """Until then nobody need be asked for more."""
        self._requests = _bucket(tenant.requests_per_s, now_s)
        self._tokens = _bucket(tenant.tokens_per_s, now_s)

    def limit_hit(self, *, now_s: float) -> LimitHit | None:
        """The limit that keeps a new request out; None: it may come in."""
        tenant = self.tenant
        if tenant.concurrent is not None and self.in_flight >= tenant.concurrent:
            return LimitHit(limit="concurrent", value=tenant.concurrent, retry_after_s=CONCURRENT_RETRY_S)
        for limit, bucket in (("requests_per_s", self._requests), ("tokens_per_s", self._tokens)):
            if bucket is not None and (wait_s := bucket.wait_s(now_s=now_s)) > 0.0:
                return LimitHit(limit=limit, value=bucket.rate_per_s, retry_after_s=wait_s)
        if tenant.joules_per_day is not None and self.wallet is not None and not self.wallet.has_joules:
            retry_after_s = max(0.0, self.no_joules_until_s - now_s)
            return LimitHit(limit="joules_per_day", value=tenant.joules_per_day, retry_after_s=retry_after_s)
        return None

    def begin(self, *, now_s: float) -> None:
        self.in_flight += 1
        if self._requests is not None:
            self._requests.take(1.0, now_s=now_s)

    def end(self) -> None:
        self.in_flight -= 1
        assert self.in_flight >= 0, "a request ends once"

    def charge_tokens(self, amount: int, *, now_s: float) -> None:
        """Negative gives back what was charged too much."""
        if self._tokens is not None:
            self._tokens.take(amount, now_s=now_s)


def _bucket(rate_per_s: float | None, now_s: float) -> TokenBucket | None:
    return None if rate_per_s is None else TokenBucket(rate_per_s, now_s=now_s)
