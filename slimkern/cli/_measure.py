"""What a run measures of its finished models: parameters, bytes, latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimkern import timing
from slimkern.cli._run_folder import RunError
from slimkern.report.schema import Latency, LatencyRow, Size
from slimkern.timing import Timing

SHAPES = ((1, 16), (1, 128), (8, 128), (32, 32))
ROUNDS = 9


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


def size(dense: nn.Module, slim: nn.Module, dense_folder: Path, slim_folder: Path) -> Size:
    """Parameters of both models, and bytes of their weights files."""
    (dense_all, dense_layers), (slim_all, slim_layers) = parameters(dense), parameters(slim)
    found: Size = {
        "dense_parameters": dense_all,
        "slim_parameters": slim_all,
        "dense_parameters_no_embeddings": dense_layers,
        "slim_parameters_no_embeddings": slim_layers,
    }
    dense_bytes, slim_bytes = _weight_bytes(dense_folder), _weight_bytes(slim_folder)
    if dense_bytes and slim_bytes:
        found["dense_bytes"], found["slim_bytes"] = dense_bytes, slim_bytes
    return found


def shapes(max_length: int, further: tuple[int, int] | None = None) -> list[tuple[int, int]]:
    """``SHAPES`` with no more tokens than the model takes, and a ``further`` one."""
    wanted = [(batch, min(tokens, max_length)) for batch, tokens in SHAPES]
    return list(dict.fromkeys([*wanted, *([further] if further else [])]))


def latency(
    dense: nn.Module,
    slim: nn.Module,
    wanted: list[tuple[int, int]],
    checked: str,
    bar: Callable[[int, int], None],
    further: Mapping[str, nn.Module] | None = None,
) -> Latency:
    """Forward times of all models on the same random tokens, in turns."""
    others = {name: partial(_forward, model) for name, model in (further or {}).items()}
    rows: list[LatencyRow] = []
    for done, shape in enumerate(wanted):
        rows += timing.latency_table(
            partial(_forward, dense),
            partial(_forward, slim),
            [shape],
            check=_alike,
            rounds=ROUNDS,
            further=others,
        )
        bar(done + 1, len(wanted))
    return {
        "rows": rows,
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
        "precision": "float32",
        "checked": checked,
    }


def times(models: Mapping[str, nn.Module], shape: tuple[int, int]) -> dict[str, Timing]:
    """Seconds of one forward of each model, all of them in turns, on (batch, tokens)."""
    calls = {name: _forward(model, *shape) for name, model in models.items()}
    return timing.time_interleaved(calls, check=_alike, rounds=ROUNDS)


def _forward(model: nn.Module, batch: int, tokens: int) -> Callable[[], Any]:
    """A forward of random tokens, the same for every model of one vocabulary."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=random)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return lambda: model(**inputs, return_dict=True)[0]


def _alike(outputs: dict[str, Any]) -> None:
    shapes = {output.shape for output in outputs.values()}
    if len(shapes) != 1 or not all(output.isfinite().all() for output in outputs.values()):
        raise RunError("outputs of the models differ in shape or are not finite")


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
