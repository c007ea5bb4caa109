"""A rank's runner over given weights, as a replica makes one: what the engine sections step."""

from __future__ import annotations

from bench.gpu_check.setting import Setting
from replicas.config import EngineLimits, ParallelConfig, RankConfig
from replicas.models.spec import ModelSpec
from replicas.models.weights import ModelWeights
from replicas.parallel.collectives import SoloCollectives
from replicas.parallel.degrees import shard_of
from replicas.rank.device_kernels import load_device_kernels
from replicas.rank.device_setup import cuda_support
from replicas.rank.device_steps import DeviceSupport
from replicas.rank.graphs import EagerBackend
from replicas.rank.runner import ModelRunner
from replicas.rank.transfer import HostTransfer


def make_runner(
    setting: Setting, spec: ModelSpec, weights: ModelWeights, limits: EngineLimits
) -> ModelRunner:
    """On a GPU with all it has; on a CPU over the same buffers, with the kernels interpreted."""
    config = RankConfig(
        group="gpu-check",
        epoch=1,
        rank=0,
        source="",
        parallel=ParallelConfig(),
        limits=limits,
        device=setting.device.type,
        kernels="auto" if setting.is_cuda else "off",
    )
    if setting.is_cuda:
        support = cuda_support(config, spec, setting.device)
    else:
        graphs = EagerBackend() if limits.cuda_graphs else None
        support = DeviceSupport(transfer=HostTransfer(), graphs=graphs, kernels=load_device_kernels())
    return ModelRunner(
        config,
        SoloCollectives(),
        spec=spec,
        shard=shard_of(spec, config.parallel, 0),
        weights=weights,
        weights_digest="",
        support=support,
    )
