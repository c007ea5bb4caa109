"""What `up` shows while models load: a bar per model on a terminal, a line per change elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Loading(Protocol):
    """How far a model is; `cluster.serving.stack.ModelProgress` is one."""

    @property
    def model(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def fraction(self) -> float | None: ...


class LoadingScreen:
    """Shows the same models from start to end."""

    def __init__(self, console: Console, models: Sequence[str]) -> None:
        self._console = console
        self._said: dict[str, str] = {}
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[stage]}", markup=False),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks = {
            model: self._bars.add_task(model, total=None, stage="waiting for Ray") for model in models
        }

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def show(self, models: Sequence[Loading]) -> None:
        for model in models:
            if self._console.is_terminal:
                fraction = model.fraction
                self._bars.update(
                    self._tasks[model.model],
                    total=None if fraction is None else 1.0,
                    completed=fraction or 0.0,
                    stage=model.stage,
                )
            elif self._said.get(model.model) != model.stage:
                self._said[model.model] = model.stage
                self._console.print(f"{model.model}: {model.stage}", markup=False)
