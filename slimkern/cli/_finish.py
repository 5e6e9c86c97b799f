"""From trained models to folders, a table of results and a page."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import slimkern
from slimkern import machine
from slimkern.cli import _measure
from slimkern.cli._fused import fused_models
from slimkern.cli._fused import section as fused_section
from slimkern.cli._gradual import STAGE
from slimkern.cli._one_shot import CUT, HEAL, Variant, family_variants, main_variant
from slimkern.cli._run import TEACHER_PASS, Run
from slimkern.cli._run_folder import RunError
from slimkern.plan import SlimPlan
from slimkern.report import write_report
from slimkern.report.schema import Family, FamilyMember, OneShot, Results, layer_widths
from slimkern.training import Task
from slimkern.training.evaluation import Score, compare

_SLIMMING = (CUT, TEACHER_PASS, HEAL, STAGE)


def finish_gradual(run: Run, masked: nn.Module) -> tuple[dict[str, nn.Module], str]:
    """Slim, save, reload; check that each step changed nothing.

    Returns:
        the reloaded slim model by its name, and a sentence that says what was compared.

    Raises:
        RunError: the slim model differs from the masked one by more than rounding, or the reloaded
            one from the slim one by a single bit.
    """
    with run.display.stage("slim, save, reload"):
        before = _vectors(run.task, masked, run.probe())
        slim = slimkern.model_slim(masked)
        after, exact = _both_precisions(run, slim)
        # Both are roundings of the same function: the masked one may be off as the slim one is.
        off, rounding = _error(before, exact), _error(after, exact)
        allowed = 4 * rounding + torch.finfo(torch.float32).eps
        if not off <= allowed:
            raise RunError(f"slim and masked model differ: {off:.1e}, rounding is {rounding:.1e}")
        loaded = _saved(run, slim, run.folder / "slim", after)
    return {"slim": loaded}, (
        f"the masked model's outputs are the slim model's to rounding (against float64: "
        f"{off:.1e} and {rounding:.1e}, relative), the reloaded model's are equal bit by bit"
    )


def finish_one_shot(run: Run, models: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], str]:
    """Save and reload the models of all variants; check that this changed nothing.

    Raises:
        RunError: a model's outputs differ from its own in float64 by more than rounding, or a
            reloaded one's from the saved one's by a single bit.
    """
    loaded, worst = {}, 0.0
    with run.display.stage("save, reload"):
        for variant in (main_variant(run), *family_variants(run)):
            model = models[variant.name]
            after, exact = _both_precisions(run, model)
            off, allowed = _error(after, exact), _rounding(model)
            if not off <= allowed:
                raise RunError(
                    f"the model {variant.name} differs from itself in float64 by {off:.1e}, "
                    f"rounding is at most {allowed:.1e}"
                )
            worst = max(worst, off)
            loaded[variant.name] = _saved(run, model, variant.folder / "slim", after)
    return loaded, (
        f"the slim model's outputs are its own in float64 to rounding ({worst:.1e}, relative), "
        f"the reloaded model's are equal bit by bit"
    )


def complete(
    run: Run, title: str, models: Mapping[str, nn.Module], checked: str, **described: Any
) -> Results:
    """Everything after the saving: evaluate, time, write the report.

    Args:
        run: the run.
        title: the report's headline.
        models: what :func:`finish_gradual` or :func:`finish_one_shot` returned.
        checked: the sentence that came with it.
        **described: further sections of the results: ``model``, ``data``, ``notes``.
    """
    dense = run.load(str(run.teacher_folder)).eval()
    everything = {"dense": dense, **models}
    asked, main = run.settings.one_shot, main_variant(run)
    if asked is not None and main.training is not None:
        everything["before healing"] = slimkern.load(main.unhealed)
    slim = models["slim"]
    fused, refused = fused_models(slim)
    scores = _scores(run, everything | fused, optional=fused)
    left_out = [name for name in fused if name not in scores]
    fused = {name: model for name, model in fused.items() if name in scores}
    wanted = _measure.shapes(run.max_length, run.latency_shape)
    with run.display.stage("time dense against slim and fused") as bar:
        latency = _measure.latency(dense, slim, wanted, checked, bar, fused)
    results: Results = {
        "title": title,
        "command": " ".join(["slimkern", *sys.argv[1:]]),
        "date": machine.now(),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "method": run.settings.method,
        "model": {"name": run.name, "architecture": type(slim).__name__, **described["model"]},
        "data": described["data"],
        "settings": _flat_settings(run),
        "scores": scores["slim"],
        "size": _measure.size(dense, slim, run.teacher_folder, run.folder / "slim"),
        "layers": layer_widths(cast(SlimPlan, slim.slim_plan)),
        "history": _history(run.history),
        "history_score": f"dev {run.task.statistics[-1]}",
        "latency": latency,
        "fused": fused_section(fused, refused, scores),
    }
    if asked is not None:
        results["one_shot"] = _one_shot(run, main, results, scores.get("before healing", []))
    if run.settings.family:
        results["family"] = _family(run, everything, scores)
    cut_notes = list(main.told()["notes"]) if asked is not None else []
    cut_notes += [f"{n} is not shown: it gives one value for all rows" for n in left_out]
    _close(run, results, [*described.get("notes", ()), *cut_notes, checked])
    return results


def _close(run: Run, results: Results, notes: list[str]) -> None:
    """What the stages took, and the report; the checkpoints go."""
    stages = run.display.stages
    total = sum(stages.values())
    results["stages"] = [{"name": n, "seconds": round(s, 2)} for n, s in stages.items()]
    results["seconds"] = round(sum(stages.get(name, 0.0) for name in _SLIMMING), 2)
    results["notes"] = [*notes, f"all stages together: {total:.0f} s"]
    write_report(results, run.folder)
    for variant in (main_variant(run), *family_variants(run)):
        shutil.rmtree(variant.folder / "training", ignore_errors=True)
        if variant.training is None:  # The same model as in slim/.
            shutil.rmtree(variant.unhealed, ignore_errors=True)


def _scores(
    run: Run, models: dict[str, nn.Module], optional: Iterable[str] = ()
) -> dict[str, list[Score]]:
    """Every model against the dense one, on every split but the training rows.

    Left out are ``optional`` ones with one value for all rows of a split: bfloat16 may give that.
    """
    predictions = run.predictions(models)
    one_value = {n for n in optional for m in predictions.values() if m[n].min() == m[n].max()}
    found: dict[str, list[Score]] = {name: [] for name in models if name not in one_value}
    for split, made in predictions.items():
        gold = run.task.gold(run.rows[split])
        for name in found:
            found[name] += compare(split, gold, made["dense"], made[name], run.task.statistics)
    return found


def _one_shot(run: Run, main: Variant, results: Results, before: list[Score]) -> OneShot:
    """What the one-shot road has to tell beside the common sections."""
    asked, told = run.settings.one_shot, main.told()
    assert asked is not None
    assert run.latency_shape is not None
    section: OneShot = {
        "seconds": told["seconds"],
        "calibration": {
            "source": " and ".join(_calibration_sources(run)),
            "sequences": sum(len(batch["input_ids"]) for batch in run.calibration),
            "tokens": int(sum(int(batch["attention_mask"].sum()) for batch in run.calibration)),
        },
        "before_healing": before,
        "shape": list(run.latency_shape),
    }
    row = next(
        r for r in results["latency"]["rows"] if (r["batch"], r["tokens"]) == run.latency_shape
    )
    if "predicted" in told:
        section["predicted"] = told["predicted"]
        if told["predicted"]["unit"] == "seconds":
            section["measured"] = {
                "unit": "seconds",
                "dense": row["dense_min"],
                "slim": row["slim_min"],
            }
    return section


def _calibration_sources(run: Run) -> list[str]:
    asked = run.settings.one_shot
    assert asked is not None
    if asked.calibration is not None:
        return [Path(asked.calibration).name]
    found = ["the training rows"] if "train" in run.splits else []
    return [*found, *([Path(asked.unlabelled).name] if asked.unlabelled is not None else [])]


def _family(run: Run, models: Mapping[str, nn.Module], scores: dict[str, list[Score]]) -> Family:
    """All models of the run in one interleaved measurement."""
    assert run.latency_shape is not None, "families are of the one-shot road"
    timed = {name: model for name, model in models.items() if name != "before healing"}
    with run.display.stage("time the family"):
        times = _measure.times(timed, run.latency_shape)
    members: list[FamilyMember] = []
    for variant in (main_variant(run), *family_variants(run)):
        everything, in_layers = _measure.parameters(models[variant.name])
        member: FamilyMember = {
            "name": variant.name,
            "parameters": everything,
            "parameters_no_embeddings": in_layers,
            "slim_min": times[variant.name].minimum,
            "slim_median": times[variant.name].median,
            "heal_epochs": 0.0 if variant.training is None else variant.training.epochs,
            "scores": scores[variant.name],
        }
        if variant.speedup is not None:
            member["target_speedup"] = variant.speedup
        if "predicted" in variant.told():
            member["predicted"] = variant.told()["predicted"]
        members.append(member)
    return {
        "shape": list(run.latency_shape),
        "threads": torch.get_num_threads(),
        "rounds": _measure.ROUNDS,
        "dense_min": times["dense"].minimum,
        "dense_median": times["dense"].median,
        "members": members,
    }


def _saved(run: Run, model: nn.Module, folder: Path, outputs: torch.Tensor) -> nn.Module:
    """Save and reload a model whose outputs on the probe are these."""
    shutil.rmtree(folder, ignore_errors=True)
    slimkern.save(model, folder, source=run.teacher_folder)
    loaded = slimkern.load(folder)
    if not torch.equal(_vectors(run.task, loaded, run.probe()), outputs):
        raise RunError(f"the model loaded from {folder} differs from the one saved")
    return loaded


def _flat_settings(run: Run) -> dict[str, Any]:
    """The settings of a run as one table of plain values."""
    flat: dict[str, Any] = {}

    def add(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(value, f"{prefix}{key}.")
            elif value is not None and value != ():
                plain = isinstance(value, (str, int, float, bool))
                flat[prefix + key] = value if plain else str(value)

    add(asdict(run.settings), "")
    for path in ("model", "teacher", "one_shot.calibration", "one_shot.unlabelled"):
        if path in flat:
            flat[path] = Path(flat[path]).name
    return flat


def _history(log: Sequence[dict[str, Any]]) -> list[Any]:
    """The Trainer's history as points of the report."""
    keys = ("step", "epoch", "loss", "ffn_sparsity", "mha_sparsity", "score")
    points = [{k: entry[k] for k in keys if k in entry} for entry in log]
    return [point for point in points if "loss" in point or "score" in point]


@torch.no_grad()
def _vectors(task: Task, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return task.run(model.eval(), batch).vectors


def _both_precisions(run: Run, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's outputs on the probe in float32, and in float64."""
    single = _vectors(run.task, model, run.probe())
    double = _vectors(run.task, model.double(), run.probe())
    model.float()
    return single, double


def _rounding(model: nn.Module) -> float:
    """How far float32 may carry a model's outputs from float64's, relative.

    Every linear rounds sums of its ``K`` inputs, an error of at most ``K eps``, and the errors of
    all linears add up on the residual stream.
    """
    widths = [m.in_features for m in model.modules() if isinstance(m, nn.Linear)]
    return torch.finfo(torch.float32).eps * sum(widths)


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())
