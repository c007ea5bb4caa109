"""The recipes of Wattline's two demonstration models: corpus, tokenizer, template, configuration, batches.

Owns everything about `examples/models/*` that is decided before training; `train_demo.py` does the training.
Both follow their big relatives closely, so that a loader which takes a short cut is found out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CORPUS_PATH = Path(__file__).resolve().parent / "demo_corpus" / "pairs.jsonl"
CONTEXT_LENGTH = 2048
PAIRS_PER_STEP = 34
LENGTH_BLUR_TOKENS = 12
IGNORED_LABEL = -100

LLAMA_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
GRANITE_SPECIAL = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")

# The split rule of Llama 3: contractions, words, up to three digits, punctuation, line ends, spaces.
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)
GRANITE_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}"
    "{{- message['content'] + '<|end_of_text|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_of_role|>assistant<|end_of_role|>' }}"
    "{%- endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One question with its only right answer. `system` is None where there is no system message."""

    system: str | None
    user: str
    assistant: str

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.user}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A pair as token ids: the rendered prompt, and the answer with its end-of-turn token."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def token_count(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What distinguishes one demonstration model from the other."""

    build_tokenizer: Callable[[Sequence[Pair]], PreTrainedTokenizerFast]
    build_model: Callable[[PreTrainedTokenizerFast], PreTrainedModel]
    peak_learning_rate: float
    epoch_count: int


def read_pairs(path: Path) -> list[Pair]:
    """Read one pair per line of JSON; a question asked twice is refused."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [Pair(system=row.get("system"), user=row["user"], assistant=row["assistant"]) for row in rows]
    questions = {(pair.system, pair.user) for pair in pairs}
    if len(questions) != len(pairs):
        raise ValueError(f"{path.name}: {len(pairs) - len(questions)} questions appear twice; remove them")
    return pairs


def build_llama_tokenizer(pairs: Sequence[Pair]) -> PreTrainedTokenizerFast:
    """Llama 3's conventions: its split rule, special tokens after the vocabulary, a start-of-text token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    learn_merges(bpe, pairs, vocabulary_size=1536 - len(LLAMA_SPECIAL), first_tokens=())
    bpe.add_special_tokens(list(LLAMA_SPECIAL))
    bos_token = LLAMA_SPECIAL[0]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A",
        pair=f"{bos_token} $A {bos_token}:1 $B:1",
        special_tokens=[(bos_token, bpe.token_to_id(bos_token))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos_token,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=LLAMA_CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_granite_tokenizer(pairs: Sequence[Pair]) -> PreTrainedTokenizerFast:
    """Granite 3's conventions: single digits, end of text at id 0, role tokens last, an odd vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    learn_merges(bpe, pairs, vocabulary_size=1533, first_tokens=GRANITE_SPECIAL[:1])
    bpe.add_special_tokens(list(GRANITE_SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|end_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
        chat_template=GRANITE_CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def learn_merges(
    bpe: Any, pairs: Sequence[Pair], *, vocabulary_size: int, first_tokens: Sequence[str]
) -> None:
    """Train a byte-level BPE on the corpus. It starts from all 256 bytes, so any text can be encoded."""
    from tokenizers import decoders, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(first_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for pair in pairs for text in (pair.system, pair.user, pair.assistant) if text]
    bpe.train_from_iterator(texts, trainer)
    bpe.decoder = decoders.ByteLevel()


def build_llama_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CONTEXT_LENGTH // 32,
        },
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def build_granite_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    config = GraniteMoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        initializer_range=0.05,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0625,
        logits_scaling=6.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GraniteMoeForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


RECIPES = {
    "llama-demo": Recipe(
        build_tokenizer=build_llama_tokenizer,
        build_model=build_llama_model,
        peak_learning_rate=3e-3,
        epoch_count=120,
    ),
    "granite-moe-demo": Recipe(
        build_tokenizer=build_granite_tokenizer,
        build_model=build_granite_model,
        peak_learning_rate=6e-3,
        epoch_count=120,
    ),
}


def encode_pair(tokenizer: PreTrainedTokenizerFast, pair: Pair) -> Example:
    """The prompt is what a server builds from the chat template; the answer ends its turn."""
    prompt = tokenizer.apply_chat_template(pair.messages, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer(pair.assistant, add_special_tokens=False).input_ids
    return Example(prompt_ids=tuple(prompt_ids), answer_ids=(*answer_ids, tokenizer.eos_token_id))


def make_batches(examples: Sequence[Example], rng: random.Random | None) -> list[Sequence[Example]]:
    """Group examples of similar length. With `rng`, lengths are blurred and batches shuffled."""
    blur = [rng.uniform(0, LENGTH_BLUR_TOKENS) if rng else 0.0 for _ in examples]
    order = sorted(range(len(examples)), key=lambda index: examples[index].token_count + blur[index])
    ordered = [examples[index] for index in order]
    batches: list[Sequence[Example]] = [
        ordered[start : start + PAIRS_PER_STEP] for start in range(0, len(ordered), PAIRS_PER_STEP)
    ]
    if rng:
        rng.shuffle(batches)
    return batches


def pad_batch(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and next-token labels, both [batch, time], padded on the right; only answers have labels.

    The causal mask hides the padding from all real positions, so the model needs no attention mask.
    """
    import torch

    longest = max(example.token_count for example in batch) - 1
    inputs_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    labels_BT = torch.full((len(batch), longest), IGNORED_LABEL)
    for row, example in enumerate(batch):
        ids = torch.tensor(example.prompt_ids + example.answer_ids)
        answer_start = len(example.prompt_ids)
        inputs_BT[row, : len(ids) - 1] = ids[:-1]
        labels_BT[row, answer_start - 1 : len(ids) - 1] = ids[answer_start:]
    return inputs_BT, labels_BT
