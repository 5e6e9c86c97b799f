"""Timing: nothing before the check, in turns, threads restored."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from slimkern import timing
from slimkern.timing import latency_table, pinned_threads, time_interleaved


def nothing(outputs: dict[str, object]) -> None:
    del outputs


def test_calls_take_turns_and_are_timed():
    calls: list[str] = []

    def call(name: str, seconds: float):
        def run():
            calls.append(name)
            time.sleep(seconds)
            return name

        return run

    seen: list[dict[str, object]] = []
    times = time_interleaved(
        {"slow": call("slow", 0.02), "fast": call("fast", 0.002)},
        check=seen.append,
        rounds=4,
        warmup=2,
    )
    assert seen == [{"slow": "slow", "fast": "fast"}]
    assert calls[:4] == ["slow", "fast"] * 2
    assert calls[4:] == ["slow", "fast", "fast", "slow"] * 2
    assert len(times["slow"].seconds) == 4
    assert times["slow"].minimum >= 0.02
    assert times["fast"].minimum >= 0.002
    for t in times.values():
        assert t.minimum == min(t.seconds)
        assert t.minimum <= t.median <= max(t.seconds)


def test_a_failed_check_times_nothing():
    calls = []

    def check(outputs):
        assert outputs["b"] == 2
        raise AssertionError("the outputs differ")

    with pytest.raises(AssertionError, match="differ"):
        time_interleaved({"b": lambda: calls.append(1) or 2}, check=check)
    assert len(calls) == 1


def test_short_calls_are_repeated_within_a_round():
    calls = []
    times = time_interleaved(
        {"a": lambda: calls.append(time.sleep(0.001))}, check=nothing, rounds=3, min_seconds=0.02
    )
    assert len(calls) > 3 + 3
    assert times["a"].minimum >= 0.001


def test_threads_and_the_garbage_collector_come_back():
    before = torch.get_num_threads()
    seen = []

    def call():
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        return gc.isenabled()

    time_interleaved({"a": call}, check=nothing, threads=before + 1, rounds=3)
    assert set(seen) == {(before + 1, True)}
    assert torch.get_num_threads() == before
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="boom"), pinned_threads(before + 1):
        raise RuntimeError("boom")
    assert torch.get_num_threads() == before
    with pinned_threads(None) as threads:
        assert threads == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 2}, "rounds is 2"),
        ({"warmup": 0}, "warmup 0"),
        ({"threads": 0}, "threads is 0"),
        ({"candidates": {}}, "candidates"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        time_interleaved(**{"candidates": {"a": int}, "check": nothing, **arguments})


def test_latency_rows():
    def make(batch, tokens):
        return lambda: torch.zeros(batch, tokens)

    checked = []

    def check(outputs):
        assert outputs["dense"].shape == outputs["slim"].shape
        checked.append(tuple(outputs["dense"].shape))

    rows = latency_table(make, make, [(1, 8), (4, 16)], check=check, rounds=3)
    assert checked == [(1, 8), (4, 16)]
    assert [(r["batch"], r["tokens"]) for r in rows] == checked
    for row in rows:
        assert 0 < row["dense_min"] <= row["dense_median"]
        assert 0 < row["slim_min"] <= row["slim_median"]


def test_the_machine_is_described():
    here = timing.machine()
    assert here["cpu"]
    assert here["cores"] >= 1
    assert here["isa"] in ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
    line = timing.machine_line()
    assert here["cpu"] in line
    assert f"torch {torch.__version__}" in line
    assert timing.versions()["torch"] == torch.__version__
    assert timing.now().endswith("+00:00")
