"""transformers' continuous batching: a background thread generates, the caller takes what is ready."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from bench.peers.adapter import KV_BLOCK_TOKENS, STEP_TOKENS, Emit, Peer, PeerSetup

RESULT_TIMEOUT_S = 120.0


class TransformersPeer:
    admits_midway = True

    def __init__(self, setup: PeerSetup) -> None:
        model, self.version = load_model(setup)
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.has_prefix_cache = setup.prefix_caching
        # No token has the number -1: the end of sequence is ignored.
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, bos_token_id=None)
        batching = ContinuousBatchingConfig(
            page_size=KV_BLOCK_TOKENS,
            num_blocks=setup.kv_tokens // KV_BLOCK_TOKENS,
            max_batch_tokens=STEP_TOKENS,
            allow_block_sharing=setup.prefix_caching,
        )
        self._manager: Any = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        self._manager.start()
        self._num_seen: dict[str, int] = {}

    def add(self, request_id: int, prompt: Sequence[int], output_tokens: int) -> None:
        self._num_seen[str(request_id)] = 0
        self._manager.add_request(
            list(prompt), request_id=str(request_id), max_new_tokens=output_tokens, streaming=True
        )

    def step(self, emit: Emit) -> None:
        output = self._manager.get_result(timeout=RESULT_TIMEOUT_S)
        if output is None:
            raise RuntimeError(f"continuous batching gave nothing for {RESULT_TIMEOUT_S:g} s")
        if output.error:
            raise RuntimeError(f"continuous batching: {output.error}")
        token_ids = list(output.generated_tokens)
        new = token_ids[self._num_seen[output.request_id] :]
        self._num_seen[output.request_id] = len(token_ids)
        emit(int(output.request_id), new, output.is_finished())

    def close(self) -> None:
        self._manager.stop(block=True)


def load_model(setup: PeerSetup) -> tuple[Any, str]:
    """The model on `setup.threads` threads, and what to call it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    torch.set_num_threads(setup.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        setup.model, dtype=getattr(torch, setup.dtype), attn_implementation="sdpa"
    )
    return model.eval(), f"transformers {transformers.__version__}, torch {torch.__version__}"


def open_peer(setup: PeerSetup) -> Peer:
    return TransformersPeer(setup)
