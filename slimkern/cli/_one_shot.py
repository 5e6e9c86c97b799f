"""The one-shot road of a run: calibrate and cut, heal, and the same for a family of models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import set_seed

import slimkern
from slimkern.checkpoint import PLAN_FILE
from slimkern.cli._calibration import calibration_batches
from slimkern.cli._display import Bar
from slimkern.cli._run import Run
from slimkern.cli._run_folder import write_json
from slimkern.training import DistillTrainer, HealingSettings, TrainingSettings, disable_dropout
from slimkern.training.task import Texts

if TYPE_CHECKING:
    from slimkern.one_shot import OneShot

CUT, HEAL = "one-shot", "heal"
CUT_FAMILY, HEAL_FAMILY = "one-shot, the family", "heal the family"


@dataclass(frozen=True)
class Variant:
    """One slim model of a run.

    Attributes:
        name: what it is called in the report.
        folder: holds ``oneshot/`` (before healing), ``one_shot.json`` (what the cut has to tell)
            and ``slim/`` (the result).
        training: how it is healed; ``None``: not at all.
        speedup: of a family's member, what was asked for.
    """

    name: str
    folder: Path
    training: TrainingSettings | None
    speedup: float | None = None

    @property
    def unhealed(self) -> Path:
        """The folder of the model as the cut left it."""
        return self.folder / "oneshot"

    def told(self) -> dict[str, Any]:
        """What the cut has to tell: its seconds, its notes, the predicted cost."""
        text = (self.folder / "one_shot.json").read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        return found

    @property
    def is_cut(self) -> bool:
        """Whether the cut is done, here or in a run that was interrupted later."""
        there = (self.unhealed / PLAN_FILE, self.folder / "one_shot.json")
        return all(path.is_file() for path in there)


def main_variant(run: Run) -> Variant:
    """The model that a run is about."""
    return Variant("slim", run.folder, run.settings.slim)


def family_variants(run: Run) -> list[Variant]:
    """The further models of a run, in the order that was asked for."""
    return [
        Variant(f"{s:g}x", run.folder / "family" / f"{s:g}x", run.settings.family_slim, s)
        for s in run.settings.family
    ]


def cut(run: Run, texts: Texts | None) -> None:
    """Calibrate, and write ``oneshot/`` of every variant that an earlier run has not written.

    Args:
        run: the run, with its dense teacher.
        texts: what calibrates; ``None``: the rows that the slim model is healed on.

    Raises:
        ValueError: the data can't calibrate the model, or the target can't be reached.
    """
    asked = run.settings.one_shot
    assert asked is not None, "the gradual road cuts while it trains"
    run.calibration = calibration_batches(run, texts)
    main, family = main_variant(run), family_variants(run)
    common: dict[str, Any] = {
        "criterion": asked.criterion,
        "round_multiplier": asked.round_multiplier,
        "latency_shape": run.latency_shape,
    }
    if not main.is_cut:
        wanted: dict[str, float] = asked.target or {
            "ffn2_sparsity": run.settings.ffn2_sparsity,
            "mha_sparsity": run.settings.mha_sparsity,
        }
        with run.display.stage(CUT) as bar:
            dense = run.load(str(run.teacher_folder)).eval()
            progress = _Progress(bar)
            result = slimkern.one_shot(
                dense, run.calibration, progress=progress, **wanted, **common
            )
            _keep(run, main, result)
    if not all(variant.is_cut for variant in family):
        with run.display.stage(CUT_FAMILY) as bar:
            dense = run.load(str(run.teacher_folder)).eval()
            results = slimkern.one_shot_family(
                dense,
                run.calibration,
                target_speedup=run.settings.family,
                progress=_Progress(bar),
                **common,
            )
            for variant, result in zip(family, results, strict=True):
                _keep(run, variant, result)


def healed(run: Run, variants: Sequence[Variant]) -> dict[str, nn.Module]:
    """The model of every variant by its name, after its healing where there is one.

    Raises:
        InterruptedRunError: Ctrl-C; a checkpoint lies in the run's folder.
    """
    models = {variant.name: _heal(run, variant) for variant in variants}
    run.forget_teacher()
    return models


def _heal(run: Run, variant: Variant) -> nn.Module:
    """Distil from the dense model, and return the best epoch's model.

    The model as the cut left it is the epoch before the first: where no epoch is better on the
    evaluation file, it is the result.
    """
    model = slimkern.load(variant.unhealed)
    settings = variant.training
    if settings is None:
        return model
    assert run.slimming_rows is not None, "there are rows where anything is trained"
    set_seed(settings.seed)
    weights = run.settings.weights
    teacher = run.teacher(weights.hidden > 0) if weights.needs_teacher else None
    average = None
    if isinstance(settings, HealingSettings):
        settings.prepare(model)
        average = settings.averaging()
    elif not settings.dropout:
        disable_dropout(model)
    before = run.score(model)
    scratch = variant.folder / "training" / "heal"
    best = run.keep_best(scratch, average=average)
    trainer = DistillTrainer(
        model,
        run.task,
        run.slimming_rows,
        settings.arguments(scratch),
        weights,
        teacher,
        callbacks=[best] if average is None else [average, best],
    )
    stage = HEAL if variant.speedup is None else HEAL_FAMILY
    run.train(trainer, model, stage, best)
    if variant.speedup is None:
        run.history = [{"step": 0, "epoch": 0.0, "score": before}, *trainer.state.log_history]
    if best.best is not None and best.best < before:
        run.display.line(
            f"note: healing did not improve {variant.name} on the evaluation file "
            f"({before:.4f} before, {best.best:.4f} at best): it stays as it was"
        )
        return slimkern.load(variant.unhealed)
    return model.cpu().eval()


def _keep(run: Run, variant: Variant, result: OneShot) -> None:
    """Write what :func:`healed` goes on from, and say how far the cut came."""
    predicted = result.predicted
    told: dict[str, Any] = {
        "seconds": result.seconds,
        "notes": list(result.plan.notes),
    }
    if predicted is not None:
        told["predicted"] = {
            "unit": predicted.unit,
            "dense": float(predicted.dense),
            "slim": float(predicted.slim),
        }
    for note in result.plan.notes:
        run.display.line(f"note: {note}")
    variant.folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(variant.unhealed, ignore_errors=True)
    write_json(variant.folder / "one_shot.json", told)
    slimkern.save(result.model, variant.unhealed, source=run.teacher_folder)


class _Progress:
    """What ``one_shot`` reports, on a stage's bar."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.bar(done, total)
        self.bar.say(stage)
