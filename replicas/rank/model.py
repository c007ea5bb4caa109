"""The factory of ranks that hold a model: collectives, weights, warm kernels. Imports torch."""

from __future__ import annotations

from replicas.config import RankConfig
from replicas.parallel.collectives import make_collectives
from replicas.plan import BuiltRunner, EngineShape, Progress
from replicas.rank.runner import ModelRunner


def build_runner(config: RankConfig, progress: Progress) -> BuiltRunner:
    """Load this rank's shard; returns when all ranks of the group have, and their kernels are warm."""
    runner = ModelRunner.build(config, make_collectives(config), progress)
    runner.warmup()
    expert_loads = runner.experts.loads if runner.spec.num_experts else None
    return BuiltRunner(runner=runner, shape=shape_of(runner), expert_loads=expert_loads)


def shape_of(runner: ModelRunner) -> EngineShape:
    """What a runner says of itself."""
    return EngineShape(
        architecture=runner.spec.architecture,
        vocab_size=runner.spec.vocab_size,
        context_tokens=runner.context_tokens,
        num_blocks=runner.num_blocks,
        eos_token_ids=runner.spec.eos_token_ids,
        weights_digest=runner.weights_digest,
        dtype=runner.dtype,
        device=runner.device,
        costs=runner.costs,
        kernels=runner.kernels,
        scores_prompts=True,
        quantization=runner.quantization,
    )
