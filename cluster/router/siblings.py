"""The other routers of one `up`: who of them has a request, and asking it.

A request's id begins with the number of its router, so that at most one sibling is asked, over its socket in
the run folder. Owns no connection: it is asked rarely.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import grpc

from protos import wattline_cluster_pb2 as cluster_pb
from protos import wattline_cluster_pb2_grpc as cluster_rpc
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as rpc

INDEX_CHARS = 2
ID_BYTES = 11
ASK_TIMEOUT_S = 1.0


def socket_name(index: int) -> str:
    """Of router `index`, in the folder that the routers of one `up` share."""
    return f"{file_stem(index)}.sock"


def file_stem(index: int) -> str:
    """How the files of router `index` are called."""
    return f"router-{index}" if index else "router"


def index_of_file(stem: str) -> int:
    """The number of the router whose file is called so."""
    return int(stem.partition("-")[2] or 0)


def index_of(request_id: str) -> int | None:
    """The number of the router that a request came to; None: it is no id of ours."""
    try:
        return int(request_id[:INDEX_CHARS], 16)
    except ValueError:
        return None


class Siblings:
    """What router `index` of `count` knows of itself and the others. `folder` None: it has no company."""

    def __init__(self, *, folder: Path | None, index: int, count: int) -> None:
        self._folder = folder
        self._index = index
        self._count = count

    @property
    def own_socket(self) -> Path | None:
        """Where this router is found by them; None: it is not."""
        return self._folder / socket_name(self._index) if self._folder else None

    def draw_id(self) -> str:
        """The id of a request that came to this router."""
        return f"{self._index:0{INDEX_CHARS}x}{secrets.token_hex(ID_BYTES)}"

    async def get_energy(self, request: pb.GetEnergyRequest) -> pb.GetEnergyResponse | None:
        """What the sibling says that had the request; None: there is none, or it does not know either."""
        owner = index_of(request.request_id)
        if self._folder is None or owner is None or owner == self._index or owner >= self._count:
            return None
        async with grpc.aio.insecure_channel(f"unix:{self._folder / socket_name(owner)}") as channel:
            try:
                answer: pb.GetEnergyResponse = await rpc.InferenceStub(channel).GetEnergy(
                    request, timeout=ASK_TIMEOUT_S
                )
            except grpc.aio.AioRpcError:
                return None
        return answer

    async def explain(self, request: cluster_pb.ExplainRequest) -> cluster_pb.ExplainResponse | None:
        """The first sibling's answer that has one: a trace id does not say whose it is. None: nobody has."""
        if self._folder is None:
            return None
        asked = cluster_pb.ExplainRequest(id=request.id, only_here=True)
        for index in range(self._count):
            if index == self._index:
                continue
            async with grpc.aio.insecure_channel(f"unix:{self._folder / socket_name(index)}") as channel:
                try:
                    answer: cluster_pb.ExplainResponse = await cluster_rpc.ClusterStub(channel).Explain(
                        asked, timeout=ASK_TIMEOUT_S
                    )
                except grpc.aio.AioRpcError:
                    continue
            return answer
        return None
