"""Timing that can be trusted: interleaved, pinned, and only of things that were checked first.

Two calls are never timed one after the other but in turns, so that a change of the machine's clock
or load meets both. The minimum is the best estimate of what a call costs on a shared machine, the
median says what to expect; both are reported. Nothing is timed before a check has passed.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TypedDict

import torch


class Machine(TypedDict, total=False):
    """Where numbers were taken; :func:`machine` fills it in."""

    cpu: str
    """The processor's own name."""
    cores: int
    """Logical cores the process may use."""
    isa: str
    """``scalar, avx2, avx512, avx512_bf16, amx``: what slimkern's kernels use."""
    memory_gib: float
    gpu: str
    system: str


class LatencyRow(TypedDict, total=False):
    """Seconds of one forward, dense against slim, measured in turns on the same inputs."""

    batch: int
    tokens: int
    dense_min: float
    dense_median: float
    slim_min: float
    slim_median: float


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate.

    Attributes:
        seconds: one entry per round, in order.
    """

    seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The fastest round."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.seconds)


@contextmanager
def pinned_threads(threads: int | None) -> Iterator[int]:
    """Run with ``threads`` threads inside PyTorch's operations, and restore what was before.

    Yields the number in use. ``None`` leaves the setting as it is.

    Raises:
        ValueError: ``threads`` is under 1.
    """
    before = torch.get_num_threads()
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; accepted: at least 1, or None to leave it")
    try:
        if threads is not None and threads != before:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    check: Callable[[dict[str, object]], None],
    rounds: int = 15,
    warmup: int = 2,
    threads: int | None = None,
    min_seconds: float = 0.0,
) -> dict[str, Timing]:
    """Time several calls in turns: round after round, each candidate once per round.

    Each candidate runs once, and ``check`` is given what they returned; only when it has returned
    is anything timed. The order within a round is reversed in every second round, so that none
    always runs on the caches of the same neighbour. The garbage collector is off while the clock
    runs. On a GPU each call is followed by a synchronisation.

    Args:
        candidates: name -> call without arguments.
        check: gets {name: output}; raises where the outputs are not what they should be.
        rounds: timed rounds, at least 3.
        warmup: untimed calls of each candidate, the checked one included; at least 1.
        threads: PyTorch threads while timing; restored afterwards. ``None`` leaves the setting.
        min_seconds: a call shorter than this is repeated within a round until it takes about this
            long; the round's time is divided by the repeats.

    Raises:
        ValueError: an argument is out of range or there is no candidate.
        Exception: whatever ``check`` raises.
    """
    if not candidates:
        raise ValueError("candidates is empty; accepted: at least one named call")
    if rounds < 3 or warmup < 1:
        raise ValueError(
            f"rounds is {rounds} and warmup {warmup}; accepted: at least 3 and at least 1"
        )
    with pinned_threads(threads), torch.inference_mode():
        check({name: call() for name, call in candidates.items()})
        for _ in range(warmup - 1):
            for call in candidates.values():
                call()
        repeats = {name: _repeats(call, min_seconds) for name, call in candidates.items()}
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        order = list(candidates)
        with _no_garbage_collection():
            for _ in range(rounds):
                for name in order:
                    spent = _clock(candidates[name], repeats[name])
                    seconds[name].append(spent / repeats[name])
                order.reverse()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def latency_table(
    dense: Callable[[int, int], Callable[[], object]],
    slim: Callable[[int, int], Callable[[], object]],
    shapes: list[tuple[int, int]],
    *,
    check: Callable[[dict[str, object]], None],
    rounds: int = 15,
    warmup: int = 2,
    threads: int | None = None,
) -> list[LatencyRow]:
    """The report's latency rows: dense against slim for every (batch, tokens).

    Args:
        dense: (batch, tokens) -> a call without arguments that runs one forward.
        slim: the same for the slim model, on the same inputs.
        shapes: the (batch, tokens) to measure.
        check: gets ``{"dense": output, "slim": output}`` of each shape before it is timed. A slim
            model's outputs are not the dense model's: what can be compared is the slim model with
            itself before it was saved, and shapes and finiteness.
        rounds, warmup, threads: as :func:`time_interleaved`.

    Raises:
        ValueError: as :func:`time_interleaved`.
    """
    rows: list[LatencyRow] = []
    for batch, tokens in shapes:
        candidates = {"dense": dense(batch, tokens), "slim": slim(batch, tokens)}
        times = time_interleaved(
            candidates, check=check, rounds=rounds, warmup=warmup, threads=threads
        )
        rows.append(
            LatencyRow(
                batch=batch,
                tokens=tokens,
                dense_min=times["dense"].minimum,
                dense_median=times["dense"].median,
                slim_min=times["slim"].minimum,
                slim_median=times["slim"].median,
            )
        )
    return rows


def machine() -> Machine:
    """What this machine is: processor, cores the process may use, memory, ISA, GPU, system."""
    found = Machine(
        cpu=_cpu_model(),
        cores=_usable_cores(),
        isa=_isa(),
        system=f"{platform.system()} {platform.machine()}",
    )
    memory = _memory_gib()
    if memory is not None:
        found["memory_gib"] = memory
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def versions() -> dict[str, str]:
    """The versions that decide the numbers, of what is installed. Nothing is imported for it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("slimkern", "torch", "transformers", "triton", "numpy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The date and time, ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def machine_line() -> str:
    """One line to print above numbers: machine, ISA, threads, torch, date."""
    here = machine()
    parts = [
        here["cpu"],
        f"{here['cores']} cores",
        f"ISA {here['isa']}",
        f"{torch.get_num_threads()} threads",
        f"torch {torch.__version__}",
        now(),
    ]
    if "gpu" in here:
        parts.insert(1, here["gpu"])
    return ", ".join(parts)


def _clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds of ``repeats`` calls, the GPU's queue drained before and after."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize()
    return time.perf_counter() - start


def _repeats(call: Callable[[], object], min_seconds: float) -> int:
    if min_seconds <= 0.0:
        return 1
    once = max(_clock(call, 1), 1e-9)
    return max(1, round(min_seconds / once))


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cpu_model() -> str:
    """The processor's name as the system tells it, or its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _isa() -> str:
    from slimkern import cpu

    return str(cpu.isa())
