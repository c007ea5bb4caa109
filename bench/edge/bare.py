"""Serves a servicer by a bare grpc.aio server in a process of its own, until the bench is done with it."""

from __future__ import annotations

import os
from importlib.metadata import version

import grpc

from bench.edge.child import Listening, serve_until_told
from protos import wattline_inference_pb2_grpc as pb_grpc


async def serve_bare(servicer: pb_grpc.InferenceServicer, *, role: str, out_fd: int) -> None:
    """On a free port; `role` is what the bench calls this process."""
    server = grpc.aio.server()
    pb_grpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    listening = Listening(
        address=f"127.0.0.1:{port}", pids={role: os.getpid()}, version=f"grpcio {version('grpcio')}"
    )
    await serve_until_told(listening, out_fd)
    await server.stop(None)
