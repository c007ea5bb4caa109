"""OpenVINO GenAI's continuous batching pipeline, stepped by the caller.

Its own format is written once by optimum-intel, next to the other converted copies.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers.adapter import KV_CACHE_BYTES, MAX_SEQUENCES, STEP_TOKENS, Emit, Peer, PeerSetup

WEIGHT_FORMATS = {"float32": "fp32", "float16": "fp16"}
EXPORT_TIMEOUT_S = 1800.0


class OpenvinoPeer:
    admits_midway = True

    def __init__(self, setup: PeerSetup) -> None:
        if setup.dtype not in WEIGHT_FORMATS:
            raise ValueError(f"openvino exports no {setup.dtype}; one of {', '.join(WEIGHT_FORMATS)}")
        folder = _export(setup)
        import numpy
        import openvino
        import openvino_genai

        self._numpy, self._openvino, self._genai = numpy, openvino, openvino_genai
        self.version = f"openvino-genai {openvino_genai.__version__.split('-')[0]}"
        self.has_prefix_cache = setup.prefix_caching
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = KV_CACHE_BYTES // 2**30
        scheduling.max_num_seqs = MAX_SEQUENCES
        scheduling.max_num_batched_tokens = STEP_TOKENS
        scheduling.dynamic_split_fuse = True
        scheduling.enable_prefix_caching = setup.prefix_caching
        kv_type = openvino.Type.f32 if setup.dtype == "float32" else openvino.Type.f16
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(
            str(folder),
            scheduler_config=scheduling,
            device="CPU",
            properties={
                "INFERENCE_NUM_THREADS": setup.threads,
                "INFERENCE_PRECISION_HINT": openvino.Type.f32,
                "KV_CACHE_PRECISION": kv_type,
            },
        )
        self._live: dict[int, Any] = {}

    def add(self, request_id: int, prompt: Sequence[int], output_tokens: int) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        tokens = self._openvino.Tensor(self._numpy.array([prompt], dtype=self._numpy.int64))
        self._live[request_id] = self._pipeline.add_request(request_id, tokens, config)

    def step(self, emit: Emit) -> None:
        self._pipeline.step()
        for request_id, handle in list(self._live.items()):
            new: list[int] = []
            while handle.can_read():
                for output in handle.read().values():
                    new += output.generated_ids
            is_finished = handle.get_status() != self._genai.GenerationStatus.RUNNING
            if is_finished:
                del self._live[request_id]
            if new or is_finished:
                emit(request_id, new, is_finished)

    def close(self) -> None:
        """The pipeline lives in this process and ends with it."""


def _export(setup: PeerSetup) -> Path:
    """The folder of the exported checkpoint, written if it is not there. Raises CalledProcessError."""
    folder = setup.converted_path(".openvino")
    if folder.exists():
        return folder
    partial = folder.with_suffix(f".{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    exporter = Path(sys.executable).parent / "optimum-cli"
    task = ["--task", "text-generation-with-past", "--weight-format", WEIGHT_FORMATS[setup.dtype]]
    subprocess.run(
        [str(exporter), "export", "openvino", "--model", setup.model, *task, str(partial)],
        check=True,
        timeout=EXPORT_TIMEOUT_S,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    partial.rename(folder)
    return folder


def open_peer(setup: PeerSetup) -> Peer:
    return OpenvinoPeer(setup)
