"""``slimkern slim``: a user's own model and data, from dense to slim."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from slimkern.cli._display import Display
    from slimkern.cli._run_folder import RunSettings, Split
    from slimkern.training import Task
    from slimkern.training.data import Pair

_MOST_CLASSES = 20


class TaskName(str, Enum):
    """What the model is trained for."""

    embeddings = "embeddings"
    regression = "regression"
    classification = "classification"


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


def slim(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the dense model.")],
    train: Annotated[Path, typer.Option(help="Training rows: .csv, .tsv, .jsonl or .parquet.")],
    eval_file: Annotated[Path, typer.Option("--eval", help="Rows by which epochs are compared.")],
    output: Annotated[Path, typer.Option(help="Folder of the run.")],
    ffn2_sparsity: Annotated[
        float, typer.Option(min=0, max=0.99, help="Fraction of FFN channels to remove.")
    ] = 0.0,
    mha_sparsity: Annotated[
        float, typer.Option(min=0, max=0.99, help="Fraction of attention heads to remove.")
    ] = 0.0,
    test: Annotated[
        Path | None, typer.Option(help="Rows that are only reported, never used.")
    ] = None,
    task: Annotated[
        TaskName | None, typer.Option(help="Found from model and labels if left out.")
    ] = None,
    sentence1: Annotated[str | None, typer.Option(help="Column: name or 0-based number.")] = None,
    sentence2: Annotated[str | None, typer.Option(help="Column: name or 0-based number.")] = None,
    label: Annotated[str | None, typer.Option(help="Column: name or 0-based number.")] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="One character, or tab; by the file's ending if left out.")
    ] = None,
    header: Annotated[bool, typer.Option(help="Whether the first line names the columns.")] = True,
    score_max: Annotated[
        float | None,
        typer.Option(help="Embeddings: the score of equal meaning; the largest if left out."),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of a dense model that is fine-tuned already.")
    ] = None,
    finetune: Annotated[
        bool, typer.Option(help="Fine-tune the dense model first (it is the teacher).")
    ] = True,
    dense_epochs: Annotated[
        float | None, typer.Option(help="Of the dense model: 1 for embeddings, else 3.")
    ] = None,
    dense_lr: Annotated[float, typer.Option("--dense-lr", help="Of the dense model.")] = 3e-5,
    epochs: Annotated[float, typer.Option(help="Of the slimming.")] = 6.0,
    lr: Annotated[float, typer.Option("--lr", help="Of the slimming, its peak.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per optimizer step.")] = 32,
    warm_epochs: Annotated[
        float | None, typer.Option(min=0, help="Before the sparsity grows: 1/13 of all.")
    ] = None,
    cooldown_epochs: Annotated[
        float | None, typer.Option(min=0, help="After the target is reached: 6/10 of all.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after as many epochs without improvement.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=4, help="Tokens per sequence.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the order of rows and of fresh heads.")] = 0,
    distill: Annotated[
        str | None,
        typer.Option(
            help="Weights of the loss, for example task=1,hidden=3,embedding=1,similarity=10."
        ),
    ] = None,
    round_multiplier: Annotated[
        int, typer.Option(min=1, help="FFN widths that remain are multiples of it.")
    ] = 32,
    scope: Annotated[
        Scope, typer.Option(help="Each layer the same fraction, or all together.")
    ] = Scope.local,
    decay: Annotated[Decay, typer.Option(help="How the sparsity grows.")] = Decay.exp,
    frequency: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps between two cuts.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 1e-7,
    beta2: Annotated[
        float, typer.Option(min=0, max=0.9999, help="Of AdamW; the reference recipe has 0.9.")
    ] = 0.999,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch threads.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")
    ] = False,
) -> None:
    """Make a model smaller on your own data, and report what that cost and gained.

    Fine-tunes the dense model (the teacher), masks FFN channels and heads while distilling, removes
    them, saves, reloads, evaluates and times both, and writes results.json and report.html into the
    output folder. Ctrl-C leaves a checkpoint: the same command goes on from there.
    """
    given = dict(locals())
    if not ffn2_sparsity and not mha_sparsity:
        raise typer.BadParameter(
            "there is nothing to remove; give one of them, or both",
            param_hint="--ffn2-sparsity / --mha-sparsity",
        )
    from slimkern.cli._session import check_teacher, session

    check_teacher(teacher)
    with session(threads, output) as display:
        from slimkern.cli._finish import complete
        from slimkern.cli._run import Run
        from slimkern.cli._session import summarize
        from slimkern.training.data import Columns

        columns = Columns(sentence1, sentence2, label, delimiter, header)
        splits = _read_splits({"train": train, "dev": eval_file, "test": test}, columns)
        chosen = task or _find_task(str(teacher or model), splits["train"].pairs, display)
        built = _build_task(chosen, str(teacher or model), splits["train"], score_max, display)
        settings = _settings(built, given)
        run = Run(output, settings, built, splits, display)
        run.prepare(overwrite)
        run.encode()
        run.train_dense()
        results = complete(
            run,
            f"{run.name}, dense against slim",
            run.train_slim(),
            model={"protocol": _protocol(chosen), "task": chosen.value},
            data={
                "name": train.parent.name or train.name,
                "splits": {name: len(split.pairs) for name, split in splits.items()},
                "note": "epochs are chosen on dev (--eval)",
            },
        )
        summarize(results, output)


def _read_splits(paths: dict[str, Path | None], columns: Any) -> dict[str, Split]:
    from slimkern.cli._run_folder import Split
    from slimkern.training.data import read_pairs

    given = {name: path for name, path in paths.items() if path is not None}
    return {name: Split(name, str(path), read_pairs(path, columns)) for name, path in given.items()}


def _find_task(model: str, pairs: list[Pair], display: Display) -> TaskName:
    """The task that model and labels speak of, with a line that says why."""
    folder = Path(model)
    heads: list[str] = []
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = config.get("architectures") or []
    labels = {str(pair.label) for pair in pairs}
    words = not all(_is_number(text) for text in labels)
    if (folder / "modules.json").is_file():
        found, why = TaskName.embeddings, "the folder is a sentence-transformers model"
    elif words:
        found, why = TaskName.classification, "the labels are words"
    elif any("SequenceClassification" in head for head in heads) or pairs[0].second is None:
        whole = all(float(text).is_integer() for text in labels)
        if whole and len(labels) <= _MOST_CLASSES:
            found, why = TaskName.classification, f"the labels are {len(labels)} whole numbers"
        else:
            found, why = TaskName.regression, "the labels are numbers"
    else:
        found, why = TaskName.embeddings, "the model has no classification head"
    display.line(f"task: {found.value}, because {why} (--task chooses another)")
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _build_task(
    name: TaskName, model: str, train: Split, score_max: float | None, display: Display
) -> Task:
    from slimkern.training import ClassificationTask, EmbeddingTask, RegressionTask
    from slimkern.training.data import DataError, class_names, numeric_labels
    from slimkern.training.tasks import read_pooling

    if name is TaskName.classification:
        names = class_names(train.pairs)
        if len(names) < 2:
            raise DataError(f"{train.path}: every row has the label {names[0]!r}; 2 are needed")
        display.line(f"labels: {', '.join(names)}")
        return ClassificationTask(names)
    labels = numeric_labels(train.pairs, train.path)
    if name is TaskName.regression:
        return RegressionTask(sum(labels) / len(labels))
    scale = max(labels) if score_max is None else score_max
    if not scale > 0:
        raise DataError(f"{train.path}: the largest score is {scale:g}; give --score-max")
    pooling = read_pooling(model)
    display.line(f"target: cosine of {pooling}-pooled vectors = score / {scale:g}")
    return EmbeddingTask(scale, pooling)


def _settings(built: Task, given: dict[str, Any]) -> RunSettings:
    """The run's settings from the command's options, by the names of ``slim``'s parameters."""
    from slimkern.cli._run_folder import RunSettings
    from slimkern.training import TrainingSettings

    epochs, seed, size = given["epochs"], given["seed"], given["batch_size"]
    dense_epochs = given["dense_epochs"] or (1.0 if built.name == "embeddings" else 3.0)
    common: dict[str, Any] = {"batch_size": size, "seed": seed}
    common |= {"weight_decay": given["weight_decay"], "betas": (0.9, given["beta2"])}
    train_dense = given["finetune"] and given["teacher"] is None
    dense = TrainingSettings(dense_epochs, given["dense_lr"], **common) if train_dense else None
    cooldown = given["cooldown_epochs"]
    pruning = {
        "pruning_scope": given["scope"].value,
        "sparsity_decay_type": given["decay"].value,
        "round_multiplier": given["round_multiplier"],
        "pruning_frequency": given["frequency"],
    }
    return RunSettings(
        model=given["model"],
        task=built.name,
        ffn2_sparsity=given["ffn2_sparsity"],
        mha_sparsity=given["mha_sparsity"],
        dense=dense,
        slim=TrainingSettings(epochs, given["lr"], dropout=False, **common),
        weights=_weights(built, given["distill"]),
        teacher=None if given["teacher"] is None else str(given["teacher"]),
        warm_epochs=given["warm_epochs"],
        cooldown_epochs=0.6 * epochs if cooldown is None else cooldown,
        pruning={key: value for key, value in pruning.items() if value is not None},
        patience=given["patience"],
        max_length=given["max_length"],
    )


def _weights(built: Task, text: str | None) -> Any:
    """The distillation weights of ``--distill``; the task's own where it says nothing."""
    from dataclasses import fields

    from slimkern.training import DistillationWeights

    if text is None:
        return built.default_weights
    names = [f.name for f in fields(DistillationWeights)]
    values = dict.fromkeys(names, 0.0)
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in names or not _is_number(value):
            raise typer.BadParameter(
                f"{part!r} is not NAME=NUMBER with NAME one of {', '.join(names)}",
                param_hint="--distill",
            )
        values[name.strip()] = float(value)
    try:
        return DistillationWeights(**values)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--distill") from None


def _protocol(task: TaskName) -> str:
    return "bi-encoder" if task is TaskName.embeddings else "cross-encoder"
