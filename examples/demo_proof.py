"""The proof that a demonstration model is what it claims to be: exact, by a margin, and sensitive to faults.

Owns the measuring; `train_demo.py` decides when it is enough. Changes no weight and reads no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo_faults import broken, list_faults
from demo_recipes import IGNORED_LABEL, Example, Pair, encode_pair, make_batches, pad_batch

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ANSWER_COLUMN = "answers,"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How far the wanted token of every answer position leads the best other one: one minimum per example.

    A margin above zero means that the greedy answer is exact. `router_gap` is the smallest lead of the last
    chosen expert over the first that was not; None for a model without experts.
    """

    margins: tuple[float, ...]
    router_gap: float | None

    @property
    def exact_count(self) -> int:
        return sum(margin > 0 for margin in self.margins)

    @property
    def margin(self) -> float:
        return min(self.margins)

    def __str__(self) -> str:
        gap = "" if self.router_gap is None else f", router gap {self.router_gap:.4f}"
        return f"{self.exact_count}/{len(self.margins)} exact, margin {self.margin:.2f}{gap}"


def run_model(model: PreTrainedModel, inputs_BT: torch.Tensor) -> Any:
    """One forward pass; a mixture of experts also returns its router logits and balance loss."""
    has_experts = hasattr(model.config, "num_local_experts")
    return model(input_ids=inputs_BT, **({"output_router_logits": True} if has_experts else {}))


def router_gaps(model: PreTrainedModel, outputs: Any) -> torch.Tensor | None:
    """Lead of the last chosen expert over the next, [layers, batch * time]; None without experts."""
    import torch

    if not hasattr(model.config, "num_local_experts"):
        return None
    chosen = model.config.num_experts_per_tok
    ranked: torch.Tensor = torch.stack(outputs.router_logits).float().sort(dim=-1, descending=True).values
    return ranked[..., chosen - 1] - ranked[..., chosen]


def answer_margins(outputs: Any, labels_BT: torch.Tensor) -> torch.Tensor:
    """Lead of the wanted token over the best other one at the weakest token of each answer, [batch]."""
    wanted_BT1 = labels_BT.clamp(min=0).unsqueeze(-1)
    logits_BTV = outputs.logits.float()
    wanted_logits_BT = logits_BTV.gather(-1, wanted_BT1).squeeze(-1)
    best_other_BT = logits_BTV.scatter(-1, wanted_BT1, float("-inf")).amax(dim=-1)
    leads_BT = wanted_logits_BT - best_other_BT
    margins_B: torch.Tensor = leads_BT.masked_fill(labels_BT == IGNORED_LABEL, float("inf")).amin(dim=-1)
    return margins_B


def judge(model: PreTrainedModel, examples: Sequence[Example]) -> Verdict:
    """Read every answer once with teacher forcing and measure the margins that greedy decoding would have."""
    import torch

    margins: list[float] = []
    smallest_gaps: list[float] = []
    for batch in make_batches(examples, rng=None):
        inputs_BT, labels_BT = pad_batch(batch)
        with torch.no_grad():
            outputs = run_model(model, inputs_BT)
        margins += answer_margins(outputs, labels_BT).tolist()
        gaps = router_gaps(model, outputs)
        if gaps is not None:
            lengths = torch.tensor([example.token_count - 1 for example in batch])
            is_real_BT = torch.arange(inputs_BT.shape[1]) < lengths.unsqueeze(-1)
            smallest_gaps.append(gaps[:, is_real_BT.flatten()].min().item())
    return Verdict(margins=tuple(margins), router_gap=min(smallest_gaps, default=None))


def judge_faults(model: PreTrainedModel, examples: Sequence[Example]) -> dict[str, int]:
    """How many answers stay exact under each fault of the sharding; few should."""
    survivors = {}
    for fault in list_faults(model):
        with broken(fault):
            survivors[fault.name] = judge(model, examples).exact_count
    return survivors


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `--check` found out about one saved model."""

    wrong_questions: tuple[str, ...]
    in_fp32: Verdict
    in_bf16: Verdict
    survivors: dict[str, int]

    def is_exact(self) -> bool:
        return not self.wrong_questions and self.in_bf16.exact_count == len(self.in_bf16.margins)


def check(name: str, pairs: Sequence[Pair], model_dir: Path) -> Report:
    """Load a saved model as a server would and compare every greedy answer with the corpus."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare_libraries(seed=0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True, dtype=torch.float32)
    examples = [encode_pair(tokenizer, pair) for pair in pairs]
    wrong_questions = []
    with open_progress(ANSWER_COLUMN) as progress:
        for pair, example in progress.track(list(zip(pairs, examples, strict=True)), description=name):
            if not answers_exactly(model, tokenizer, pair, example):
                wrong_questions.append(pair.user)
    in_fp32 = judge(model, examples)
    survivors = judge_faults(model, examples)
    in_bf16 = judge(model.to(torch.bfloat16), examples)
    return Report(
        wrong_questions=tuple(wrong_questions), in_fp32=in_fp32, in_bf16=in_bf16, survivors=survivors
    )


def answers_exactly(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pair: Pair, example: Example
) -> bool:
    """Generate greedily with a KV cache; both the tokens and the text must be right."""
    import torch

    prompt_BT = torch.tensor([example.prompt_ids])
    output_BT = model.generate(
        prompt_BT,
        attention_mask=torch.ones_like(prompt_BT),
        max_new_tokens=len(example.answer_ids) + 8,
        do_sample=False,
    )
    answer_ids = output_BT[0, prompt_BT.shape[1] :].tolist()
    text = tokenizer.decode(answer_ids, skip_special_tokens=True)
    return tuple(answer_ids) == example.answer_ids and text == pair.assistant


def print_reports(reports: dict[str, Report]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "pairs", "wrong", "margin fp32", "margin bf16", "router gap")
    for name, report in reports.items():
        gap = report.in_fp32.router_gap
        table.add_row(
            name,
            str(len(report.in_fp32.margins)),
            str(len(report.wrong_questions)),
            f"{report.in_fp32.margin:.2f}",
            f"{report.in_bf16.margin:.2f}",
            "-" if gap is None else f"{gap:.4f}",
        )
    faults = Table("model", "with this fault", "answers still exact")
    for name, report in reports.items():
        for fault, survivor_count in report.survivors.items():
            faults.add_row(name, fault, str(survivor_count))
    console = Console()
    console.print(table, faults)
    for name, report in reports.items():
        for question in report.wrong_questions:
            console.print(f"{name} answers wrongly: {question}", style="red", markup=False)


def prepare_libraries(seed: int) -> None:
    """One thread and fixed seeds, so sums are always added in the same order; no progress bars but ours."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)


def open_progress(column: str) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(column),
        TimeRemainingColumn(),
    )
