"""What a long run shows: one progress bar per stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int, int], None]


class Bar:
    """One stage's bar: ``bar(done, total)`` moves it, ``bar.say(text)`` writes beside it."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=None, detail="")

    def __call__(self, done: int, total: int) -> None:
        """Show ``done`` of ``total``."""
        self._progress.update(self._task, completed=done, total=total)

    def say(self, text: str) -> None:
        """Replace the text beside the bar."""
        self._progress.update(self._task, detail=text)


class Display:
    """Bars and lines of a run, on standard error so that standard output stays for results.

    Attributes:
        stages: seconds of every stage, by name, in order; what a stage took before it was
            interrupted counts.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.stages: dict[str, float] = {}
        self._kept: Path | None = None

    def keep_stages(self, path: Path) -> None:
        """Go on with the times of a file, if it is there, and keep them in it from now on."""
        self._kept = path
        if path.is_file():
            for name, seconds in json.loads(path.read_text(encoding="utf-8")).items():
                self.stages[name] = self.stages.get(name, 0.0) + seconds
        self._write_stages()

    def _write_stages(self) -> None:
        if self._kept is not None:
            scratch = self._kept.with_suffix(".part")
            scratch.write_text(json.dumps(self.stages, indent=1), encoding="utf-8")
            os.replace(scratch, self._kept)

    def line(self, text: str) -> None:
        """Write one line above the bars."""
        self.console.print(text, soft_wrap=True, markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[Bar]:
        """A stage of the run, timed, with a bar."""
        start = time.perf_counter()
        if not self.console.is_terminal:
            self.line(f"{name} ...")
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[detail]}", markup=False),
        )
        hidden = not self.console.is_terminal
        try:
            progress = Progress(*columns, console=self.console, disable=hidden, transient=True)
            with progress:
                yield Bar(progress, name)
        finally:
            seconds = time.perf_counter() - start
            self.stages[name] = self.stages.get(name, 0.0) + seconds
            self._write_stages()
        self.line(f"{name}: {seconds:.1f} s")
