"""Timing that can be trusted: interleaved, pinned, and only of things that were checked first.

Two calls are never timed one after the other but in turns, so that a change of the machine's clock
or load meets both. The minimum is the best estimate of what a call costs on a shared machine, the
median says what to expect; both are reported. Nothing is timed before a check has passed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import comb
from typing import TypedDict

import torch


class LatencyRow(TypedDict, total=False):
    """Seconds of one forward, dense against slim, measured in turns on the same inputs."""

    batch: int
    tokens: int
    dense_min: float
    dense_median: float
    slim_min: float
    slim_median: float
    further_min: dict[str, float]
    further_median: dict[str, float]


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


@dataclass(frozen=True)
class Ratio:
    """How many times as long the one took as the other.

    Attributes:
        median: of the rounds' ratios.
        low, high: an interval for the true median.
        level: the probability with which such an interval covers it.
    """

    median: float
    low: float
    high: float
    level: float


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """The ratio of two candidates' times, taken round by round, so that drift cancels.

    The interval is that of order statistics: with n rounds, the (k+1)-th smallest and the (k+1)-th
    largest ratio enclose the median with probability 1 - 2 P(B <= k), B binomial (n, 1/2), whatever
    the distribution (David and Nagaraja, Order Statistics, 2003, section 7.1). k is the largest for
    which that is at least 95 %; below six rounds there is none, and the whole range is given.

    Args:
        numerator: seconds, one per round.
        denominator: seconds of the same rounds.

    Raises:
        ValueError: there are no rounds, or not as many on both sides.
    """
    n = len(numerator)
    if n == 0 or n != len(denominator):
        raise ValueError(
            f"numerator has {n} rounds and denominator {len(denominator)}; accepted: the same "
            "number, at least 1"
        )
    ratios = sorted(a / b for a, b in zip(numerator, denominator))
    below, k, level = 0.5**n, 0, 1 - 2 * 0.5**n
    for i in range(1, n // 2):
        below += comb(n, i) * 0.5**n
        if 1 - 2 * below < 0.95:
            break
        k, level = i, 1 - 2 * below
    return Ratio(statistics.median(ratios), ratios[k], ratios[n - 1 - k], level)


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


class Interleaved:
    """Calls that are timed in turns, a round at a time.

    The order is reversed in every second round, so that none always runs on the caches of the same
    neighbour. On a GPU each call is followed by a synchronisation. Warm the calls up before.

    Attributes:
        repeats: name -> calls per round; times are per call.
    """

    def __init__(
        self, candidates: Mapping[str, Callable[[], object]], *, min_seconds: float = 0.0
    ) -> None:
        self._candidates = dict(candidates)
        self._order = list(candidates)
        self.repeats = {name: _repeats(call, min_seconds) for name, call in candidates.items()}

    def round(self) -> dict[str, float]:
        """Each candidate once: name -> seconds per call."""
        spent = {}
        for name in self._order:
            spent[name] = _clock(self._candidates[name], self.repeats[name]) / self.repeats[name]
        self._order.reverse()
        return spent


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
    is anything timed, as :class:`Interleaved` does it. The garbage collector is off while the clock
    runs.

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
        turns = Interleaved(candidates, min_seconds=min_seconds)
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        with no_garbage_collection():
            for _ in range(rounds):
                for name, spent in turns.round().items():
                    seconds[name].append(spent)
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
    further: Mapping[str, Callable[[int, int], Callable[[], object]]] | None = None,
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
        further: models by their names that take part in the same rounds.

    Raises:
        ValueError: as :func:`time_interleaved`.
    """
    rows: list[LatencyRow] = []
    makers = {"dense": dense, "slim": slim, **(further or {})}
    for batch, tokens in shapes:
        candidates = {name: make(batch, tokens) for name, make in makers.items()}
        times = time_interleaved(
            candidates, check=check, rounds=rounds, warmup=warmup, threads=threads
        )
        row = LatencyRow(
            batch=batch,
            tokens=tokens,
            dense_min=times["dense"].minimum,
            dense_median=times["dense"].median,
            slim_min=times["slim"].minimum,
            slim_median=times["slim"].median,
        )
        if further:
            row["further_min"] = {name: times[name].minimum for name in further}
            row["further_median"] = {name: times[name].median for name in further}
        rows.append(row)
    return rows


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
def no_garbage_collection() -> Iterator[None]:
    """Collect now, and not before the block ends."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
