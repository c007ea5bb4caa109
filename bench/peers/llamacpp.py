"""llama.cpp in this process: one `llama_decode` per step over all live sequences.

A thin scheduler over the C API as llama-cpp-python binds it: decode rows first, then prompts in order of
arrival, in chunks. The C library shares no prefix by itself, so there is no prefix cache here.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.adapter import MAX_SEQUENCES, STEP_TOKENS, Emit, Peer, PeerSetup

WEIGHT_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
CONVERTER_SOURCE = "LLAMACPP_SOURCE"
"""Environment variable: a llama.cpp source tree, for its checkpoint converter."""
CONVERT_TIMEOUT_S = 1800.0


@dataclass(slots=True)
class _Sequence:
    """`pending` are tokens that no step has computed yet: the prompt, then the last token drawn."""

    request_id: int
    slot: int
    pending: list[int]
    num_left: int
    num_computed: int = 0


class LlamacppPeer:
    admits_midway = True
    has_prefix_cache = False

    def __init__(self, setup: PeerSetup) -> None:
        path = _convert(setup)
        import llama_cpp
        import numpy

        self._c: Any = llama_cpp
        self._numpy = numpy
        self.version = f"llama.cpp of llama-cpp-python {llama_cpp.__version__}"
        self._silence = llama_cpp.llama_log_callback(lambda _level, _text, _user: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context = llama_cpp.llama_init_from_model(self._model, self._context_parameters(setup))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(STEP_TOKENS, 0, 1)
        self._free = list(range(MAX_SEQUENCES))
        self._waiting: deque[tuple[int, Sequence[int], int]] = deque()
        self._live: list[_Sequence] = []

    def add(self, request_id: int, prompt: Sequence[int], output_tokens: int) -> None:
        self._waiting.append((request_id, prompt, output_tokens))

    def step(self, emit: Emit) -> None:
        self._admit()
        rows = list(self._fill())
        status = self._c.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        for sequence, row in rows:
            logits_p = self._c.llama_get_logits_ith(self._context, row)
            token = int(self._numpy.ctypeslib.as_array(logits_p, (self._vocab_size,)).argmax())
            sequence.pending = [token]
            sequence.num_left -= 1
            if sequence.num_left == 0:
                self._retire(sequence)
            emit(sequence.request_id, [token], sequence.num_left == 0)

    def close(self) -> None:
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)

    def _admit(self) -> None:
        while self._waiting and self._free:
            request_id, prompt, output_tokens = self._waiting.popleft()
            self._live.append(_Sequence(request_id, self._free.pop(), list(prompt), output_tokens))

    def _fill(self) -> Iterator[tuple[_Sequence, int]]:
        """Put the next tokens of every sequence into the batch; yields who gets a token, and its row."""
        count = 0
        for sequence in sorted(self._live, key=lambda one: len(one.pending) > 1):
            chunk = sequence.pending[: STEP_TOKENS - count]
            del sequence.pending[: len(chunk)]
            for offset, token in enumerate(chunk):
                row = count + offset
                is_last = not sequence.pending and offset == len(chunk) - 1
                self._batch.token[row], self._batch.pos[row] = token, sequence.num_computed + offset
                self._batch.n_seq_id[row], self._batch.seq_id[row][0] = 1, sequence.slot
                self._batch.logits[row] = is_last
            sequence.num_computed += len(chunk)
            count += len(chunk)
            if chunk and not sequence.pending:
                yield sequence, count - 1
        self._batch.n_tokens = count

    def _retire(self, sequence: _Sequence) -> None:
        self._c.llama_memory_seq_rm(self._memory, sequence.slot, -1, -1)
        self._free.append(sequence.slot)
        self._live.remove(sequence)

    def _context_parameters(self, setup: PeerSetup) -> Any:
        parameters = self._c.llama_context_default_params()
        parameters.n_ctx = setup.kv_tokens
        parameters.n_batch = STEP_TOKENS
        parameters.n_seq_max = MAX_SEQUENCES
        parameters.n_threads = parameters.n_threads_batch = setup.threads
        parameters.kv_unified = True
        kv_type = self._c.GGML_TYPE_F32 if setup.dtype == "float32" else self._c.GGML_TYPE_F16
        parameters.type_k = parameters.type_v = kv_type
        return parameters


def _convert(setup: PeerSetup) -> Path:
    """The GGUF copy of the checkpoint, written if it is not there. Raises CalledProcessError."""
    path = setup.converted_path(".gguf")
    if path.exists():
        return path
    source = os.environ.get(CONVERTER_SOURCE)
    if not source:
        raise RuntimeError(f"no {path}; to convert, set {CONVERTER_SOURCE} to a llama.cpp source tree")
    partial = path.with_suffix(f".{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    converter = [sys.executable, "-m", "bench.peers.gguf", source, setup.model, str(partial)]
    subprocess.run([*converter, WEIGHT_TYPES[setup.dtype]], check=True, timeout=CONVERT_TIMEOUT_S)
    partial.rename(path)
    return path


def open_peer(setup: PeerSetup) -> Peer:
    return LlamacppPeer(setup)
