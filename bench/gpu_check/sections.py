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
    """`module` is imported when the section runs: how Triton works is chosen before that."""

    name: str
    module: str
    budget_s: float
    answers: str

    def load(self) -> RunSection:
        return cast(RunSection, importlib.import_module(f"bench.gpu_check.{self.module}").run)


SECTIONS = (
    Section(
        name="numerics",
        module="numerics",
        budget_s=45,
        answers="whole small models of the three architectures against transformers and float64",
    ),
    Section(
        name="kernels",
        module="kernels",
        budget_s=100,
        answers="every kernel against float64, with microseconds, GB/s and TFLOP/s",
    ),
    Section(
        name="graphs", module="graphs", budget_s=30, answers="captured decode steps draw the same tokens"
    ),
    Section(
        name="engine",
        module="engine",
        budget_s=45,
        answers="the engine over graphs, uploads and late reads draws the same tokens, and how fast",
    ),
    Section(
        name="meter",
        module="meter",
        budget_s=25,
        answers="the NVML counter: edges, cost of a call, idle watts, counter against integral",
    ),
    Section(
        name="rates", module="rates", budget_s=15, answers="measured bandwidth and matmul rate of the device"
    ),
    Section(
        name="speed",
        module="speed",
        budget_s=100,
        answers="decode and prefill tok/s of the served shapes, share of the roofline, J/token",
    ),
    Section(name="peer", module="peer", budget_s=45, answers="transformers' generate on the same shapes"),
    Section(
        name="one-shot",
        module="one_shot",
        budget_s=35,
        answers="varlen attention at pages of 16/64/256; grouped_mm against the expert kernels",
    ),
)


def section_named(name: str) -> Section:
    return next(section for section in SECTIONS if section.name == name)
