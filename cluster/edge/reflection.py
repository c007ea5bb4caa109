"""gRPC server reflection: what is served here, for clients that bring no `.proto`."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection

from cluster.oip import wire_name


def enable_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Tell of these services, by the names they are called, and of itself."""
    names = (*services, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, _pool_of(names))


def _pool_of(services: Sequence[str]) -> DescriptorPool:
    """A pool of their own: in the process's there may be a Triton client's files, by the names of ours."""
    known, pool = descriptor_pool.Default(), DescriptorPool()
    for name in services:
        if name == wire_name.SERVICE:
            pool.Add(wire_name.file_on_the_wire())
        else:
            _add(pool, known.FindFileContainingSymbol(name))
    return pool


def _add(pool: DescriptorPool, file: FileDescriptor) -> None:
    for dependency in file.dependencies:
        _add(pool, dependency)
    pool.Add(FileDescriptorProto.FromString(file.serialized_pb))
