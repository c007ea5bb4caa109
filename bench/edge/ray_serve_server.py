"""Ray Serve's own gRPC proxy before the deployment of `ray_serve_app.py`, on a local Ray of its own.

`python -m bench.edge.ray_serve_server`; see `child.py` for what it says and when it ends. Its Ray has its own
ports and ends with this process.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile

import psutil

from bench.edge.child import Listening, keep_stdout, serve_until_told
from bench.priority import share_priority_below

SERVICER = "protos.wattline_inference_pb2_grpc.add_InferenceServicer_to_server"
ROLES = {"proxy": "ray::ProxyActor", "replica": "ray::ServeReplica"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_pids() -> dict[str, int]:
    """Ray names its processes by what they do."""
    titles = {child.pid: " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)}
    return {
        role: next(pid for pid, title in titles.items() if title.startswith(word))
        for role, word in ROLES.items()
    }


def main() -> None:
    out_fd = keep_stdout()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.pop("RAY_ADDRESS", None)
    import ray
    from ray import serve

    from bench.edge.ray_serve_app import app

    with tempfile.TemporaryDirectory(prefix="wlr-") as folder:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
        try:
            port = free_port()
            serve.start(
                http_options={"host": "127.0.0.1", "port": free_port()},
                grpc_options={"port": port, "grpc_servicer_functions": [SERVICER]},
            )
            serve.run(app)
            share_priority_below()
            listening = Listening(
                address=f"127.0.0.1:{port}", pids=find_pids(), version=f"ray {ray.__version__}"
            )
            asyncio.run(serve_until_told(listening, out_fd))
            serve.shutdown()
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
