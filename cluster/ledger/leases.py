"""Tenants' joules from the ledger store: one budget a day for all routers, leased in slices."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import grpc

from cluster.admission.energy_lease import Grant
from protos import wattline_ledger_pb2 as pb
from protos import wattline_ledger_pb2_grpc as pb_grpc

TIMEOUT_S = 1.0

logger = logging.getLogger(__name__)


class StoreLeases:
    """A `LeaseSource`. Dials when it is first asked: most routers have no tenant with a budget."""

    def __init__(self, address: str, budgets_j: Mapping[str, float]) -> None:
        self._address = address
        self._budgets_mj = {tenant: round(budget_j * 1e3) for tenant, budget_j in budgets_j.items()}
        self._dialled: grpc.aio.Channel | None = None

    async def lease(self, tenant: str, *, want_mj: int) -> Grant:
        """Up to `want_mj` of what the tenant has left today. Raises OSError where the store is away."""
        request = pb.LeaseEnergyRequest(
            tenant=tenant, want_mj=want_mj, budget_mj_per_day=self._budgets_mj[tenant]
        )
        try:
            answer = await self._store.LeaseEnergy(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(f"the ledger store does not answer ({error.code().name})") from error
        return Grant(granted_mj=answer.granted_mj, retry_after_s=answer.retry_after_s, day=answer.day)

    async def give_back(self, tenant: str, *, unspent_mj: int, day: int) -> None:
        """What cannot be given back lapses with its day."""
        request = pb.GiveBackEnergyRequest(tenant=tenant, unspent_mj=unspent_mj, day=day)
        try:
            await self._store.GiveBackEnergy(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            logger.warning("lease_not_returned tenant=%s code=%s", tenant, error.code().name)

    async def close(self) -> None:
        if self._dialled is not None:
            await self._dialled.close()

    @property
    def _store(self) -> pb_grpc.LedgerStoreAsyncStub:
        if self._dialled is None:
            self._dialled = grpc.aio.insecure_channel(self._address)
        return pb_grpc.LedgerStoreStub(self._dialled)
