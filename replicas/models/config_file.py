"""`config.json` of a checkpoint folder, read into a ModelSpec through transformers' AutoConfig.

Reads no weights and runs no code of the folder. AutoConfig imports torch where it finds it: `spec_reader.py`
is the way to a spec for a process that has neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from replicas.errors import BadCheckpoint
from replicas.models.spec import ModelSpec, RopeSpec

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "GraniteForCausalLM": "granite",
    "GraniteMoeForCausalLM": "granitemoe",
}
"""Served architectures, with the `model_type` each must come with."""
_ROPE_KINDS = ("default", "llama3")


def read_spec(folder: Path) -> ModelSpec:
    """Read `config.json` and `generation_config.json`; BadCheckpoint says what is not served and why."""
    raw = _read_json(folder / "config.json")
    architecture = _served_architecture(raw, folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError, StrictDataclassError) as error:
        raise BadCheckpoint(f"{folder}/config.json cannot be read: {error}") from error
    _refuse_unserved(config, folder)
    is_moe = ARCHITECTURES[architecture] == "granitemoe"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        ffn_size=config.intermediate_size,
        num_experts=config.num_local_experts if is_moe else 0,
        experts_per_token=config.num_experts_per_tok if is_moe else 0,
        norm_eps=float(config.rms_norm_eps),
        rope=_rope_of(config, folder),
        is_head_tied=bool(config.tie_word_embeddings),
        context_tokens=config.max_position_embeddings,
        eos_token_ids=_eos_of(config, folder),
        attention_scale=float(getattr(config, "attention_multiplier", head_dim**-0.5)),
        embedding_multiplier=float(getattr(config, "embedding_multiplier", 1.0)),
        residual_multiplier=float(getattr(config, "residual_multiplier", 1.0)),
        logits_divisor=float(getattr(config, "logits_scaling", 1.0)),
    )
    _check_shape(spec, folder)
    return spec


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{path} is missing; a model is a folder as save_pretrained writes it") from error
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} is not a JSON object")
    return content


def _served_architecture(raw: dict[str, Any], folder: Path) -> str:
    if "auto_map" in raw:
        raise BadCheckpoint(f"{folder}/config.json has auto_map: code shipped with a model is never run")
    if raw.get("quantization_config"):
        raise BadCheckpoint(f"{folder}/config.json has quantization_config; serve the unquantised checkpoint")
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture not in ARCHITECTURES or raw.get("model_type") != ARCHITECTURES[architecture]:
        raise BadCheckpoint(
            f"{folder}/config.json: architectures={named!r}, model_type={raw.get('model_type')!r}; "
            f"served: {', '.join(f'{name} ({kind})' for name, kind in ARCHITECTURES.items())}"
        )
    return str(architecture)


def _refuse_unserved(config: Any, folder: Path) -> None:
    for flag in ("attention_bias", "mlp_bias"):
        if getattr(config, flag, False):
            raise BadCheckpoint(f"{folder}/config.json: {flag}=true; only linears without bias are served")
    if config.hidden_act != "silu":
        raise BadCheckpoint(f"{folder}/config.json: hidden_act={config.hidden_act!r}; only 'silu' is served")


def _rope_of(config: Any, folder: Path) -> RopeSpec:
    """transformers turns the older `rope_theta` and `rope_scaling` into `rope_parameters`."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_KINDS:
        raise BadCheckpoint(f"{folder}/config.json: rope_type={kind!r}; served: {', '.join(_ROPE_KINDS)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise BadCheckpoint(
            f"{folder}/config.json: partial_rotary_factor is not 1; whole heads are rotated here"
        )
    if kind == "default":
        return RopeSpec(theta=float(rope["rope_theta"]))
    try:
        return RopeSpec(
            theta=float(rope["rope_theta"]),
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_context_tokens=int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise BadCheckpoint(f"{folder}/config.json: rope type llama3 without {error}") from error


def _eos_of(config: Any, folder: Path) -> tuple[int, ...]:
    """The generation config decides where there is one, as in `generate`."""
    path = folder / "generation_config.json"
    found = _read_json(path).get("eos_token_id") if path.exists() else None
    if found is None:
        found = config.eos_token_id
    if found is None:
        return ()
    ids = found if isinstance(found, list) else [found]
    if not all(isinstance(token_id, int) and 0 <= token_id < config.vocab_size for token_id in ids):
        raise BadCheckpoint(f"{folder}: eos_token_id={found!r} is not within vocab_size={config.vocab_size}")
    return tuple(dict.fromkeys(ids))


def _check_shape(spec: ModelSpec, folder: Path) -> None:
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
    for name in (*sizes, "context_tokens"):
        if getattr(spec, name) < 1:
            raise BadCheckpoint(f"{folder}/config.json: {name}={getattr(spec, name)}; at least 1")
    if spec.num_heads % spec.num_kv_heads:
        raise BadCheckpoint(
            f"{folder}/config.json: num_attention_heads={spec.num_heads} is not a multiple of "
            f"num_key_value_heads={spec.num_kv_heads}"
        )
    if spec.head_dim % 2:
        raise BadCheckpoint(
            f"{folder}/config.json: head_dim={spec.head_dim} is odd; rotary pairs need it even"
        )
    if spec.num_experts and not 1 <= spec.experts_per_token <= spec.num_experts:
        raise BadCheckpoint(
            f"{folder}/config.json: num_experts_per_tok={spec.experts_per_token} of "
            f"num_local_experts={spec.num_experts}"
        )
