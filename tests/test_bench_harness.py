"""The harness: right outputs are timed in turns, wrong ones fail loudly, slow-downs show."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import harness
from bench.harness import Suite, WrongRowsError, measure
from bench.op_works import op_works
from bench.providers.base import Call, Provider, ProviderError
from bench.providers.eager import Eager
from bench.work import Outputs, Setting, Work
from slimkern import timing
from slimkern.report.speed_compare import compare
from slimkern.report.speed_schema import Limit, Precision, SpeedResults, SpeedRow

LIMITS = [
    Limit(name="fp32 FMA", unit="flop/s", value=1e11, size=0),
    Limit(name="L1 read", unit="byte/s", value=1e11, size=16384),
    Limit(name="memory read", unit="byte/s", value=1e10, size=2**28),
]
WORK = op_works(smoke=True)[0]


class Planted(Provider):
    """Eager torch with something done to its output, or to the way to it."""

    precisions: tuple[Precision, ...] = ("fp32",)

    def __init__(self, name: str, change: Callable[[Outputs], Outputs]) -> None:
        self.name, self.change = name, change
        self.calls = 0

    def refuses(self, work: Work, setting: Setting) -> str | None:
        return None

    def prepare(self, work: Work, setting: Setting) -> Call:
        right = Eager().prepare(work, setting)

        def call() -> Outputs:
            self.calls += 1
            return self.change(right())

        return call


class Unwilling(Planted):
    def refuses(self, work: Work, setting: Setting) -> str | None:
        return "not installed"


class Broken(Planted):
    def prepare(self, work: Work, setting: Setting) -> Call:
        raise ProviderError("the fusion did not fire")


class Benchmark:
    """What of pytest-benchmark's fixture the harness uses."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None
        self.group = ""

    def pedantic(
        self, target: Callable[[], None], setup: Callable[[], None], rounds: int, iterations: int
    ) -> None:
        assert iterations == 1
        seconds = []
        for _ in range(rounds):
            setup()
            start = self.clock()
            target()
            seconds.append(self.clock() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=seconds))


def right(outputs: Outputs) -> Outputs:
    return outputs


def run(*providers: Provider) -> tuple[list[SpeedRow], Benchmark, Suite]:
    suite = Suite([Eager(), *providers], [], 1, "cpu", 0.05, LIMITS)
    benchmark = Benchmark()
    try:
        measure(WORK, suite, benchmark)
    except WrongRowsError as error:
        benchmark.extra_info["error"] = str(error)
    rows = benchmark.extra_info.get("rows", suite.lost)
    return rows, benchmark, suite


def of(rows: list[SpeedRow], provider: str, precision: Precision = "fp32") -> SpeedRow:
    (row,) = [r for r in rows if r["provider"] == provider and r["precision"] == precision]
    return row


def test_right_outputs_are_timed_the_same_number_of_rounds():
    other = Planted("other", right)
    rows, benchmark, suite = run(other)
    assert "error" not in benchmark.extra_info
    timed = [row for row in rows if "seconds" in row]
    assert {row["provider"] for row in timed} == {"torch eager", "other"}
    assert {len(row["seconds"]) for row in timed} == {benchmark.extra_info["rounds"]}
    assert harness.FEWEST <= benchmark.extra_info["rounds"] <= harness.MOST
    assert [row["provider"] for row in rows if row.get("subject")] == ["torch eager"]
    for row in timed:
        assert row["error"] <= row["bound"]
        assert row["first_call"] > 0
        assert row["flops"] == WORK.flops
    assert [row for row, _, _ in suite.rows] == rows


def test_slimkerns_own_row_is_the_subject():
    rows, _, _ = run(Planted("slimkern avx2", right), Planted("slimkern avx512", right))
    assert [row["provider"] for row in rows if row.get("subject")] == ["slimkern avx512"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda outputs: (outputs[0] + 1e-3,), "its error against fp64"),
        (lambda outputs: (outputs[0] * torch.nan,), "NaN"),
        (lambda outputs: (outputs[0][..., :-1],), "shape"),
        (lambda outputs: (*outputs, *outputs), "2 outputs"),
    ],
)
def test_a_wrong_result_fails_loudly_and_is_not_timed(change, message):
    wrong = Planted("wrong", change)
    rows, benchmark, _ = run(wrong)
    assert message in of(rows, "wrong")["failed"]
    assert message in benchmark.extra_info["error"]
    assert "wrong fp32" in benchmark.extra_info["error"]
    assert "seconds" not in of(rows, "wrong")
    assert wrong.calls == 1
    assert "seconds" in of(rows, "torch eager")


def test_a_wrong_measuring_stick_fails_too(monkeypatch):
    prepare = Eager.prepare

    def off(self: Eager, work: Work, setting: Setting) -> Call:
        call = prepare(self, work, setting)
        return lambda: (1.5 * call()[0],)

    monkeypatch.setattr(Eager, "prepare", off)
    rows, benchmark, suite = run()
    assert all("failed" in row for row in rows)
    assert suite.lost == rows
    assert "torch eager fp32" in benchmark.extra_info["error"]


def test_what_can_not_run_is_listed_with_its_reason():
    rows, benchmark, _ = run(Unwilling("absent", right), Broken("broken", right))
    assert of(rows, "absent")["skipped"] == "not installed"
    assert of(rows, "broken")["failed"] == "the fusion did not fire"
    assert "absent" not in benchmark.extra_info["error"]


def test_limits_of_both_ends_count(monkeypatch):
    _, _, suite = run()
    assert not any("floor" in row for row, _, _ in suite.rows)
    better = [Limit(**{**LIMITS[0], "value": 2e11}), *LIMITS[1:]]
    monkeypatch.setattr(harness.limits, "measure", lambda threads, device: better)
    suite.finish()
    assert suite.limits == better
    assert all(row["floor"] > 0 and row["limit"] for row, _, _ in suite.rows)


def test_a_slow_down_shows_against_another_run(monkeypatch):
    """By a clock that only the providers move, so that nothing else on the machine counts."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def results(own: float, machine: float = 1.0) -> SpeedResults:
        def takes(seconds: float) -> Callable[[Outputs], Outputs]:
            def change(outputs: Outputs) -> Outputs:
                clock.now += seconds * machine
                return outputs

            return change

        providers = [Planted("torch eager", takes(0.02)), Planted("slimkern", takes(own))]
        suite = Suite(list(providers), [], 1, "cpu", 1.0, LIMITS)
        benchmark = Benchmark(lambda: clock.now)
        rows = measure(WORK, suite, benchmark)
        head = {"title": "t", "command": "c", "date": "d", "versions": {"torch": "0"}, "threads": 1}
        return SpeedResults(**head, machine={"cpu": "x", "cores": 1}, rows=rows)

    base = results(0.010)
    assert compare(base, results(0.010, machine=3.0)).changes == ()
    (change,) = compare(base, results(0.012)).changes
    assert change.key[1] == "slimkern"
    assert change.slower == pytest.approx(0.20)
