"""What a run was asked for, and its folder, which remembers it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slimkern.cli._display import Display
from slimkern.training import DistillationWeights, TrainingSettings
from slimkern.training.data import Pair


class InterruptedRunError(Exception):
    """The user pressed Ctrl-C; a checkpoint has been saved."""


class RunError(RuntimeError):
    """A run can't go on; the message says why and what to do."""


@dataclass(frozen=True)
class Split:
    """Rows of one file."""

    name: str
    path: str
    pairs: list[Pair] = field(repr=False)


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides a run's result, beside its data.

    Attributes:
        model: folder or hub name of the dense model.
        task: ``embeddings``, ``regression`` or ``classification``.
        ffn2_sparsity, mha_sparsity: fractions of FFN channels and heads to remove.
        dense: how the dense teacher is trained; ``None``: it is used as it is.
        slim: how the masked model is trained.
        weights: of the distillation.
        teacher: folder of a dense teacher that is there already.
        warm_epochs, cooldown_epochs: before the sparsity grows, and after.
        pruning: further keys of ``WeightPruningConfig``.
        patience: epochs without improvement on the evaluation file after which training stops.
        max_length: tokens per sequence.
    """

    model: str
    task: str
    ffn2_sparsity: float
    mha_sparsity: float
    dense: TrainingSettings | None
    slim: TrainingSettings
    weights: DistillationWeights
    teacher: str | None = None
    warm_epochs: float | None = None
    cooldown_epochs: float | None = None
    pruning: dict[str, Any] = field(default_factory=dict)
    patience: int | None = None
    max_length: int = 128


def open_folder(
    folder: Path,
    settings: RunSettings,
    splits: Mapping[str, Split],
    display: Display,
    overwrite: bool = False,
) -> None:
    """Open the folder of a new run, or of one that was interrupted and asked for the same.

    Raises:
        RunError: the folder holds a run of other settings, a finished one, or foreign files.
    """
    description = {
        "settings": asdict(settings),
        "data": {s.name: {"path": s.path, "rows": len(s.pairs)} for s in splits.values()},
    }
    asked = json.loads(json.dumps(description))
    path = folder / "run.json"
    if overwrite and path.is_file():
        _clear(folder)
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(_differences(found, asked))
        if differing:
            raise RunError(
                f"--output {folder} holds a run with other settings "
                f"({', '.join(differing)}); give another folder, or --overwrite to start anew"
            )
        if (folder / "report.html").is_file():
            raise RunError(
                f"--output {folder} holds this run, finished; see its report.html, "
                f"or give --overwrite to run it again"
            )
        display.line(f"going on with the run in {folder}")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"--output {folder} is not empty and holds no run; give another")
    folder.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(asked, indent=1), encoding="utf-8")
    os.replace(scratch, path)


def _differences(found: Any, asked: Any, path: str = "") -> list[str]:
    """Dotted names of what differs."""
    if isinstance(found, dict) and isinstance(asked, dict):
        keys = sorted(set(found) | set(asked))
        return [
            d
            for k in keys
            for d in _differences(found.get(k), asked.get(k), f"{path}.{k}" if path else k)
        ]
    return [] if found == asked else [path]


def _clear(folder: Path) -> None:
    """Remove what a run has written, and nothing else."""
    for name in ("teacher", "teacher.part", "training", "slim", "report_files"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("run.json", "results.json", "report.html"):
        (folder / name).unlink(missing_ok=True)
