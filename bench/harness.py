"""One piece of work, done by all providers: set up, checked against fp64, timed in turns.

The order of things is the point. Every provider is prepared (its first call timed, its memory
watched) and its output compared with an fp64 reference; one whose output is wrong is never timed.
Then all that are left run round by round in turns. pytest-benchmark carries the subject's row:
slimkern's own best kernels where they run this work, eager torch elsewhere.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from bench import check, limits
from bench.providers.base import Call, Provider, ProviderError
from bench.work import Outputs, Setting, Work
from slimkern import memory
from slimkern.report.speed_schema import PRECISIONS, Limit, Precision, SpeedRow
from slimkern.timing import Interleaved, no_garbage_collection, pinned_threads

STICK = "torch eager"  # whose error, in each precision, is the measuring stick of the others
FEWEST, MOST = 5, 15  # rounds; slow work gets fewer
SHORT = 0.02  # seconds: a shorter call is repeated within a round, so that its caches are its own


@dataclass
class Suite:
    """What holds for a whole run.

    Attributes:
        providers: for ops, layers and models, in the order they are shown.
        training_providers: for training steps.
        threads: of every provider's pool.
        device: ``cpu`` or ``cuda``.
        seconds_per_case: about how long the timed rounds of one piece of work may take.
        limits: the machine's measured peaks.
        lost: rows of work that no provider could be timed on; the others lie in the benchmarks.
        rows: every row of the run, with what it was asked for.
    """

    providers: list[Provider]
    training_providers: list[Provider]
    threads: int
    device: str
    seconds_per_case: float
    limits: list[Limit]
    lost: list[SpeedRow] = field(default_factory=list)
    rows: list[tuple[SpeedRow, Work, Setting]] = field(default_factory=list)

    def providers_of(self, work: Work) -> list[Provider]:
        """Who may be asked to do this work."""
        return self.training_providers if work.level == "training" else self.providers

    def finish(self) -> None:
        """Measure the limits once more, and hold every row against the better of both.

        On a shared machine a peak is easily missed by one measurement, and a limit must be one.
        """
        self.limits = limits.best_of(self.limits, limits.measure(self.threads, self.device))
        for row, work, setting in self.rows:
            row["floor"], row["limit"] = limits.floor(work, setting, self.limits)


@dataclass
class _Candidate:
    """A provider that does the work, and what is known of it."""

    row: SpeedRow
    call: Call


class WrongRowsError(AssertionError):
    """Providers gave wrong results, or could not be set up as promised."""


def measure(work: Work, suite: Suite, benchmark: Any) -> list[SpeedRow]:
    """Fill pytest-benchmark's ``benchmark`` with the work's rows, and return them.

    Raises:
        WrongRowsError: an output is wrong, or a set-up did not hold; after the others were timed.
    """
    # What the modules and libraries hold is set aside from the garbage collector, which otherwise
    # goes through all of it before every provider.
    gc.collect()
    gc.freeze()
    try:
        with pinned_threads(suite.threads):
            rows, candidates = _prepare_all(work, suite)
            if candidates:
                with torch.inference_mode():
                    _time(candidates, work, suite, benchmark)
                benchmark.group = f"{work.level}: {work.name}, {work.shape}"
                benchmark.extra_info["rows"] = rows
            else:
                suite.lost += rows
    finally:
        gc.unfreeze()
    failed = [f"{r['provider']} {r['precision']}: {r['failed']}" for r in rows if "failed" in r]
    if failed:
        raise WrongRowsError(f"{work.case}: " + "; ".join(failed))
    return rows


def _prepare_all(work: Work, suite: Suite) -> tuple[list[SpeedRow], list[_Candidate]]:
    """A row for every provider and precision, and those whose output was right."""
    rows: list[SpeedRow] = []
    candidates: list[_Candidate] = []
    # The measuring stick first; the others stay in the order in which they are shown.
    providers = sorted(suite.providers_of(work), key=lambda p: p.name != STICK)
    jobs = [(work, providers)]
    if work.before is not None:
        jobs.insert(0, (work.before, [p for p in providers if p.name == STICK]))
    for done, asked in jobs:
        reference = check.reference(done)
        sticks: dict[Precision, float] = {}
        for provider, precision in product(asked, PRECISIONS):
            if precision not in provider.precisions:
                continue
            setting = Setting(precision, suite.threads, suite.device)
            row = new_row(work, done, provider, setting)
            rows.append(row)
            suite.rows.append((row, done, setting))
            found = _prepare(provider, done, setting, row, reference, sticks)
            if found is not None:
                candidates.append(found)
    return rows, candidates


def new_row(work: Work, done: Work, provider: Provider, setting: Setting) -> SpeedRow:
    """Among the rows of ``work``; ``done`` is the work itself, or what it was before the cut."""
    return SpeedRow(
        level=work.level,
        case=work.case,
        work=work.name,
        shape=work.shape,
        provider=provider.name if done is work else f"{provider.name}, dense",
        precision=setting.precision,
        flops=done.flops,
        bytes=limits.bytes_of(done, setting.precision),
    )


def _prepare(
    provider: Provider,
    work: Work,
    setting: Setting,
    row: SpeedRow,
    reference: Outputs,
    sticks: dict[Precision, float],
) -> _Candidate | None:
    """Set a provider up and compare its first output with the reference; fills the row."""
    refusal = provider.refuses(work, setting)
    if refusal is not None:
        row["skipped"] = refusal
        return None
    calls: list[Call] = []

    def first() -> Outputs:
        start = time.perf_counter()
        calls.append(provider.prepare(work, setting))
        with torch.inference_mode():
            outputs = calls[0]()
        row["first_call"] = time.perf_counter() - start
        return outputs

    try:
        outputs, grown = memory.peak_growth(first)
        row["error"] = check.error_of(work, outputs, reference)
    except (ProviderError, check.WrongOutput) as error:
        row["failed"] = " ".join(str(error).split())
        return None
    if grown is not None:
        row["peak_bytes"] = grown
    row["bound"] = allowed(work, setting, row["error"], sticks)
    if not row["error"] <= row["bound"]:
        row["failed"] = (
            f"its error against fp64 is {row['error']:.3g}, at most {row['bound']:.3g} is right"
        )
        return None
    return _Candidate(row, calls[0])


def allowed(work: Work, setting: Setting, error: float, sticks: dict[Precision, float]) -> float:
    """What the error may be; the first provider of a precision is the stick, and is held to the
    worst case of rounding."""
    precision = setting.precision
    device: check.Device = "cuda" if setting.device == "cuda" else "cpu"
    if precision not in sticks:
        worst = check.worst_case(work, precision, device)
        if error <= worst:
            sticks[precision] = error
        return worst
    return check.bound(work, precision, sticks[precision], device)


def _time(candidates: list[_Candidate], work: Work, suite: Suite, benchmark: Any) -> None:
    """Times all in turns; the subject by pytest-benchmark, the others just before it."""
    subject = _subject(candidates)
    subject.row["subject"] = True
    for candidate in candidates:
        candidate.call()  # everything is warm before the first call is sized up
    peers = {str(i): c.call for i, c in enumerate(candidates) if c is not subject}
    turns = Interleaved(peers, min_seconds=SHORT)
    own = Interleaved({"subject": subject.call}, min_seconds=SHORT)
    repeats = own.repeats["subject"]
    start = time.perf_counter()
    turns.round()
    own.round()
    spent = time.perf_counter() - start
    rounds = max(FEWEST, min(MOST, int(suite.seconds_per_case / spent)))
    seconds: dict[str, list[float]] = {name: [] for name in peers}

    def others() -> None:
        for name, value in turns.round().items():
            seconds[name].append(value)
        _synchronize(suite.device)

    def run() -> None:
        for _ in range(repeats):
            subject.call()
        _synchronize(suite.device)

    with no_garbage_collection():
        benchmark.pedantic(run, setup=others, rounds=rounds, iterations=1)
    for i, candidate in enumerate(candidates):
        if candidate is not subject:
            candidate.row["seconds"] = seconds[str(i)]
    own_rounds = benchmark.stats.stats.data
    own_rounds[:] = [value / repeats for value in own_rounds]  # what pytest-benchmark shows, too
    subject.row["seconds"] = list(own_rounds)
    benchmark.extra_info.update(repeats=repeats, rounds=rounds)


def _subject(candidates: Sequence[_Candidate]) -> _Candidate:
    """slimkern's best: the last of its providers in the plainest precision; or the first of all."""
    own = [c for c in candidates if c.row["provider"].startswith("slimkern")]
    pool = own or [c for c in candidates if c.row["provider"] == STICK] or list(candidates[:1])
    plainest = min(PRECISIONS.index(c.row["precision"]) for c in pool)
    return [c for c in pool if PRECISIONS.index(c.row["precision"]) == plainest][-1]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
