"""What the options of ``slimkern slim`` accept, and which of them go together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import typer


class TaskName(str, Enum):
    """What the model is trained for."""

    embeddings = "embeddings"
    regression = "regression"
    classification = "classification"


class Method(str, Enum):
    """The road to the slim model."""

    one_shot = "one-shot"
    gradual = "gradual"


class Protocol(str, Enum):
    """What the demo trains."""

    bi_encoder = "bi-encoder"
    cross_encoder = "cross-encoder"


class Criterion(str, Enum):
    """What decides which units the one-shot road removes."""

    obs = "obs"
    magnitude = "magnitude"
    activation = "activation"
    fluctuation = "fluctuation"
    fisher = "fisher"


class Scope(str, Enum):
    """Whether every layer loses the same fraction."""

    local = "local"
    # "global" is a keyword of the language, so the name differs from the value.
    all_layers = "global"


class Decay(str, Enum):
    """The shape of the sparsity's growth."""

    exp = "exp"
    cos = "cos"
    linear = "linear"
    cube = "cube"


TARGETS = ("target_speedup", "target_params", "target_macs", "target_latency")
_OF_METHOD = {
    Method.one_shot: (
        "calibration",
        "calibration_rows",
        "heal_epochs",
        *TARGETS,
        "latency_shape",
        "criterion",
        "unlabelled",
        "family",
        "family_heal_epochs",
    ),
    Method.gradual: ("epochs", "warm_epochs", "cooldown_epochs", "scope", "decay", "frequency"),
}
_OF_SLIM_TRAINING = ("lr", "distill", "unlabelled")
_OF_TRAINING = ("batch_size", "weight_decay", "beta2", "patience")
_OF_DENSE_TRAINING = ("dense_epochs", "dense_lr")


def given_options(context: typer.Context) -> set[str]:
    """Names of the parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {n for n, s in sources.items() if s is not None and s.name == "COMMANDLINE"}


def flag(name: str) -> str:
    """A parameter's option: ``heal_epochs`` is ``--heal-epochs``."""
    return {"eval_file": "--eval"}.get(name, "--" + name.replace("_", "-"))


def refuse(name: str, why: str) -> typer.BadParameter:
    """The error that an option has no place in this run."""
    return typer.BadParameter(why, param_hint=flag(name))


def check_method(method: Method, given: Iterable[str]) -> None:
    """Refuse what belongs to the other method.

    Raises:
        BadParameter: naming the option and its method.
    """
    for other, names in _OF_METHOD.items():
        for name in names:
            if other is not method and name in given:
                raise refuse(
                    name, f"belongs to --method {other.value}; this run is --method {method.value}"
                )


def check_target(values: Mapping[str, Any]) -> dict[str, float]:
    """The one budget that is asked for, by its argument's name; empty for sparsities.

    Raises:
        BadParameter: nothing is asked for, two budgets are, or a budget and sparsities.
    """
    sparsities = [n for n in ("ffn2_sparsity", "mha_sparsity") if values[n]]
    budgets = {n: float(values[n]) for n in TARGETS if values[n] is not None}
    if not sparsities and not budgets:
        hint = "--ffn2-sparsity / --mha-sparsity"
        more = ""
        if values["method"] is Method.one_shot:
            more = ", or one budget: " + ", ".join(flag(name) for name in TARGETS)
        raise typer.BadParameter(
            f"there is nothing to remove; give one of them, or both{more}", param_hint=hint
        )
    if len(budgets) > 1 or (sparsities and budgets):
        both = " and ".join(flag(name) for name in (*sparsities, *budgets))
        raise typer.BadParameter(
            f"{both} are given; accepted: sparsities, or exactly one budget",
            param_hint=flag(next(iter(budgets))),
        )
    for name, value in budgets.items():
        least = 1 if name == "target_speedup" else 0
        if not value > least:
            raise refuse(name, f"{value:g} is not accepted; accepted: more than {least}")
    if "target_latency" in budgets:
        budgets["target_latency"] /= 1000  # given in milliseconds
    return budgets


def check_training(values: Mapping[str, Any], given: Iterable[str]) -> None:
    """Refuse a run that lacks the data of a training, and options of a training that is none.

    Raises:
        BadParameter: naming the option.
    """
    gradual = values["method"] is Method.gradual
    heals = gradual or bool(values["heal_epochs"] or values["family_heal_epochs"])
    dense = values["finetune"] and values["teacher"] is None
    if values["train"] is None:
        if gradual:
            raise refuse("train", "the gradual method trains: give the training rows")
        if values["unlabelled"] is None and heals:
            name = "heal_epochs" if values["heal_epochs"] else "family_heal_epochs"
            raise refuse("train", f"{flag(name)} trains: give training rows, or --unlabelled texts")
        if values["unlabelled"] is None and values["calibration"] is None:
            raise refuse("calibration", "give it, or --train: the model is calibrated on texts")
        if "finetune" in given and values["finetune"]:
            raise refuse("train", "--finetune trains: give the training rows")
        dense = False
    if (heals or dense) and values["eval_file"] is None:
        raise refuse("eval_file", "epochs are compared on its rows: give them, or train nothing")
    if values["family_heal_epochs"] and not values["family"]:
        raise refuse("family_heal_epochs", "there is no --family to heal")
    unused: list[tuple[str, str]] = []
    if not heals:
        unused += [(name, "nothing is healed") for name in _OF_SLIM_TRAINING]
    if not dense:
        unused += [(name, "the dense model is not trained") for name in _OF_DENSE_TRAINING]
    if not heals and not dense:
        unused += [(name, "nothing is trained") for name in _OF_TRAINING]
    for name, why in unused:
        if name in given:
            raise refuse(name, f"has no effect: {why}")


def parse_shape(text: str, name: str = "latency_shape") -> tuple[int, int]:
    """``8x128``, given to the option ``name``, as (batch, tokens).

    Raises:
        BadParameter: the text is no such shape.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
    if found is None:
        raise refuse(name, f"{text!r} is not accepted; accepted: BATCHxTOKENS, as 8x128")
    return int(found[1]), int(found[2])


def parse_family(text: str | None) -> tuple[float, ...]:
    """``1.5,2,3`` as speed-ups in increasing order; none for ``None``.

    Raises:
        BadParameter: an entry is no number over 1, or stands there twice.
    """
    if text is None:
        return ()
    speedups = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not 1 < value < float("inf"):
            raise refuse(
                "family", f"{part!r} is not accepted; accepted: numbers over 1, as 1.5,2,3"
            )
        speedups.append(value)
    if len(set(speedups)) < len(speedups):
        raise refuse("family", f"{text!r} names a speed-up twice")
    return tuple(sorted(speedups))
