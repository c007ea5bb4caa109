"""`wattline ledger`: the store of closed requests, by itself. `wattline up` runs one of its own."""

from __future__ import annotations

from cluster.commands.options import DEFAULT_CONFIG, ConfigFile, read_config


def ledger(file: ConfigFile = DEFAULT_CONFIG) -> None:
    """Run the store of closed requests and tenants' energy budgets.

    One per cluster; routers find it by `ledger.address`. `wattline up` runs one unless told otherwise.
    """
    import asyncio
    import logging

    from cluster.ledger.process import run_ledger

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(run_ledger(read_config(file)))
