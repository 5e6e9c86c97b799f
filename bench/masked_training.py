"""The demo's masked training against the same training by mask multiplication, step by step.

    python bench/masked_training.py --teacher slimkern-demo/teacher --results masked.json --full

Two models start from one dense teacher and see the same batches, losses (dropout 0) and learning
rates. One is slimmed gradually by ``SlimCallback``, as ``slimkern demo --method gradual`` does it.
The other gets the masks that this one has after each step, and multiplies its weights by them as
``torch.nn.utils.prune`` does. They take their steps in turns, so that the machine's drift hits
both alike: the time of a step is that of forward, backward, clipping, AdamW and the move of the
masks. At the end both are evaluated, and the losses of all steps are compared.

The teacher is the dense model that ``slimkern demo`` leaves in its folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stsb import Bench
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import PrinterCallback, TrainerCallback

import slimkern
from slimkern.cli._demo_settings import recipe
from slimkern.cli._options import Protocol
from slimkern.cli._run_folder import GRADUAL, RunSettings
from slimkern.plan import SlimPlan
from slimkern.training import (
    DistillationWeights,
    DistillTrainer,
    SlimCallback,
    Teacher,
    disable_dropout,
    predict,
)
from slimkern.training.evaluation import compare

OURS, THEIRS = "slimkern masked", "mask multiply"


class Turns:
    """Of several threads one computes at a time, in a fixed order."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._waiting = list(names)
        self._changed = threading.Condition()

    def wait(self, name: str) -> None:
        """Until it is the thread's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == name)

    def end(self, name: str, *, leave: bool = False) -> None:
        """The next one's turn; one that leaves has no further ones."""
        with self._changed:
            self._waiting.remove(name)
            if not leave:
                self._waiting.append(name)
            self._changed.notify_all()


class Steps(TrainerCallback):
    """Takes one step per turn, and notes its time on the clock and on the processor.

    Args:
        name: whose steps.
        turns: shared with the other side.
        after: called with the model at the end of each step, within its time.
    """

    def __init__(self, name: str, turns: Turns, after: Any) -> None:
        self.name, self.turns, self.after = name, turns, after
        self.wall: list[float] = []
        self.processor: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.turns.wait(self.name)
        self._begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.after(kwargs["model"])
        self.wall.append(time.perf_counter() - self._wall)
        self.processor.append(time.process_time() - self._processor)
        self.turns.end(self.name)
        self.turns.wait(self.name)
        self._begin()

    def _begin(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()


class Masks:
    """The masks that one model has, put on the other by multiplication."""

    def __init__(self) -> None:
        self._plan: SlimPlan | None = None
        self._put: SlimPlan | None = None
        self.changes = 0

    def read(self, model: nn.Module) -> None:
        """After a step of the model with masks of its own."""
        self._plan = getattr(model, "mask_plan", None)

    def put(self, model: nn.Module) -> None:
        """After the same step of the other."""
        if self._plan is None or self._plan is self._put:
            return
        for entry in self._plan:
            for member in entry.group.consumers:
                units = torch.zeros(entry.group.num_units)
                units[list(entry.keep)] = 1.0
                mask = model.get_submodule(member.name).get_buffer("weight_mask")
                mask.copy_(units.repeat_interleave(member.unit_size).expand_as(mask))
        self._put = self._plan
        self.changes += 1


class NotingTrainer(DistillTrainer):
    """Notes the loss of every step."""

    losses: list[Tensor]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


def multiplied_(model: nn.Module, groups: Any) -> nn.Module:
    """Masks of ones on every second linear, as `torch.nn.utils.prune` has them."""
    for group in groups:
        for member in group.consumers:
            linear = model.get_submodule(member.name)
            prune.custom_from_mask(linear, "weight", torch.ones_like(linear.weight))
    return model


def train(
    bench: Bench, settings: RunSettings, teacher: Teacher, steps: int
) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """Both trainings in turns -> the rows of results, and the models."""
    assert settings.slim is not None
    turns, masks = Turns((OURS, THEIRS)), Masks()
    slim = SlimCallback(
        ffn2_sparsity=settings.ffn2_sparsity,
        mha_sparsity=settings.mha_sparsity,
        warm_epochs=settings.warm_epochs,
        cooldown_epochs=settings.cooldown_epochs,
        **settings.pruning,
    )
    models = {name: disable_dropout(bench.dense()).train() for name in (OURS, THEIRS)}
    multiplied_(models[THEIRS], [g for g in slimkern.discover(models[OURS]) if g.consumers])
    after = {OURS: masks.read, THEIRS: masks.put}
    trainers, noted = {}, {}
    scratch = Path(tempfile.mkdtemp())
    for name, model in models.items():
        noted[name] = Steps(name, turns, after[name])
        arguments = settings.slim.arguments(scratch / name, save=False)
        arguments.max_steps = steps
        trainer = NotingTrainer(
            model, bench.task, bench.rows["train"], arguments, settings.weights, teacher,
            callbacks=[*([slim] if name == OURS else []), noted[name]],
        )  # fmt: skip
        trainer.losses = []
        trainer.remove_callback(PrinterCallback)
        trainers[name] = trainer

    def run(name: str) -> None:
        try:
            trainers[name].train()
        finally:
            turns.wait(name)
            turns.end(name, leave=True)

    with ThreadPoolExecutor(len(models)) as pool:
        for done in [pool.submit(run, name) for name in models]:
            done.result()  # an error of either side ends the comparison
    rows: dict[str, Any] = {"changes of the masks": masks.changes}
    for name in models:
        rows[name] = {
            "wall": noted[name].wall,
            "processor": noted[name].processor,
            "losses": torch.stack(trainers[name].losses).tolist(),
        }
    assert slim.pruning is not None
    slim.pruning.remove()
    return rows, models


def report(rows: dict[str, Any]) -> None:
    """Prints what the rows say."""
    ours, theirs = rows[OURS], rows[THEIRS]
    for clock in ("wall", "processor"):
        a, b = np.array(ours[clock]), np.array(theirs[clock])
        tail = slice(len(a) // 2, None)
        print(
            f"{clock}: {a.sum():.0f} s against {b.sum():.0f} s: {b.sum() / a.sum():.2f}x less; "
            f"median step of the second half {np.median(a[tail]) * 1e3:.0f} ms against "
            f"{np.median(b[tail]) * 1e3:.0f} ms: {np.median(b[tail] / a[tail]):.2f}x"
        )
    a, b = np.array(ours["losses"]), np.array(theirs["losses"])
    apart = np.abs(a / b - 1)
    for count in sorted({min(n, len(a)) for n in (50, 100, 200, len(a))}):
        print(f"losses of {count} steps: at most {apart[:count].max():.2e} apart (relative)")
    for score in rows.get("scores", []):
        print(
            f"{score['split']} {score['metric']}: {score['slim']:.4f} against "
            f"{score['dense']:.4f} multiplied, difference within "
            f"[{score['low']:.4f}, {score['high']:.4f}]"
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--full", action="store_true", help="the longer training of the demo")
    parser.add_argument("--steps", type=int, default=-1, help="at most so many")
    parser.add_argument("--threads", type=int, default=1)
    values = parser.parse_args()
    torch.set_num_threads(values.threads)
    bench = Bench(values.teacher, values.results)
    settings = recipe(
        Protocol.bi_encoder, GRADUAL, values.teacher, bench.task,
        full=values.full, smoke=False, seed=0,
    )  # fmt: skip
    assert settings.slim is not None
    settings = replace(settings, slim=replace(settings.slim, dropout=False))
    weights = settings.weights or DistillationWeights()
    teacher = Teacher(
        bench.dense(), bench.task, bench.rows["train"], hidden_states=weights.hidden > 0
    )
    rows, models = train(bench, settings, teacher, values.steps)
    rows["scores"] = []
    for split in ("dev", "test"):
        made = {n: predict(m.eval(), bench.task, bench.rows[split]) for n, m in models.items()}
        gold = bench.task.gold(bench.rows[split])
        rows["scores"] += compare(split, gold, made[THEIRS], made[OURS])
    rows["machine"] = bench.done["machine"]
    values.results.write_text(json.dumps(rows), encoding="utf-8")
    report(rows)


class _Raw(argparse.RawDescriptionHelpFormatter):
    """The description as it stands."""


if __name__ == "__main__":
    main()
