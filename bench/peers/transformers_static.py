"""transformers' `generate` over a left-padded batch: all requests start together, nobody joins half way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.peers.adapter import Emit, Peer, PeerSetup
from bench.peers.transformers import load_model


class StaticPeer:
    admits_midway = False
    has_prefix_cache = False

    def __init__(self, setup: PeerSetup) -> None:
        self._model, self.version = load_model(setup)
        self._batch: list[tuple[int, Sequence[int], int]] = []

    def add(self, request_id: int, prompt: Sequence[int], output_tokens: int) -> None:
        self._batch.append((request_id, prompt, output_tokens))

    def step(self, emit: Emit) -> None:
        """The whole batch, from its prompts to its last token; every request asks for as many tokens."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        request_ids = [request_id for request_id, _, _ in self._batch]
        (output_tokens,) = {output_tokens for _, _, output_tokens in self._batch}
        width = max(len(prompt) for _, prompt, _ in self._batch)
        ids_BT = torch.zeros(len(self._batch), width, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, (_, prompt, _) in enumerate(self._batch):
            ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, width - len(prompt) :] = 1
        self._batch = []

        def watch(all_ids_BT: Any, logits_BV: Any) -> Any:
            """Stands where `generate` asks its logits processors, with greedy tokens about to be drawn."""
            is_finished = all_ids_BT.shape[1] == width + output_tokens - 1
            for request_id, token in zip(request_ids, logits_BV.argmax(-1).tolist(), strict=True):
                emit(request_id, [token], is_finished)
            return logits_BV

        with torch.inference_mode():
            self._model.generate(
                ids_BT,
                attention_mask=mask_BT,
                logits_processor=LogitsProcessorList([watch]),
                generation_config=GenerationConfig(
                    max_new_tokens=output_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    bos_token_id=None,
                    pad_token_id=0,
                ),
            )

    def close(self) -> None:
        """Nothing runs between steps."""


def open_peer(setup: PeerSetup) -> Peer:
    return StaticPeer(setup)
