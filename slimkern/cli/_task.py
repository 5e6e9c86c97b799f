"""The rows and the task of a run of ``slimkern slim``: what the files and the model say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimkern.cli._display import Display
from slimkern.cli._options import TaskName
from slimkern.cli._run_folder import RunError, Split
from slimkern.training import ClassificationTask, EmbeddingTask, RegressionTask, Task
from slimkern.training.data import Columns, DataError, Pair, class_names, numeric_labels, read_pairs
from slimkern.training.tasks import read_pooling

_MOST_CLASSES = 20


def read_splits(paths: dict[str, Path | None], columns: Columns) -> dict[str, Split]:
    """The splits whose file is given."""
    given = {name: path for name, path in paths.items() if path is not None}
    return {name: Split(name, str(path), read_pairs(path, columns)) for name, path in given.items()}


def choose_task(
    asked: TaskName | None,
    model: str,
    splits: dict[str, Split],
    score_max: float | None,
    display: Display,
) -> Task:
    """The task that is asked for, or that model and labels speak of, with a line that says why.

    Args:
        asked: ``--task``.
        model: folder or hub name of the model as it is loaded.
        splits: the first of them tells the labels; without any, the model alone tells.
        score_max: ``--score-max``.
        display: where it is said what was found.
    """
    labelled = next(iter(splits.values()), None)
    if labelled is None:
        name = asked or _task_of_model(model, display)
        return _unlabelled(name, model)
    name = asked or _task_of_labels(model, labelled.pairs, display)
    return _build(name, model, labelled, score_max, display)


def _task_of_labels(model: str, pairs: list[Pair], display: Display) -> TaskName:
    heads = _config(model).get("architectures") or []
    labels = {str(pair.label) for pair in pairs}
    words = not all(is_number(text) for text in labels)
    if (Path(model) / "modules.json").is_file():
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
    return _said(found, why, display)


def _task_of_model(model: str, display: Display) -> TaskName:
    config = _config(model)
    if not any("SequenceClassification" in head for head in config.get("architectures") or []):
        return _said(TaskName.embeddings, "the model has no classification head", display)
    if len(_label_names(config)) == 1:
        return _said(TaskName.regression, "the model's head has one output", display)
    return _said(TaskName.classification, "the model's head has several outputs", display)


def _said(found: TaskName, why: str, display: Display) -> TaskName:
    display.line(f"task: {found.value}, because {why} (--task chooses another)")
    return found


def _unlabelled(name: TaskName, model: str) -> Task:
    """A task whose model runs, but of which nothing is trained or scored."""
    if name is TaskName.embeddings:
        return EmbeddingTask(pooling=read_pooling(model))
    if name is TaskName.regression:
        return RegressionTask()
    names = _label_names(_config(model))
    if len(names) < 2:
        raise RunError(f"--task classification: MODEL {model!r} names no classes; give --train")
    return ClassificationTask(names)


def _build(
    name: TaskName, model: str, labelled: Split, score_max: float | None, display: Display
) -> Task:
    if name is TaskName.classification:
        names = class_names(labelled.pairs)
        if len(names) < 2:
            raise DataError(f"{labelled.path}: every row has the label {names[0]!r}; 2 are needed")
        display.line(f"labels: {', '.join(names)}")
        return ClassificationTask(names)
    labels = numeric_labels(labelled.pairs, labelled.path)
    if name is TaskName.regression:
        return RegressionTask(sum(labels) / len(labels))
    scale = max(labels) if score_max is None else score_max
    if not scale > 0:
        raise DataError(f"{labelled.path}: the largest score is {scale:g}; give --score-max")
    pooling = read_pooling(model)
    display.line(f"target: cosine of {pooling}-pooled vectors = score / {scale:g}")
    return EmbeddingTask(scale, pooling)


def _config(model: str) -> dict[str, Any]:
    """The model's configuration, as far as it lies in a folder here."""
    path = Path(model) / "config.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _label_names(config: dict[str, Any]) -> list[str]:
    """The outputs of a head; two where the configuration is silent, as transformers has it."""
    names = config.get("id2label")
    if names:
        return [names[key] for key in sorted(names, key=int)]
    return [f"LABEL_{i}" for i in range(config.get("num_labels", 2))]


def is_number(text: str) -> bool:
    """Whether a label is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
