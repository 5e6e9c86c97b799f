"""Timing: nothing before the check, in turns, threads restored."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from slimkern.timing import (
    Interleaved,
    latency_table,
    pinned_threads,
    ratio,
    time_interleaved,
)


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


def test_a_round_reverses_the_order_and_counts_repeats():
    calls: list[str] = []
    turns = Interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert turns.repeats == {"a": 1, "b": 1}
    assert set(turns.round()) == {"a", "b"}
    turns.round()
    assert calls == ["a", "b", "b", "a"]


def test_a_ratio_is_of_the_rounds_and_its_interval_covers_at_least_95_percent():
    drifting = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    same = ratio([2 * t for t in drifting], drifting)
    assert (same.median, same.low, same.high) == (2.0, 2.0, 2.0)
    assert same.level == 1 - 2 / 64
    nine = ratio([float(i) for i in range(1, 10)], [1.0] * 9)
    assert (nine.median, nine.low, nine.high) == (5.0, 2.0, 8.0)
    assert nine.level == 1 - 2 * 10 / 512
    three = ratio([3.0, 1.0, 2.0], [1.0] * 3)
    assert (three.low, three.high, three.level) == (1.0, 3.0, 0.75)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_a_ratio_needs_the_same_rounds(a, b):
    with pytest.raises(ValueError, match="rounds"):
        ratio(a, b)
