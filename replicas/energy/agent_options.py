"""The command line of the energy agent, where it is a process of its own."""

from __future__ import annotations

import argparse

from replicas.config import HOST_METERS, MetricsAccess


def agent_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m replicas.energy.agent",
        description="Read this host's energy meters and serve them over gRPC (wattline.v1.EnergyAgent).",
        epilog="example: --listen unix:/run/wattline/energy.sock --listen 127.0.0.1:9101 --metrics-port 9102",
    )
    parser.add_argument(
        "--listen",
        action="append",
        required=True,
        metavar="ADDRESS",
        help="unix:/path or host:port, may be repeated; there is no authentication, so prefer the socket",
    )
    parser.add_argument("--poll-ms", type=float, default=50.0, help="time between two reads (default 50)")
    parser.add_argument(
        "--cpu-static-w", type=float, default=10.0, help="cpu-model: always drawn (default 10)"
    )
    parser.add_argument("--cpu-core-w", type=float, default=8.0, help="cpu-model: per busy core (default 8)")
    parser.add_argument(
        "--host-meter",
        choices=HOST_METERS,
        default="auto",
        help="of CPUs and memory beside the GPUs; auto: RAPL where it can be read (default auto)",
    )
    parser.add_argument(
        "--exit-after-idle-s", type=float, help="end after this long unwatched (default never)"
    )
    parser.add_argument(
        "--metrics-host", default="127.0.0.1", help="where /metrics listens (default 127.0.0.1)"
    )
    parser.add_argument(
        "--metrics-port", type=int, help="serve Prometheus /metrics there; 0: a free port (default none)"
    )
    parser.add_argument("--metrics-announce", default="", help="what scrapers dial (default metrics-host)")
    parser.add_argument("--metrics-cert", default="", help="PEM file; with --metrics-key: over TLS")
    parser.add_argument("--metrics-key", default="", help="PEM file, the certificate's private key")
    parser.add_argument(
        "--metrics-client-ca", default="", help="PEM file; scrapers must show a certificate signed by it"
    )
    return parser


def metrics_access(options: argparse.Namespace) -> MetricsAccess:
    """How /metrics is shown, as the options say."""
    return MetricsAccess(
        host=options.metrics_host,
        announced_host=options.metrics_announce,
        cert=options.metrics_cert,
        key=options.metrics_key,
        client_ca=options.metrics_client_ca,
    )
