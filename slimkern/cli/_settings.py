"""The settings of a run of ``slimkern slim``, from the command's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import typer

from slimkern.cli._options import Method, check_target, parse_family, parse_shape
from slimkern.cli._run_folder import GRADUAL, ONE_SHOT, OneShotSettings, RunSettings
from slimkern.cli._task import is_number
from slimkern.training import DistillationWeights, HealingSettings, Task, TrainingSettings

GRADUAL_EPOCHS, GRADUAL_RATE = 6.0, 3e-4


def build_settings(built: Task, values: Mapping[str, Any]) -> RunSettings:
    """The run's settings, from the values of ``slim``'s parameters by their names."""
    epochs = values["dense_epochs"] or (1.0 if built.name == "embeddings" else 3.0)
    training = _common(values)
    trains = values["finetune"] and values["teacher"] is None and values["train"] is not None
    common: dict[str, Any] = {
        "model": values["model"],
        "task": built.name,
        "ffn2_sparsity": values["ffn2_sparsity"],
        "mha_sparsity": values["mha_sparsity"],
        "dense": TrainingSettings(epochs, values["dense_lr"], **training) if trains else None,
        "teacher": None if values["teacher"] is None else str(values["teacher"]),
        "patience": values["patience"],
        "max_length": values["max_length"],
    }
    if values["method"] is Method.gradual:
        return RunSettings(**common, **_gradual(built, values))
    return RunSettings(**common, **_one_shot(built, values))


def _common(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the trainings of a run share."""
    return {
        "batch_size": values["batch_size"],
        "seed": values["seed"],
        "weight_decay": values["weight_decay"],
        "betas": (0.9, values["beta2"]),
    }


def _gradual(built: Task, values: Mapping[str, Any]) -> dict[str, Any]:
    epochs, cooldown = values["epochs"], values["cooldown_epochs"]
    rate = GRADUAL_RATE if values["lr"] is None else values["lr"]
    pruning = {
        "pruning_scope": values["scope"].value,
        "sparsity_decay_type": values["decay"].value,
        "round_multiplier": values["round_multiplier"],
        "pruning_frequency": values["frequency"],
    }
    return {
        "method": GRADUAL,
        "slim": TrainingSettings(epochs, rate, dropout=False, **_common(values)),
        "weights": _weights(built.default_weights, values["distill"]),
        "warm_epochs": values["warm_epochs"],
        "cooldown_epochs": 0.6 * epochs if cooldown is None else cooldown,
        "pruning": {key: value for key, value in pruning.items() if value is not None},
    }


def _one_shot(built: Task, values: Mapping[str, Any]) -> dict[str, Any]:
    slim = _healing(values, values["heal_epochs"])
    family_slim = _healing(values, values["family_heal_epochs"])
    longest = slim or family_slim
    usual = built.default_weights if longest is None else longest.weights(built)
    if values["train"] is None:
        usual = replace(usual, task=0.0)  # no row has a label
    calibration = values["calibration"]
    return {
        "method": ONE_SHOT,
        "slim": slim,
        "weights": _weights(usual, values["distill"]),
        "one_shot": OneShotSettings(
            target=check_target(values),
            criterion=values["criterion"].value,
            round_multiplier=values["round_multiplier"],
            calibration=None if calibration is None else str(calibration),
            calibration_rows=values["calibration_rows"],
            latency_shape=parse_shape(values["latency_shape"]),
            unlabelled=None if values["unlabelled"] is None else str(values["unlabelled"]),
            seed=values["seed"],
        ),
        "family": parse_family(values["family"]),
        "family_slim": family_slim,
    }


def _healing(values: Mapping[str, Any], epochs: float | None) -> HealingSettings | None:
    if not epochs:
        return None
    rate = {} if values["lr"] is None else {"learning_rate": values["lr"]}
    return HealingSettings.for_epochs(epochs, **rate, **_common(values))


def _weights(usual: DistillationWeights, text: str | None) -> DistillationWeights:
    """The distillation weights of ``--distill``; the usual ones where it says nothing."""
    if text is None:
        return usual
    names = [f.name for f in fields(DistillationWeights)]
    values = dict.fromkeys(names, 0.0)
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in names or not is_number(value):
            raise typer.BadParameter(
                f"{part!r} is not NAME=NUMBER with NAME one of {', '.join(names)}",
                param_hint="--distill",
            )
        values[name.strip()] = float(value)
    try:
        return DistillationWeights(**values)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--distill") from None
