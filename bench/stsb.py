"""A dense model on STS-benchmark, and rows of results on disk: what the benchmarks share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

import slimkern
from slimkern import machine, timing
from slimkern.cli.fetch import fetch_demo_files, read_stsb
from slimkern.copies import sharing_copy
from slimkern.selection import kept_units
from slimkern.training import EmbeddingTask, predict
from slimkern.training.data import Pair
from slimkern.training.evaluation import compare, pearson, spearman

SHAPE = (8, 128)


class Bench:
    """A dense model, the data, and rows of results on disk."""

    def __init__(self, folder: Path, results: Path) -> None:
        files = fetch_demo_files()
        self.folder, self.results = folder, results
        self.task = EmbeddingTask(scale=5.0)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.texts = {n: read_stsb(getattr(files, n)) for n in ("train", "dev", "test")}
        self.rows = {
            name: self.task.encode(
                [Pair(a, b, gold, line) for line, (a, b, gold) in enumerate(rows, 1)],
                self.tokenizer,
                128,
                name,
            )
            for name, rows in self.texts.items()
        }
        self.done: dict[str, Any] = {}
        if results.is_file():
            self.done = json.loads(results.read_text(encoding="utf-8"))
        self.done["machine"] = machine.machine_line()

    def dense(self) -> torch.nn.Module:
        return self.task.load_model(str(self.folder)).eval()

    def sentences(self, count: int, draw: int = 0) -> list[str]:
        """Training sentences, drawn by a seed: one of each of ``count`` rows."""
        random = np.random.default_rng(draw)
        order = random.permutation(len(self.texts["train"]))[:count]
        return [self.texts["train"][i][int(random.integers(2))] for i in order]

    def add(self, name: str, seconds: float, model: torch.nn.Module, **more: Any) -> None:
        """Evaluate a model and write its row."""
        row: dict[str, Any] = {"seconds": round(seconds, 1), **more}
        for split in ("dev", "test"):
            made = predict(model, self.task, self.rows[split])
            gold = self.task.gold(self.rows[split])
            row[split] = [pearson(gold, made), spearman(gold, made)]
            if "predictions" in self.done and name != "dense":
                dense = np.array(self.done["predictions"][split])
                row[f"{split} interval"] = [
                    [s["low"], s["high"]] for s in compare(split, gold, dense, made)
                ]
            elif name == "dense":
                self.done.setdefault("predictions", {})[split] = made.tolist()
        self.done.setdefault("rows", {})[name] = row
        self.results.write_text(json.dumps(self.done), encoding="utf-8")
        print(name, row, flush=True)

    def even_copy(self, sparsity: float) -> torch.nn.Module:
        """The dense model with the first units of every layer: as fast as any of that width."""
        model = sharing_copy(self.dense())
        entries = []
        for group in slimkern.discover(model):
            kept = kept_units(group.num_units, sparsity, 32 if group.kind == "ffn" else 1)
            entries.append(slimkern.PlanEntry(group, tuple(range(kept))))
        return slimkern.slim_(model, slimkern.SlimPlan(tuple(entries)))

    def times(self, models: dict[Any, torch.nn.Module]) -> dict[Any, float]:
        """Seconds of one forward of ``SHAPE``, all in turns, the fastest of each."""
        ids = torch.randint(1000, 20000, SHAPE, generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        def call(model: torch.nn.Module) -> Any:
            return lambda: model(**inputs)[0]

        made = timing.time_interleaved(
            {name: call(model.eval()) for name, model in models.items()},
            check=_finite,
            rounds=15,
        )
        return {name: timed.minimum for name, timed in made.items()}

    def has(self, name: str) -> bool:
        return name in self.done.get("rows", {})


def _finite(outputs: dict[str, Any]) -> None:
    if not all(torch.isfinite(output).all() for output in outputs.values()):
        raise SystemExit("outputs are not finite")
