"""Makes the parts of a router from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import time

from cluster.admission.energy_lease import LocalLeases
from cluster.admission.tenants import Tenants
from cluster.config import Config, RouterSection
from cluster.ledger.leases import StoreLeases
from cluster.ledger.location import ledger_address
from cluster.link.replica_pool import ReplicaPool
from cluster.router.gate import Gate
from cluster.router.refusal import Refusals
from cluster.router.route_finder import RouteFinder
from cluster.security.certificates import CertificateFiles
from cluster.security.secret import RouterSecret, draw_secret, read_secret
from cluster.served_model import ServedModel
from cluster.telemetry.journal import Journal, Objective
from cluster.text.tokenizer import Tokenizer


def serve_models(config: Config, tokenizers: Mapping[str, Tokenizer]) -> dict[str, ServedModel]:
    limit_bytes = config.router.max_prompt_bytes
    return {
        model.name: ServedModel(model, tokenizers[model.name], max_prompt_bytes=limit_bytes)
        for model in config.models
    }


def secret_of(section: RouterSection) -> RouterSecret:
    return read_secret(Path(section.secret_file)) if section.secret_file else draw_secret()


def client_tls(section: RouterSection) -> CertificateFiles | None:
    tls = section.tls
    if not tls.is_on:
        return None
    peer_ca = Path(tls.client_ca) if tls.client_ca else None
    return CertificateFiles(owner="router.tls", cert=Path(tls.cert), key=Path(tls.key), peer_ca=peer_ca)


def link_tls(section: RouterSection) -> CertificateFiles | None:
    tls = section.link_tls
    if not tls.is_on:
        return None
    return CertificateFiles(
        owner="router.link_tls", cert=Path(tls.cert), key=Path(tls.key), peer_ca=Path(tls.ca)
    )


def open_gates(
    models: Mapping[str, ServedModel], pool: ReplicaPool, finder: RouteFinder, refusals: Refusals
) -> dict[str, Gate]:
    """One per model; each looks again whenever a replica of its model tells its load."""
    gates = {name: Gate(model, pool=pool, finder=finder, refusals=refusals) for name, model in models.items()}
    pool.on_load = lambda model: gates[model].pump()
    return gates


def new_tenants(config: Config) -> Tenants:
    """Their joules are leased from the ledger store; without one each router has the whole budgets."""
    tenants = [section.to_tenant() for section in config.tenants]
    budgets_j = {one.name: one.joules_per_day for one in tenants if one.joules_per_day is not None}
    if config.ledger.enabled:
        return Tenants(tenants, leases=StoreLeases(ledger_address(config), budgets_j))
    return Tenants(tenants, leases=LocalLeases(budgets_j, wall_s=time))


def new_journal(config: Config) -> Journal:
    return Journal(
        (model.name, Objective(ttft_ms=model.slo.ttft_ms, tpot_ms=model.slo.tpot_ms))
        for model in config.models
    )
