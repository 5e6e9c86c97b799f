"""From a trained masked model to a folder, a table of results and a page."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import slimkern
from slimkern import timing
from slimkern.cli._run import Run
from slimkern.cli._run_folder import RunError
from slimkern.plan import SlimPlan
from slimkern.report import write_report
from slimkern.report.schema import Latency, Results, Size, layer_widths
from slimkern.training import Task
from slimkern.training.evaluation import compare

SHAPES = [(1, 16), (1, 128), (8, 128), (32, 32)]
_ROUNDS = 9


def finish(run: Run, masked: nn.Module) -> tuple[nn.Module, str]:
    """Slim, save, reload; check that each step changed nothing.

    Returns:
        the reloaded slim model, and a sentence that says what was compared.

    Raises:
        RunError: the slim model differs from the masked one by more than rounding, or the reloaded
            one from the slim one by a single bit.
    """
    with run.display.stage("slim, save, reload"):
        batch = next(run.rows["dev"].by_length(32))[1]
        before = _vectors(run.task, masked, batch)
        slim = slimkern.model_slim(masked)
        after = _vectors(run.task, slim, batch)
        exact = _vectors(run.task, slim.double(), batch)
        slim.float()
        # Both are roundings of the same function: the masked one may be off as the slim one is.
        off, rounding = _error(before, exact), _error(after, exact)
        allowed = 4 * rounding + torch.finfo(torch.float32).eps
        if not off <= allowed:
            raise RunError(f"slim and masked model differ: {off:.1e}, rounding is {rounding:.1e}")
        shutil.rmtree(run.slim_folder, ignore_errors=True)
        slimkern.save(slim, run.slim_folder, source=run.teacher_folder)
        loaded = slimkern.load(run.slim_folder)
        if not torch.equal(_vectors(run.task, loaded, batch), after):
            raise RunError(f"the model loaded from {run.slim_folder} differs from the one saved")
    return loaded, (
        f"the masked model's outputs are the slim model's to rounding (against float64: "
        f"{off:.1e} and {rounding:.1e}, relative), the reloaded model's are equal bit by bit"
    )


def complete(run: Run, title: str, masked: nn.Module, **described: Any) -> Results:
    """Everything after the training: slim, check, save, evaluate, time, write the report.

    Args:
        run: the run, trained.
        title: the report's headline.
        masked: what :meth:`Run.train_slim` returned.
        **described: further sections of the results, for example ``data``.
    """
    slim, checked = finish(run, masked)
    dense = run.load(str(run.teacher_folder)).eval()
    predictions = run.predictions({"dense": dense, "slim": slim})
    scores = [
        row
        for name, made in predictions.items()
        for row in compare(
            name,
            run.task.gold(run.rows[name]),
            made["dense"],
            made["slim"],
            run.task.statistics,
        )
    ]
    with run.display.stage("time dense against slim") as bar:
        latency = _latency(dense, slim, _shapes(run.max_length), checked, bar)
    total = sum(seconds for _, seconds in run.display.stages)
    results: Results = {
        "title": title,
        "command": " ".join(["slimkern", *sys.argv[1:]]),
        "date": timing.now(),
        "machine": timing.machine(),
        "versions": timing.versions(),
        "model": {"name": run.name, "architecture": type(slim).__name__, **described["model"]},
        "data": described["data"],
        "settings": _flat_settings(run),
        "scores": scores,
        "size": _size(dense, slim, run.teacher_folder, run.slim_folder),
        "layers": layer_widths(cast(SlimPlan, slim.slim_plan)),
        "history": _history(run.history),
        "history_score": f"dev {run.task.statistics[-1]}",
        "stages": [{"name": n, "seconds": round(s, 2)} for n, s in run.display.stages],
        "latency": latency,
        "notes": [*described.get("notes", ()), checked, f"all stages together: {total:.0f} s"],
    }
    write_report(results, run.folder)
    shutil.rmtree(run.folder / "training", ignore_errors=True)
    return results


def parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters of a model: all, and without embedding tables; a tied one counts once."""
    tables = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    }
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.parameters() if id(p) not in tables)


def _size(dense: nn.Module, slim: nn.Module, dense_folder: Path, slim_folder: Path) -> Size:
    (dense_all, dense_layers), (slim_all, slim_layers) = parameters(dense), parameters(slim)
    size: Size = {
        "dense_parameters": dense_all,
        "slim_parameters": slim_all,
        "dense_parameters_no_embeddings": dense_layers,
        "slim_parameters_no_embeddings": slim_layers,
    }
    dense_bytes, slim_bytes = _weight_bytes(dense_folder), _weight_bytes(slim_folder)
    if dense_bytes and slim_bytes:
        size["dense_bytes"], size["slim_bytes"] = dense_bytes, slim_bytes
    return size


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _shapes(max_length: int) -> list[tuple[int, int]]:
    """``SHAPES`` with no more tokens than the model was trained for."""
    return list(dict.fromkeys((batch, min(tokens, max_length)) for batch, tokens in SHAPES))


def _latency(
    dense: nn.Module,
    slim: nn.Module,
    shapes: list[tuple[int, int]],
    checked: str,
    bar: Callable[[int, int], None],
) -> Latency:
    """Forward times of both models on the same random tokens, in turns."""
    vocabulary = dense.get_input_embeddings().num_embeddings  # type: ignore[operator]
    rows = []
    for done, shape in enumerate(shapes):
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, shape, generator=random)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        def call(model: nn.Module, inputs: dict[str, torch.Tensor] = inputs) -> Any:
            return lambda batch, tokens: lambda: model(**inputs, return_dict=True)[0]

        rows += timing.latency_table(
            call(dense), call(slim), [shape], check=_same_shape_and_finite, rounds=_ROUNDS
        )
        bar(done + 1, len(shapes))
    return {
        "rows": rows,
        "threads": torch.get_num_threads(),
        "rounds": _ROUNDS,
        "precision": "float32",
        "checked": checked,
    }


def _same_shape_and_finite(outputs: dict[str, Any]) -> None:
    dense, slim = outputs["dense"], outputs["slim"]
    if dense.shape != slim.shape or not (dense.isfinite().all() and slim.isfinite().all()):
        raise RunError("dense and slim outputs differ in shape or are not finite")


def _flat_settings(run: Run) -> dict[str, Any]:
    """The settings of a run as one table of plain values."""
    from dataclasses import asdict

    flat: dict[str, Any] = {}

    def add(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(value, f"{prefix}{key}.")
            elif value is not None:
                plain = isinstance(value, (str, int, float, bool))
                flat[prefix + key] = value if plain else str(value)

    add(asdict(run.settings), "")
    for path in ("model", "teacher"):
        if path in flat:
            flat[path] = Path(flat[path]).name
    return flat


def _history(log: list[dict[str, Any]]) -> list[Any]:
    """The Trainer's history as points of the report."""
    keys = ("step", "epoch", "loss", "ffn_sparsity", "mha_sparsity", "score")
    points = [{k: entry[k] for k in keys if k in entry} for entry in log]
    return [point for point in points if "loss" in point or "score" in point]


@torch.no_grad()
def _vectors(task: Task, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return task.run(model.eval(), batch).vectors


def _error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())
