"""Who attends on a GPU: what is refused, and why; what is settled without a measurement."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from replicas.attention_choice import (
    TRITON_ALONE,
    VARLEN_ALONE,
    AttentionChoice,
    Timing,
    VarlenFacts,
    check_attention,
    choose_attention,
    pick_faster,
    probed_rows,
    varlen_refusal,
)
from replicas.errors import BadKernels

FACTS = VarlenFacts(
    device="cuda", dtype="bfloat16", block_tokens=512, head_dim=128, capability=(9, 0), lacks=""
)
SETTING: dict[str, Any] = {"device": "auto", "dtype": "auto", "kernels": "auto", "block_tokens": 256}


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        ("flash", {}, "attention is 'flash'; one of auto, triton, varlen"),
        (
            "triton",
            {"device": "cpu"},
            "attention is 'triton', but device is 'cpu'; it needs cuda: set it to auto",
        ),
        (
            "varlen",
            {"kernels": "off"},
            "attention is 'varlen', but kernels is 'off'; it needs them: set kernels to auto",
        ),
        (
            "varlen",
            {"block_tokens": 16},
            "attention is 'varlen', but limits.block_tokens is 16; varlen reads pages of a multiple of 256 "
            "tokens: set it to 256 (or set attention to auto)",
        ),
        (
            "varlen",
            {"dtype": "float32"},
            "attention is 'varlen', but dtype is 'float32'; varlen takes bfloat16 and float16: set dtype to "
            "bfloat16 (or set attention to auto)",
        ),
    ],
)
def test_a_setting_that_can_never_be_says_why(asked: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadKernels) as refused:
        check_attention(asked, **(SETTING | changes))
    assert str(refused.value) == message


def test_what_can_be_is_let_through() -> None:
    check_attention("varlen", **SETTING)
    check_attention("triton", **(SETTING | {"dtype": "float32", "block_tokens": 16}))
    check_attention("auto", **(SETTING | {"device": "cpu", "kernels": "off", "block_tokens": 1}))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (FACTS, ""),
        (
            replace(FACTS, device="cpu"),
            "device is 'cpu'; torch's varlen attention runs on CUDA alone",
        ),
        (
            replace(FACTS, dtype="float32"),
            "dtype is 'float32'; varlen takes bfloat16 and float16: set dtype to bfloat16",
        ),
        (
            replace(FACTS, block_tokens=384),
            "limits.block_tokens is 384; varlen reads pages of a multiple of 256 tokens: set it to 256",
        ),
        (replace(FACTS, capability=(7, 5)), "the device has capability 7.5; at least 8.0"),
        (replace(FACTS, head_dim=100), "head_dim is 100; varlen takes multiples of 8 up to 256"),
        (replace(FACTS, head_dim=512), "head_dim is 512; varlen takes multiples of 8 up to 256"),
        (
            replace(FACTS, lacks="varlen_attn of torch 2.11 takes no block_table"),
            "varlen_attn of torch 2.11 takes no block_table",
        ),
    ],
)
def test_facts_refuse_varlen_with_the_reason(facts: VarlenFacts, reason: str) -> None:
    assert varlen_refusal(facts) == reason


def test_only_auto_where_varlen_can_be_is_measured() -> None:
    assert choose_attention("auto", "") is None
    assert choose_attention("auto", "no") == AttentionChoice(reason="no")
    assert choose_attention("triton", "") == choose_attention("triton", "no") == TRITON_ALONE
    assert choose_attention("varlen", "") == VARLEN_ALONE
    with pytest.raises(BadKernels, match=r"^attention is 'varlen', but no \(or set attention to auto\)$"):
        choose_attention("varlen", "no")


def test_varlen_begins_where_it_is_faster_from_there_on() -> None:
    """It gains at one row too, but not at eight."""
    decodes = [
        Timing(rows=rows, triton_ns=10_000, varlen_ns=varlen_ns)
        for rows, varlen_ns in ((1, 5_000), (8, 9_500), (64, 9_000), (256, 4_000))
    ]
    choice = pick_faster(decodes, Timing(rows=0, triton_ns=10_000, varlen_ns=9_001))
    assert str(choice) == (
        "decode=varlen from 64 rows prefill=triton reason=measured us of triton/varlen: 1 rows 10.0/5.0, "
        "8 rows 10.0/9.5, 64 rows 10.0/9.0, 256 rows 10.0/4.0, chunk 10.0/9.0"
    )
    assert [choice.has_varlen_decode(rows) for rows in (1, 63, 64, 300)] == [False, False, True, True]


def test_a_large_replica_is_probed_at_four_sizes() -> None:
    assert probed_rows(1) == (1,)
    assert probed_rows(8) == (1, 8)
    assert probed_rows(256) == (1, 8, 64, 256)
    assert probed_rows(1024) == (1, 8, 64, 256, 1024)
