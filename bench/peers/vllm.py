"""vLLM's CPU build: its V1 engine in this process, stepped by the caller."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from bench.peers.adapter import KV_CACHE_BYTES, MAX_SEQUENCES, STEP_TOKENS, Emit, Peer, PeerSetup


class VllmPeer:
    admits_midway = True

    def __init__(self, setup: PeerSetup) -> None:
        _set_environment(setup.threads)
        import vllm

        self.version = f"vllm {vllm.__version__}"
        self.has_prefix_cache = setup.prefix_caching
        self._params = vllm.SamplingParams
        self._engine: Any = vllm.LLMEngine.from_engine_args(
            vllm.EngineArgs(
                model=setup.model,
                dtype=setup.dtype,
                max_model_len=setup.context_tokens,
                max_num_seqs=MAX_SEQUENCES,
                max_num_batched_tokens=STEP_TOKENS,
                enable_prefix_caching=setup.prefix_caching,
                disable_log_stats=True,
                seed=0,
            )
        )
        self._num_seen: dict[str, int] = {}

    def add(self, request_id: int, prompt: Sequence[int], output_tokens: int) -> None:
        self._num_seen[str(request_id)] = 0
        self._engine.add_request(
            str(request_id),
            {"prompt_token_ids": list(prompt)},
            self._params(
                temperature=0.0,
                max_tokens=output_tokens,
                min_tokens=output_tokens,
                ignore_eos=True,
                detokenize=False,
            ),
        )

    def step(self, emit: Emit) -> None:
        for output in self._engine.step():
            token_ids = list(output.outputs[0].token_ids)
            new = token_ids[self._num_seen[output.request_id] :]
            self._num_seen[output.request_id] = len(token_ids)
            emit(int(output.request_id), new, output.finished)

    def close(self) -> None:
        """The engine lives in this process and ends with it."""


def _set_environment(threads: int) -> None:
    """What vLLM reads while it is imported: no second process, this many cores, no calls out."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_BYTES // 2**30),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


def open_peer(setup: PeerSetup) -> Peer:
    return VllmPeer(setup)
