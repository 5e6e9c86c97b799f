"""What a run was asked for, and its folder, which remembers it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slimkern.cli._display import Display
from slimkern.training import DistillationWeights, TrainingSettings
from slimkern.training.data import Pair

ONE_SHOT, GRADUAL = "one-shot", "gradual"
REPORT_FILE = "report.html"
RUN_FILE, STAGES_FILE = "run.json", "stages.json"


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
class OneShotSettings:
    """How the one-shot road calibrates and cuts.

    Attributes:
        target: the one budget, by the name of its argument (``{"target_speedup": 2.0}``); empty
            where sparsities are asked for.
        criterion: what decides which units go.
        round_multiplier: FFN widths that remain are multiples of it.
        calibration: file of the texts; ``None``: those of the healing's rows.
        calibration_rows: at most so many token sequences are drawn from them, by the run's seed.
        latency_shape: (batch, tokens) that latencies are predicted and compared for.
        unlabelled: file of texts that heal beside the training rows.
        seed: of that draw.
    """

    target: dict[str, float] = field(default_factory=dict)
    criterion: str = "obs"
    round_multiplier: int = 32
    calibration: str | None = None
    calibration_rows: int = 2048
    latency_shape: tuple[int, int] = (8, 128)
    unlabelled: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides a run's result, beside its data.

    Attributes:
        model: folder or hub name of the dense model.
        task: ``embeddings``, ``regression`` or ``classification``.
        ffn2_sparsity, mha_sparsity: fractions of FFN channels and heads to remove.
        dense: how the dense teacher is trained; ``None``: it is used as it is.
        slim: how the masked model is trained, or the slim one healed; ``None``: not at all.
        weights: of the distillation.
        method: ``one-shot`` or ``gradual``.
        one_shot: of the one-shot road; ``None`` for the other.
        family: speed-ups of further models.
        family_slim: how each of these is healed; ``None``: not at all.
        teacher: folder of a dense teacher that is there already.
        warm_epochs, cooldown_epochs: gradual: before the sparsity grows, and after.
        pruning: gradual: further keys of ``WeightPruningConfig``.
        patience: epochs without improvement on the evaluation file after which training stops.
        max_length: tokens per sequence.
    """

    model: str
    task: str
    ffn2_sparsity: float
    mha_sparsity: float
    dense: TrainingSettings | None
    slim: TrainingSettings | None
    weights: DistillationWeights
    method: str = GRADUAL
    one_shot: OneShotSettings | None = None
    family: tuple[float, ...] = ()
    family_slim: TrainingSettings | None = None
    teacher: str | None = None
    warm_epochs: float | None = None
    cooldown_epochs: float | None = None
    pruning: dict[str, Any] = field(default_factory=dict)
    patience: int | None = None
    max_length: int = 128


def describe(settings: RunSettings, splits: Mapping[str, Split]) -> dict[str, Any]:
    """What a run's folder remembers: its settings, and which data it was given."""
    data = {s.name: {"path": s.path, "rows": len(s.pairs)} for s in splits.values()}
    return {"settings": asdict(settings), "data": data}


def describe_teacher(settings: RunSettings, splits: Mapping[str, Split]) -> dict[str, Any]:
    """What a folder remembers that several runs share: all that their teacher depends on."""
    whole = describe(settings, splits)
    shared = ("model", "task", "dense", "teacher", "max_length")
    return {"settings": {k: whole["settings"][k] for k in shared}, "data": whole["data"]}


def open_folder(
    folder: Path,
    description: Mapping[str, Any],
    display: Display,
    overwrite: bool = False,
    shared: Sequence[str] = (),
) -> None:
    """Open the folder of a new run, or of one that was interrupted and asked for the same.

    Args:
        folder: created if it is not there.
        description: what :func:`describe` says of the run.
        display: where it is said that an interrupted run goes on.
        overwrite: start anew in a folder that holds a run. The folder of several runs is kept as
            it is where only their own folders are to be started anew.
        shared: the folder belongs to several runs, in subfolders of these names.

    Raises:
        RunError: the folder holds a run of other settings, a finished one, or foreign files.
    """
    asked = json.loads(json.dumps(description))
    path = folder / RUN_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if found is not None and overwrite and not (shared and found == asked):
        _clear(folder, shared)
        found = None
    if found is not None:
        differing = sorted(_differences(found, asked))
        if differing:
            raise RunError(
                f"--output {folder} holds a run with other settings "
                f"({', '.join(differing)}); give another folder, or --overwrite to start anew"
            )
        if shared:
            return
        if (folder / REPORT_FILE).is_file():
            raise RunError(
                f"--output {folder} holds this run, finished; see its {REPORT_FILE}, "
                f"or give --overwrite to run it again"
            )
        display.line(f"going on with the run in {folder}")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"--output {folder} is not empty and holds no run; give another")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, asked)


def write_json(path: Path, data: Any) -> None:
    """Write a file whole."""
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(data, indent=1), encoding="utf-8")
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


def _clear(folder: Path, shared: Sequence[str]) -> None:
    """Remove what a run has written, and nothing else."""
    folders = ("teacher", "teacher.part", "training", "oneshot", "slim", "family", *shared)
    for name in folders:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (RUN_FILE, STAGES_FILE, "one_shot.json", "results.json", REPORT_FILE):
        (folder / name).unlink(missing_ok=True)
