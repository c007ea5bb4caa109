"""The sections of the check in their order, with what each answers and how long it may take."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from bench.gpu_check.report import SectionReport

if TYPE_CHECKING:
    from bench.gpu_check.setting import Setting

RunSection = Callable[["Setting", SectionReport], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """`module` is imported when the section runs: how Triton works is chosen before that.

    `is_alone`: it measures, and nothing else may use the device; the others run side by side, so that their
    kernels compile on all cores. `shape`: the one served shape it is about.
    """

    name: str
    module: str
    budget_s: float
    answers: str
    is_alone: bool = True
    shape: str = ""

    def load(self) -> RunSection:
        return cast(RunSection, importlib.import_module(f"bench.gpu_check.{self.module}").run)


SECTIONS = (
    Section(
        name="numerics",
        module="numerics",
        budget_s=100,
        is_alone=False,
        answers="whole small models of the three architectures against transformers and float64",
    ),
    Section(
        name="kernels",
        module="kernels",
        budget_s=100,
        is_alone=False,
        answers="every kernel against float64, odd shapes and served ones",
    ),
    Section(
        name="graphs",
        module="graphs",
        budget_s=100,
        is_alone=False,
        answers="captured decode steps draw the same tokens",
    ),
    Section(
        name="tokens",
        module="engine_tokens",
        budget_s=100,
        is_alone=False,
        answers="the engine over graphs, uploads and late reads draws the same tokens",
    ),
    Section(
        name="served",
        module="served",
        budget_s=100,
        is_alone=False,
        answers="the served shapes at every batch size give finite logits; compiles what is measured later",
    ),
    Section(
        name="rates", module="rates", budget_s=20, answers="measured bandwidth and matmul rate of the device"
    ),
    Section(
        name="speed-1b",
        module="speed",
        budget_s=50,
        shape="Llama-3.2-1B",
        answers="tok/s of Llama-3.2-1B, share of the roofline, J/token, and where the time goes",
    ),
    Section(
        name="speed-8b",
        module="speed",
        budget_s=75,
        shape="Llama-3.1-8B",
        answers="the same of Llama-3.1-8B",
    ),
    Section(
        name="speed-moe",
        module="speed",
        budget_s=50,
        shape="granite-3.0-1b-a400m",
        answers="the same of granite-3.0-1b-a400m",
    ),
    Section(
        name="engine",
        module="engine_speed",
        budget_s=45,
        answers="the whole engine's tok/s, one step ahead or not",
    ),
    Section(
        name="times",
        module="kernel_times",
        budget_s=50,
        answers="microseconds, GB/s and TFLOP/s of every kernel and product at served shapes",
    ),
    Section(
        name="meter",
        module="meter",
        budget_s=25,
        answers="the NVML counter: edges, cost of a call, idle watts, counter against integral",
    ),
    Section(
        name="one-shot",
        module="one_shot",
        budget_s=25,
        answers="which attention auto takes at pages of 16 and 256; grouped_mm against the expert kernels",
    ),
    Section(name="peer", module="peer", budget_s=45, answers="transformers' generate on the same shapes"),
)


def section_named(name: str) -> Section:
    return next(section for section in SECTIONS if section.name == name)
