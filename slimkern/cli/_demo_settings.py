"""The demo's recipes: one model, one dataset, two protocols, two methods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from slimkern.cli._options import Protocol
from slimkern.cli._run_folder import GRADUAL, ONE_SHOT, OneShotSettings, RunSettings, Split
from slimkern.cli.fetch import read_stsb
from slimkern.training import DistillationWeights, HealingSettings, Task, TrainingSettings
from slimkern.training.data import Pair

FFN_SPARSITY, MHA_SPARSITY = 0.8, 0.6
SMOKE_ROWS = {"train": 192, "dev": 100, "test": 100}
HEAL_EPOCHS, FULL_HEAL_EPOCHS = 6.0, 10.0
_SMOKE_CALIBRATION = 256


def recipe(
    protocol: Protocol,
    method: str,
    model: Path,
    task: Task,
    *,
    full: bool,
    smoke: bool,
    seed: int,
    teacher: Path | None = None,
    family: tuple[float, ...] = (),
    family_heal_epochs: float = 0.0,
) -> RunSettings:
    """The settings of a run of the demo. Both methods have the same dense model.

    Args:
        protocol: sentence embeddings, or a score of pairs.
        method: ``one-shot`` or ``gradual``.
        model: folder of the model.
        task: of the protocol.
        full: the longer training.
        smoke: a few dozen steps of everything: its scores mean nothing.
        seed: of rows, calibration and fresh heads.
        teacher: folder of a dense model that is fine-tuned already.
        family: one-shot: speed-ups of further models.
        family_heal_epochs: of each of these.
    """
    bi_encoder = protocol is Protocol.bi_encoder
    dense = _dense_bi_encoder(seed) if bi_encoder else _dense_cross_encoder(full, seed)
    common: dict[str, Any] = {
        "model": str(model),
        "task": task.name,
        "ffn2_sparsity": FFN_SPARSITY,
        "mha_sparsity": MHA_SPARSITY,
        "dense": replace(dense, epochs=1) if smoke else dense,
    }
    if method == GRADUAL:
        road = _bi_encoder(full, seed) if bi_encoder else _cross_encoder(full, seed)
        settings = RunSettings(**common, **road)
        settings = _shortened(settings) if smoke else settings
    else:
        epochs = 1.0 if smoke else FULL_HEAL_EPOCHS if full else HEAL_EPOCHS
        healing = HealingSettings.for_epochs(epochs, seed=seed)
        rows = _SMOKE_CALIBRATION if smoke else OneShotSettings.calibration_rows
        settings = RunSettings(
            **common,
            method=ONE_SHOT,
            slim=healing,
            weights=healing.weights(task),
            one_shot=OneShotSettings(calibration_rows=rows, seed=seed),
            family=family,
            family_slim=_family_healing(family_heal_epochs, seed),
        )
    if teacher is None:
        return settings
    return replace(settings, teacher=str(teacher), dense=None)


def read_split(name: str, path: Path, rows: int | None = None) -> Split:
    """The first rows of a file of STS-benchmark; all by default."""
    numbered = enumerate(read_stsb(path)[:rows], start=1)
    return Split(name, str(path), [Pair(a, b, gold, line) for line, (a, b, gold) in numbered])


def _family_healing(epochs: float, seed: int) -> HealingSettings | None:
    return HealingSettings.for_epochs(epochs, seed=seed) if epochs else None


def _dense_bi_encoder(seed: int) -> TrainingSettings:
    # One epoch: further ones add nothing on this data.
    return TrainingSettings(epochs=1, learning_rate=3e-5, warmup=0.1, weight_decay=0.01, seed=seed)


def _bi_encoder(full: bool, seed: int) -> dict[str, Any]:
    """Gradual: sentence embeddings, what this model is for."""
    epochs = 10 if full else 6
    return {
        "slim": TrainingSettings(epochs=epochs, learning_rate=4e-4, dropout=False, seed=seed),
        "weights": DistillationWeights(),
        # The sparsity is reached after a third of the training: what is left recovers, at a
        # learning rate that is still high and at the slim model's price.
        "warm_epochs": 0.1,
        "cooldown_epochs": 0.65 * epochs,
        "pruning": _pruning(frequency=20),
        "patience": 3 if full else None,
    }


def _dense_cross_encoder(full: bool, seed: int) -> TrainingSettings:
    return TrainingSettings(learning_rate=1e-4, **_reference(full, seed))


def _cross_encoder(full: bool, seed: int) -> dict[str, Any]:
    """The reference recipe: sentence pairs, one logit; the dense model trains as long as the slim.

    Batch 16, 13 epochs, 1 warm and 3 to recover, AdamW betas (0.9, 0.9), hidden states as the only
    loss, weighted 2. The learning rates are this smaller model's own.
    """
    return {
        "slim": TrainingSettings(learning_rate=3e-4, dropout=False, **_reference(full, seed)),
        "weights": DistillationWeights(task=0, hidden=2, embedding=0, similarity=0, score=0),
        "warm_epochs": 1 if full else 0.2,
        "cooldown_epochs": 3 if full else 1.5,
        "pruning": _pruning(frequency=500 if full else 50),
    }


def _reference(full: bool, seed: int) -> dict[str, Any]:
    """What both trainings of the reference recipe share."""
    return {
        "epochs": 13 if full else 3,
        "batch_size": 16,
        "weight_decay": 1e-7,
        "betas": (0.9, 0.9),
        "warmup": 0.0,
        "seed": seed,
    }


def _pruning(frequency: int) -> dict[str, Any]:
    return {
        "pruning_type": "snip_momentum",
        "pruning_scope": "local",
        "sparsity_decay_type": "exp",
        "pruning_frequency": frequency,
    }


def _shortened(settings: RunSettings) -> RunSettings:
    """A few dozen steps of the same gradual run, masks and all."""
    assert settings.slim is not None, "the gradual road is a training"
    return replace(
        settings,
        slim=replace(settings.slim, epochs=2),
        warm_epochs=0.1,
        cooldown_epochs=1.0,
        pruning=_pruning(frequency=4),
    )
