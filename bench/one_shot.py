"""What each part of the one-shot road is worth, on all-MiniLM-L6-v2 and STS-benchmark.

    python bench/one_shot.py choices --teacher slimkern-demo/teacher --results choices.json
    python bench/one_shot.py losses  --teacher slimkern-demo/teacher --results losses.json
    python bench/one_shot.py control --teacher slimkern-demo/teacher --results control.json
    python bench/one_shot.py speed   --teacher slimkern-demo/teacher --results speed.json
    python bench/one_shot.py base    --results base.json
    python bench/one_shot.py table   --results choices.json

``choices``: without training, what the criterion, the repair and the order of layers are worth.
``losses``: a short healing with each part of the loss left out. ``control``: the dense model
trained further. ``speed``: twice as fast, with uneven widths and with even ones of the same speed,
predicted and measured. ``base``: all-mpnet-base-v2 at 50 % and 50 %, without training, with its
peak memory. Each row is written to the file of results when it is there, and a row that is there
already is not run again. ``table`` prints them.

The teacher is the dense model that ``slimkern demo`` leaves in its folder. Scores are Pearson and
Spearman correlations of the cosine of two embeddings with the gold score.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from base_model import fetch_base_model
from stsb import SHAPE, Bench
from transformers import PrinterCallback, TrainerCallback, set_seed

import slimkern
from slimkern.training import (
    DistillationWeights,
    DistillTrainer,
    HealingSettings,
    Teacher,
    TrainingSettings,
)

CUT = {"ffn2_sparsity": 0.8, "mha_sparsity": 0.6}
CHOICES: dict[str, dict[str, Any]] = {
    "80 % / 60 %, structured OBS, least squares, layer after layer": {},
    "the same, other sentences": {"draw": 1},
    "the same, yet other sentences": {"draw": 2},
    "the same with 4,096 sentences": {"sentences": 4096},
    "criterion: magnitude": {"criterion": "magnitude"},
    "criterion: activation-weighted": {"criterion": "activation"},
    "criterion: fluctuation": {"criterion": "fluctuation"},
    "criterion: Fisher of the masks": {"criterion": "fisher"},
    "all layers beside the dense model": {"sequential": False},
    "repair without the row of ones": {"ones_row": False},
    "repair of the bias alone": {"repair": "bias"},
    "no repair": {"repair": "none"},
    "fluctuation, bias alone (FLAP)": {"criterion": "fluctuation", "repair": "bias"},
    "magnitude, no repair": {"criterion": "magnitude", "repair": "none"},
    "50 % / 50 %": {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5},
    "33 % / 33 %": {"ffn2_sparsity": 0.33, "mha_sparsity": 0.33},
}
LOSSES: dict[str, dict[str, float]] = {
    "all": {},
    "without the task's own": {"task": 0.0},
    "without hidden states": {"hidden": 0.0},
    "without pooled embeddings": {"embedding": 0.0},
    "without similarities": {"similarity": 0.0},
    "the task's own alone": {"hidden": 0.0, "embedding": 0.0, "similarity": 0.0},
}
EPOCHS, CONTROL_EPOCHS = 1.0, 14.0
SENTENCES = 2048


def choices(bench: Bench) -> None:
    """Every row of ``CHOICES``."""
    if not bench.has("dense"):
        bench.add("dense", 0.0, bench.dense())
    for name, changes in CHOICES.items():
        if not bench.has(name):
            options = {**CUT, **changes}
            count, draw = options.pop("sentences", SENTENCES), options.pop("draw", 0)
            texts = bench.sentences(count, draw)
            result = slimkern.one_shot(bench.dense(), texts, tokenizer=bench.tokenizer, **options)
            bench.add(name, result.seconds, result.model)


def losses(bench: Bench) -> None:
    """Every row of ``LOSSES``, each from the same one-shot model."""
    if not bench.has("dense"):
        bench.add("dense", 0.0, bench.dense())
    start = bench.results.with_suffix(".slim")
    if not start.is_dir():
        texts = bench.sentences(SENTENCES)
        result = slimkern.one_shot(bench.dense(), texts, tokenizer=bench.tokenizer, **CUT)
        slimkern.save(result.model, start)
        bench.add("no healing", result.seconds, result.model)
    settings = HealingSettings.for_epochs(EPOCHS)
    teacher = Teacher(bench.dense(), bench.task, bench.rows["train"])
    for name, changes in LOSSES.items():
        if bench.has(name):
            continue
        set_seed(settings.seed)
        model = settings.prepare(slimkern.load(start))
        weights = DistillationWeights(
            **{**vars(settings.weights(bench.task)), **changes}  # the healing's own, but for these
        )
        trainer = DistillTrainer(
            model,
            bench.task,
            bench.rows["train"],
            settings.arguments(bench.results.with_suffix(".scratch"), save=False),
            weights,
            teacher if weights.needs_teacher else None,
        )
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
        bench.add(name, time.perf_counter() - began, model)


def control(bench: Bench) -> None:
    """The dense model, trained as many more epochs as a slim one is healed, scored after each."""
    model = bench.dense()
    settings = TrainingSettings(CONTROL_EPOCHS, 3e-5, weight_decay=0.01)
    set_seed(settings.seed)
    began = time.perf_counter()

    class Score(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            name = f"dense, {round(state.epoch)} more"
            bench.add(name, time.perf_counter() - began, kwargs["model"])

    bench.add("dense", 0.0, model)
    scratch = bench.results.with_suffix(".scratch")
    trainer = DistillTrainer(
        model, bench.task, bench.rows["train"], settings.arguments(scratch, save=False)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Score())
    trainer.train()


def speed(bench: Bench) -> None:
    """Twice as fast: uneven widths, and the even ones whose time is nearest."""
    if not bench.has("dense"):
        bench.add("dense", 0.0, bench.dense())
    texts = bench.sentences(SENTENCES)
    common: dict[str, Any] = {"tokenizer": bench.tokenizer}
    uneven = slimkern.one_shot(
        bench.dense(), texts, target_speedup=2.0, latency_shape=SHAPE, **common
    )
    assert uneven.predicted is not None
    found = {s: bench.even_copy(s) for s in np.arange(0.30, 0.72, 0.03).round(2).tolist()}
    times = bench.times({"dense": bench.dense(), "uneven": uneven.model, **found})
    nearest = min(found, key=lambda s: abs(times[s] - times["uneven"]))
    even = slimkern.one_shot(bench.dense(), texts, nearest, nearest, **common)
    times = bench.times({"dense": bench.dense(), "uneven": uneven.model, "even": even.model})
    measured = {name: times["dense"] / value for name, value in times.items()}
    widths = [len(e.keep) for e in uneven.plan]
    told = {"predicted": uneven.predicted.ratio, "measured": measured["uneven"], "widths": widths}
    bench.add("2x as fast, uneven", uneven.seconds, uneven.model, **told)
    bench.add(f"even, {nearest:.0%}", even.seconds, even.model, measured=measured["even"])


def base(bench: Bench) -> None:
    """all-mpnet-base-v2 at 50 % and 50 %, without training."""
    model = bench.dense()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for parameter in model.parameters():
        parameter.sum()  # reads the file: weights that nobody has looked at take no memory yet
    if not bench.has("50 % / 50 %"):  # before anything else: the peak is of the whole process
        before = _peak() - size
        texts = bench.sentences(SENTENCES)
        result = slimkern.one_shot(
            model, texts, 0.5, 0.5, tokenizer=bench.tokenizer, max_length=128
        )
        peak = _peak() - before
        bench.add("50 % / 50 %", result.seconds, result.model, peak_of_model=peak / size)
    if not bench.has("dense"):
        bench.add("dense", 0.0, model)


def _peak() -> int:
    """The most memory that the process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(done: dict[str, Any]) -> str:
    """The rows as a table."""
    dense = done["rows"]["dense"]
    lines = ["| | seconds | dev Pearson / Spearman | lost | test Pearson / Spearman | lost |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in done["rows"].items():
        cells = [name, f"{row['seconds']:.0f}" if row["seconds"] else ""]
        for split in ("dev", "test"):
            cells.append(" / ".join(f"{value:.4f}" for value in row[split]))
            lost = [1 - value / whole for value, whole in zip(row[split], dense[split])]
            cells.append("" if name == "dense" else " / ".join(f"{100 * v:.1f} %" for v in lost))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", done["machine"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("choices", "losses", "control", "speed", "base", "table"))
    parser.add_argument("--teacher", type=Path, help="folder of the fine-tuned dense model")
    parser.add_argument("--results", type=Path, required=True, help="JSON, added to")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if asked.part == "table":
        print(table(json.loads(asked.results.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(asked.threads)
    if asked.part == "base":
        base(Bench(fetch_base_model(), asked.results))
    elif asked.teacher is None:
        parser.error("--teacher is needed: slimkern-demo/teacher, for example")
    else:
        {"choices": choices, "losses": losses, "speed": speed}[asked.part](
            Bench(asked.teacher, asked.results)
        )


if __name__ == "__main__":
    main()
