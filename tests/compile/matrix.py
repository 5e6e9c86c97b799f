"""Runs the workers, as many at once as there are cores, and gathers what they print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.compile.code import Figures
from tests.compile.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("sm_100", "sm_90", "gfx942", "sm_80")  # the longest first


@dataclass(frozen=True)
class Row:
    """A kernel that was compiled, or (``error``) a case that was not."""

    target: str
    op: str
    case: str
    dtype: str
    tile: int | None
    narrow: str
    kernel: str = ""
    constants: dict[str, str] | None = None
    indices: tuple[int, ...] = ()
    itemsize: int = 0
    figures: Figures | None = None
    error: str = ""

    def blocks(self) -> dict[str, int]:
        """The tile's sizes."""
        constants = self.constants or {}
        return {k: int(v) for k, v in constants.items() if k.startswith("BLOCK")}

    def __str__(self) -> str:
        tile = "x".join(map(str, self.blocks().values()))
        flags = [k for k, v in (self.constants or {}).items() if v == "True"]
        return f"{self.target} {self.op}: {self.case}: {self.kernel} {tile} {' '.join(flags)}"


def _row(data: dict[str, Any]) -> Row:
    if "figures" in data:
        figures = data["figures"]
        loads = {int(size): count for size, count in figures["loads"].items()}
        data["figures"] = Figures(**{**figures, "loads": loads})
    return Row(**data)


def environment() -> dict[str, str]:
    """A worker's: its kernels are not interpreted, and fused as Triton does by default."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return kept | {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}


def run_worker(target: str, *options: str, timeout: float = 3600) -> tuple[list[Row], set[str]]:
    """Rows of one target, and the names of the kernels that exist.

    Raises:
        RuntimeError: the worker failed; the message ends with what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile.worker", target, *options],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise RuntimeError(f"the worker for {target} failed:\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    existing = next(set(line["existing"]) for line in lines if "existing" in line)
    return [_row(line) for line in lines if "existing" not in line], existing


def run(targets: Sequence[str] = ORDER, *options: str) -> tuple[list[Row], set[str]]:
    """Rows of every target, and the names of the kernels that exist."""
    order = sorted(targets, key=ORDER.index)
    assert set(order) <= set(TARGETS)
    rows: list[Row] = []
    existing: set[str] = set()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for found, names in pool.map(lambda target: run_worker(target, *options), order):
            rows += found
            existing |= names
    return rows, existing
