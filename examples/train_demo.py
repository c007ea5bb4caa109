"""Train Wattline's two demonstration models from scratch, or check the ones in the repository.

Owns the training loop of `examples/models/*` and its command line; `demo_recipes.py` owns what is trained and
`demo_proof.py` how it is proved. It reads no network and uses one thread, so that one command gives the same
bytes on one machine with one torch. Run by hand, never by Wattline.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo_proof import (
    Verdict,
    check,
    judge,
    judge_faults,
    open_progress,
    prepare_libraries,
    print_reports,
    router_gaps,
    run_model,
)
from demo_recipes import (
    CORPUS_PATH,
    IGNORED_LABEL,
    RECIPES,
    Pair,
    Recipe,
    encode_pair,
    make_batches,
    pad_batch,
    read_pairs,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MODELS_DIR = Path(__file__).resolve().parent / "models"

WARMUP_EPOCHS = 4
CHECK_EVERY_EPOCHS = 5
CHECK_ABOVE_ACCURACY = 0.995
LEARNING_RATE_FLOOR = 0.02
MAX_GRADIENT_NORM = 1.0

# Training ends when the weakest token of all answers leads by this many logits, the weakest routing choice by
# this many router logits. Sharding in fp32 moves logits by about 1e-5, computing in bf16 by about 0.1.
MARGIN_WANTED = 4.0
ROUTER_GAP_WANTED = 0.02

# Each fault in the sharding must spoil at least this share of the answers.
FAULT_SHARE_WANTED = 0.02

# Beside the answers, the mixture of experts learns to use all experts and to choose without near ties.
ROUTER_BALANCE_WEIGHT = 0.01
ROUTER_GAP_WEIGHT = 0.1
ROUTER_GAP_TRAINED = 0.2

HELP = """\
Train Wattline's two demonstration models from scratch, or check the ones in the repository.

Each model has about a million weights and learns the questions and answers of
examples/demo_corpus/pairs.jsonl by heart, on one CPU thread, in a few minutes.
It is saved only when every greedy answer is exact with the weights rounded to
bf16, and by a margin that sharding or bf16 arithmetic cannot eat up.
"""
HELP_EXAMPLES = """\
examples:
  python examples/train_demo.py --check                 are the committed models exact?
  python examples/train_demo.py --model llama-demo      train one of them again: the same bytes
  python examples/train_demo.py --out DIR --seed 1      train both elsewhere, from another start
"""
TRAINING_COLUMN = "epochs, loss {task.fields[loss]:.4f}, accuracy {task.fields[accuracy]:.2%}, at most"


class RoundedAdamW:
    """Owns the fp32 weights that AdamW moves; the model only ever holds them rounded to bf16.

    The gradient passes straight through the rounding: training optimises the very weights that are
    saved, and saving changes nothing.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        import torch

        self._rounded = list(model.parameters())
        self._exact = [parameter.detach().clone() for parameter in self._rounded]
        self._optimizer = torch.optim.AdamW(self._exact, betas=(0.9, 0.95), weight_decay=0.0)
        self._round()

    def step(self, loss: torch.Tensor, *, learning_rate: float) -> None:
        import torch

        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._rounded, MAX_GRADIENT_NORM)
        for rounded, exact in zip(self._rounded, self._exact, strict=True):
            exact.grad, rounded.grad = rounded.grad, None
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self._round()

    def _round(self) -> None:
        import torch

        with torch.no_grad():
            for rounded, exact in zip(self._rounded, self._exact, strict=True):
                rounded.copy_(exact.to(torch.bfloat16))


def learning_rate_at(epoch: float, *, peak: float, epoch_count: int) -> float:
    """Linear warm-up, then half a cosine down to a small floor. `epoch` may be fractional."""
    if epoch < WARMUP_EPOCHS:
        return peak * (epoch + 0.1) / (WARMUP_EPOCHS + 0.1)
    progress = (epoch - WARMUP_EPOCHS) / (epoch_count - WARMUP_EPOCHS)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return peak * (LEARNING_RATE_FLOOR + (1 - LEARNING_RATE_FLOOR) * cosine)


class Trainer:
    """Owns the model in training: its optimizer and the random order of its pairs."""

    def __init__(self, recipe: Recipe, pairs: Sequence[Pair], *, seed: int) -> None:
        prepare_libraries(seed)
        self.tokenizer = recipe.build_tokenizer(pairs)
        self.model = recipe.build_model(self.tokenizer)
        self.examples = [encode_pair(self.tokenizer, pair) for pair in pairs]
        self._recipe = recipe
        self._optimizer = RoundedAdamW(self.model)
        self._rng = random.Random(seed)

    def run_epoch(self, epoch: int) -> tuple[float, float]:
        """One pass over all pairs; returns the mean loss and the share of answer tokens that were right."""
        loss_sum, right_count, token_count = 0.0, 0, 0
        batches = make_batches(self.examples, self._rng)
        for step, batch in enumerate(batches):
            inputs_BT, labels_BT = pad_batch(batch)
            outputs = run_model(self.model, inputs_BT)
            memory_loss = answer_loss(outputs, labels_BT)
            loss = memory_loss + router_loss(self.model, outputs)
            rate = learning_rate_at(
                epoch + step / len(batches),
                peak=self._recipe.peak_learning_rate,
                epoch_count=self._recipe.epoch_count,
            )
            self._optimizer.step(loss, learning_rate=rate)
            loss_sum += memory_loss.item()
            right_count += int((outputs.logits.argmax(dim=-1) == labels_BT).sum())
            token_count += int((labels_BT != IGNORED_LABEL).sum())
        return loss_sum / len(batches), right_count / token_count

    def is_finished(self, verdict: Verdict) -> bool:
        if verdict.margin < MARGIN_WANTED:
            return False
        if verdict.router_gap is not None and verdict.router_gap < ROUTER_GAP_WANTED:
            return False
        survivors = judge_faults(self.model, self.examples)
        return max(survivors.values()) <= (1 - FAULT_SHARE_WANTED) * len(self.examples)


def answer_loss(outputs: Any, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the answers' tokens."""
    import torch.nn.functional as functional

    return functional.cross_entropy(
        outputs.logits.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED_LABEL
    )


def router_loss(model: PreTrainedModel, outputs: Any) -> torch.Tensor | float:
    """The price of idle experts and of near ties between them; zero for a model without experts."""
    gaps = router_gaps(model, outputs)
    if gaps is None:
        return 0.0
    near_ties = (ROUTER_GAP_TRAINED - gaps).relu().mean(dim=1).sum()
    loss: torch.Tensor = ROUTER_BALANCE_WEIGHT * outputs.aux_loss + ROUTER_GAP_WEIGHT * near_ties
    return loss


def train(name: str, pairs: Sequence[Pair], *, seed: int, out_dir: Path) -> bool:
    """Train one model until it is robust and save it; False, and nothing saved, if it never was."""
    epoch_count = RECIPES[name].epoch_count
    trainer = Trainer(RECIPES[name], pairs, seed=seed)
    started = time.monotonic()
    with open_progress(TRAINING_COLUMN) as progress:
        task = progress.add_task(name, total=epoch_count, loss=math.inf, accuracy=0.0)
        for epoch in range(epoch_count):
            loss, accuracy = trainer.run_epoch(epoch)
            progress.update(task, advance=1, loss=loss, accuracy=accuracy)
            if (epoch + 1) % CHECK_EVERY_EPOCHS or accuracy < CHECK_ABOVE_ACCURACY:
                continue
            verdict = judge(trainer.model, trainer.examples)
            progress.console.print(f"{name} epoch {epoch + 1}: {verdict}")
            if trainer.is_finished(verdict):
                save(trainer.model, trainer.tokenizer, out_dir / name)
                progress.console.print(f"{name} saved after {time.monotonic() - started:.0f} s")
                return True
    return False


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, model_dir: Path) -> None:
    import torch
    from transformers import GenerationConfig

    config = model.config
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    model.to(torch.bfloat16).save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    for path in model_dir.iterdir():
        path.chmod(0o644)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=HELP, epilog=HELP_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", choices=[*RECIPES, "all"], default="all", help="which model (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, default=MODELS_DIR, metavar="DIR", help="parent folder (default: examples/models)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0, as committed)")
    parser.add_argument("--check", action="store_true", help="train nothing; verify the models in DIR")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when every chosen model is exact, else 1."""
    options = parse_arguments(arguments)
    pairs = read_pairs(CORPUS_PATH)
    names = list(RECIPES) if options.model == "all" else [options.model]
    for name in names:
        if options.check and not (options.out / name).is_dir():
            print(f"{name}: no model in {options.out}; train it first, without --check", file=sys.stderr)
            return 1
        if not options.check and not train(name, pairs, seed=options.seed, out_dir=options.out):
            print(f"{name}: not robust in time, nothing saved; try another --seed", file=sys.stderr)
            return 1
    reports = {name: check(name, pairs, options.out / name) for name in names}
    print_reports(reports)
    return 0 if all(report.is_exact() for report in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
