"""What the tests of latency share: a clock that knows the answer, and forwards for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import text_inputs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimkern import latency_cache, timing
from slimkern.timing import Timing

WIDTHS = {"ffn": (80, 64, 48, 32, 16), "mha": (4, 3, 2, 1)}


class Forward:
    """A forward that knows its model, for a clock that reads the time off it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.inputs = model, text_inputs()

    def __call__(self) -> object:
        return self.model(**self.inputs)


class Clock:
    """A stand-in for ``time_interleaved``: a known time for known widths, another speed of the
    machine in every run. Counts the runs, and what it has timed."""

    def __init__(self, of_width: Callable[[str, int], float]) -> None:
        self.of_width, self.runs, self.timed = of_width, 0, []

    def seconds(self, model: nn.Module) -> float:
        layers = model.encoder.layer
        widths = [("ffn", layer.output.dense.in_features) for layer in layers]
        widths += [("mha", layer.attention.output.dense.in_features // 12) for layer in layers]
        return 5.0 + sum(self.of_width(kind, width) for kind, width in widths)

    def __call__(self, candidates, *, check, rounds, threads):
        check({name: call() for name, call in candidates.items()})
        self.runs += 1
        self.timed.append([call.model for call in candidates.values()])
        speed = 1 + (3 - self.runs) ** 2  # the third run is the fastest, at the true speed
        return {
            name: Timing(tuple(speed * self.seconds(call.model) * s for s in (2.0, 1.0, 3.0)))
            for name, call in candidates.items()
        }


def counted(candidates, *, check, **_: object) -> dict[str, Timing]:
    """A stand-in for ``time_interleaved``: a call takes what its products cost, on any machine and
    under any load, so that a slim model is always faster than a dense one."""
    with torch.inference_mode():
        check({name: call() for name, call in candidates.items()})
        timed = {}
        for name, call in candidates.items():
            with FlopCounterMode(display=False) as count:
                call()
            timed[name] = Timing((1e-9 * count.get_total_flops(),) * 3)
    return timed


def count_time(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From here on time is :func:`counted`, and tables of it are kept in ``folder``."""
    monkeypatch.setattr(timing, "time_interleaved", counted)
    monkeypatch.setattr(latency_cache, "default_folder", lambda: folder)


def straight(kind: str, width: int) -> float:
    return width * {"ffn": 0.25, "mha": 3.0}[kind]


def all_levels(groups) -> dict[str, tuple[int, ...]]:
    return {g.name: WIDTHS[g.kind] for g in groups}


def refuse(model: nn.Module) -> Callable[[], object]:
    raise AssertionError("a cached table was measured again")
