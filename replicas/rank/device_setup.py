"""What a rank settles before and while its model is put on a device: types, kernels, sizes. No state.

Called by `runner.py` alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys

import torch

from replicas.attention_choice import choose_attention, varlen_refusal
from replicas.config import EngineLimits, RankConfig
from replicas.errors import BadCheckpoint, BadKernels
from replicas.layers.attention import PagedKV
from replicas.layers.kernels.layers import CpuLayers
from replicas.layers.kernels.library import Storage, open_pool
from replicas.layers.triton.varlen import varlen_facts
from replicas.models.spec import ModelSpec
from replicas.models.weights import ModelWeights
from replicas.parallel.degrees import Shard
from replicas.rank.device_kernels import load_device_kernels
from replicas.rank.device_steps import DeviceSupport
from replicas.rank.graphs import CudaGraphBackend
from replicas.rank.rank_experts import RankExperts
from replicas.rank.transfer import CudaTransfer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on CUDA; float32 on CPUs, where half precision is 2 to 9 times slower."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def cuda_support(config: RankConfig, spec: ModelSpec, device: torch.device) -> DeviceSupport:
    """Graphs need kernels: what torch attends to has another shape at every length. BadKernels for a kind of
    attention that cannot be, before weights are loaded for it."""
    kernels = None if config.kernels == "off" else load_device_kernels()
    if kernels is None and config.attention != "auto":
        raise BadKernels(f"attention is {config.attention!r}, but Triton is missing: install it, or set auto")
    facts = varlen_facts(
        dtype_of(config.dtype, device),
        device,
        block_tokens=config.limits.block_tokens,
        head_dim=spec.head_dim,
    )
    choose_attention(config.attention, varlen_refusal(facts))
    has_graphs = kernels is not None and config.limits.cuda_graphs
    return DeviceSupport(
        transfer=CudaTransfer(device), graphs=CudaGraphBackend() if has_graphs else None, kernels=kernels
    )


def digest_of(checkpoint_digest: str, config: RankConfig) -> str:
    """Rounded weights are other weights; and ranks that split rows round each part by itself."""
    if config.quantization == "none":
        return checkpoint_digest
    parallel = config.parallel
    rounded = f"{checkpoint_digest} {config.quantization} {parallel.tensor} {parallel.expert}"
    return hashlib.blake2b(rounded.encode(), digest_size=16).hexdigest()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cpu_layers(
    config: RankConfig,
    spec: ModelSpec,
    shard: Shard,
    weights: ModelWeights,
    kv: PagedKV,
    experts: RankExperts,
) -> CpuLayers | None:
    """The compiled kernels where they serve: float32 on a CPU with a compiler. Torch then needs one thread:
    two pools would fight for the same cores."""
    dtype, device = weights.embedding_VH.dtype, weights.embedding_VH.device
    if config.kernels == "off" or device.type != "cpu" or dtype != torch.float32:
        return None
    pool = open_pool(config.threads)
    if pool is None:
        return None
    storage = Storage.SMALLEST if config.kernels == "auto" else Storage.FLOAT32
    if config.quantization == "int8":
        storage = Storage.INT8
    layers = CpuLayers(pool, spec, shard, weights, kv, experts.tally_LX, experts.routes, storage=storage)
    torch.set_num_threads(1)
    return layers


def kv_block_bytes(spec: ModelSpec, shard: Shard, block_tokens: int, itemsize: int) -> int:
    """Of keys and values of all layers, on one rank."""
    return 2 * spec.num_layers * block_tokens * shard.num_kv_heads * spec.head_dim * itemsize


def context_tokens(spec: ModelSpec, limits: EngineLimits) -> int:
    if limits.context_tokens > spec.context_tokens:
        raise BadCheckpoint(
            f"limits.context_tokens={limits.context_tokens} is above the model's "
            f"max_position_embeddings={spec.context_tokens}; lower it, or 0 for the model's own"
        )
    return limits.context_tokens or spec.context_tokens


def keep_large_buffers() -> None:
    """Have glibc reuse freed blocks of up to 32 MiB: fresh pages for every large activation cost up to 4x."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 512 * 2**20)
