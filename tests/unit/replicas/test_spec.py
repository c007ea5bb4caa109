"""A spec is read from both generations of config files; what is not served is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from replicas.errors import BadCheckpoint
from replicas.models.config_file import read_spec
from replicas.models.spec import ModelSpec, RopeSpec

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}
GRANITE_MOE: dict[str, object] = {
    **LLAMA,
    "architectures": ["GraniteMoeForCausalLM"],
    "model_type": "granitemoe",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0156,
    "logits_scaling": 6.0,
    "tie_word_embeddings": True,
}
LLAMA3_ROPE: dict[str, object] = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def read(folder: Path, config: dict[str, object], generation: dict[str, object] | None = None) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_spec(folder)


def test_a_llama_is_read_whole(tmp_path: Path) -> None:
    assert read(tmp_path, {**LLAMA, "rope_theta": 500_000.0}) == ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=100,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ffn_size=96,
        num_experts=0,
        experts_per_token=0,
        norm_eps=1e-6,
        rope=RopeSpec(theta=500_000.0),
        is_head_tied=False,
        context_tokens=256,
        eos_token_ids=(2,),
        attention_scale=0.25,
    )


def test_granite_multipliers_and_experts_are_read(tmp_path: Path) -> None:
    spec = read(tmp_path, GRANITE_MOE)
    assert (spec.num_experts, spec.experts_per_token, spec.is_head_tied) == (8, 2, True)
    assert (spec.embedding_multiplier, spec.residual_multiplier) == (12.0, 0.22)
    assert (spec.attention_scale, spec.logits_divisor) == (0.0156, 6.0)


def test_old_and_new_rope_settings_mean_the_same(tmp_path: Path) -> None:
    wanted = RopeSpec(
        theta=500_000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_tokens=128
    )
    old = {**LLAMA, "rope_theta": 500_000.0, "rope_scaling": LLAMA3_ROPE}
    new = {**LLAMA, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500_000.0}}
    assert read(tmp_path, old).rope == wanted
    assert read(tmp_path, new).rope == wanted


def test_a_given_head_dim_wins(tmp_path: Path) -> None:
    spec = read(tmp_path, {**LLAMA, "head_dim": 32})
    assert (spec.head_dim, spec.attention_scale) == (32, 32**-0.5)


def test_kv_heads_default_to_the_query_heads(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert read(tmp_path, config).num_kv_heads == 4


@pytest.mark.parametrize(("named", "ids"), [(7, (7,)), ([7, 9, 7], (7, 9)), (None, (2,))])
def test_the_generation_config_names_the_end(tmp_path: Path, named: object, ids: tuple[int, ...]) -> None:
    assert read(tmp_path, LLAMA, {"eos_token_id": named}).eos_token_ids == ids


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "served: LlamaForCausalLM"),
        ({"architectures": []}, "served: LlamaForCausalLM"),
        ({"model_type": "granite"}, "model_type='granite'"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "never run"),
        ({"quantization_config": {"bits": 4}}, "unquantised"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"hidden_act": "gelu"}, "only 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "not a multiple"),
        ({"num_attention_heads": 0}, "cannot be read: .* by zero"),
        ({"head_dim": 15}, "even"),
        ({"eos_token_id": 100}, "vocab_size=100"),
    ],
)
def test_what_is_not_served_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    with pytest.raises(BadCheckpoint, match=reason):
        read(tmp_path, {**LLAMA, **change})


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="missing"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="not readable JSON"):
        read_spec(tmp_path)
