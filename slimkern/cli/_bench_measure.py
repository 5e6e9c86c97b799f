"""Check, first call, memory and times of the models of ``slimkern bench``, one shape at a time."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimkern import accuracy, memory, timing
from slimkern.cli._bench_models import Candidate, forward, inputs
from slimkern.cli._measure import parameters
from slimkern.fuse import fuse_
from slimkern.report.speed_schema import ModelSize, Precision, SpeedRow

if TYPE_CHECKING:
    from slimkern.cli._display import Display

_WARM_UP = 2
_MIN_SECONDS = 0.02  # of a round: what is shorter is repeated, so that the clock's grain is nothing


@dataclass(frozen=True)
class Setting:
    """How the models are timed.

    Attributes:
        name: the model's, for the rows.
        dtype: what the models are held in.
        precision: of float32 matrix products: ``highest``, ``high`` or ``medium``.
        rounds: timed rounds.
    """

    name: str
    dtype: torch.dtype
    precision: str
    rounds: int

    @property
    def label(self) -> Precision:
        """The precision as the results name it."""
        if self.dtype is torch.bfloat16:
            return "bf16"
        labels: dict[str, Precision] = {
            "highest": "fp32",
            "high": "fp32-high",
            "medium": "fp32-medium",
        }
        return labels[self.precision]


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Run with ``torch.set_float32_matmul_precision(name)``, and restore what was before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(
    found: Sequence[Candidate],
    shapes: Sequence[tuple[int, int]],
    setting: Setting,
    display: Display,
) -> list[SpeedRow]:
    """Rows of every shape and model: all models of a shape in turns, each checked before.

    Args:
        found: the models, the dense one first; they are not changed.
        shapes: (batch, tokens).
        setting: precision and rounds.
        display: shows a stage per shape.

    Returns:
        a row per shape and model. A row whose output is wrong has ``failed`` and no times.
    """
    held = {c.name: _held(c, setting) for c in found}
    rows: list[SpeedRow] = []
    with matmul_precision(setting.precision), torch.inference_mode():
        # What a process does once (thread pools, buffers of libraries) is no model's first call.
        _call(held[found[0].name], (1, 2))()
        for shape in shapes:
            with display.stage(f"{shape[0]} x {shape[1]} tokens") as bar:
                rows += _shape(found, held, shape, setting, bar)
    return rows


def sizes(found: Sequence[Candidate], dtype: torch.dtype) -> dict[str, ModelSize]:
    """How large each model is when its floating parameters are held in ``dtype``."""
    made: dict[str, ModelSize] = {}
    for candidate in found:
        everything, layers = parameters(candidate.model)
        made[candidate.name] = {
            "parameters": everything,
            "layer_parameters": layers,
            "weight_bytes": everything * dtype.itemsize,
        }
    return made


def _held(candidate: Candidate, setting: Setting) -> nn.Module:
    """The model as it is timed: a copy in the dtype that is asked for, fused where it says so."""
    model = candidate.model
    if candidate.fused or setting.dtype is not torch.float32:
        model = copy.deepcopy(model).to(setting.dtype)
    return fuse_(model, precision=setting.precision) if candidate.fused else model


def _shape(
    found: Sequence[Candidate],
    held: dict[str, nn.Module],
    shape: tuple[int, int],
    setting: Setting,
    bar: Callable[[int, int], None],
) -> list[SpeedRow]:
    """The rows of one shape."""
    rows = {c.name: _row(c.name, shape, setting) for c in found}
    calls: dict[str, Callable[[], Tensor]] = {}
    for candidate in found:
        call = _call(held[candidate.name], shape)
        row = rows[candidate.name]
        _first(row, call, _call(copy.deepcopy(candidate.model).double(), shape))
        if "failed" not in row:
            calls[candidate.name] = call
    if calls:
        for name, seconds in _times(calls, setting.rounds, bar).items():
            rows[name]["seconds"] = seconds
    return list(rows.values())


def _row(name: str, shape: tuple[int, int], setting: Setting) -> SpeedRow:
    """What is known before anything runs."""
    size = f"{shape[0]}x{shape[1]}"
    return SpeedRow(
        level="model",
        case=f"model/{setting.name}/{size}",
        work=setting.name,
        shape=size,
        provider=name,
        precision=setting.label,
        subject=name == "dense",
    )


def _call(model: nn.Module, shape: tuple[int, int]) -> Callable[[], Tensor]:
    given = inputs(model, shape)
    return lambda: forward(model, given)


def _first(row: SpeedRow, call: Callable[[], Tensor], exact: Callable[[], Tensor]) -> None:
    """The first call: its time, its memory, and whether its output is right.

    Args:
        row: is filled in.
        call: of the model that is timed.
        exact: of its copy in float64.
    """
    reference, row["flops"] = accuracy.reference(exact)
    row["bound"] = accuracy.rounding_bound(exact, reference, row["precision"])

    def timed() -> Tensor:
        start = time.perf_counter()
        made = call()
        row["first_call"] = time.perf_counter() - start
        return made

    output, peak = memory.peak_growth(timed)
    if peak is not None:
        row["peak_bytes"] = peak
    if output.shape != reference.shape:
        row["failed"] = f"shape {tuple(output.shape)}, expected {tuple(reference.shape)}"
        return
    error = accuracy.relative_error(output, reference)
    if not math.isfinite(error):
        row["failed"] = "there are NaN or infinities in the output"
        return
    row["error"] = error
    if error > row["bound"]:
        row["failed"] = f"its error against float64 is {error:.2g}, at most {row['bound']:.2g}"


def _times(
    calls: dict[str, Callable[[], Tensor]], rounds: int, bar: Callable[[int, int], None]
) -> dict[str, list[float]]:
    """Seconds of each call, one entry per round, in turns."""
    for _ in range(_WARM_UP):
        for call in calls.values():
            call()
    turns = timing.Interleaved(calls, min_seconds=_MIN_SECONDS)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with timing.no_garbage_collection():
        for done in range(rounds):
            for name, spent in turns.round().items():
                seconds[name].append(spent)
            bar(done + 1, rounds)
    return seconds
