"""What the GPU's suite does when a part fails, and how calls are captured; without a GPU."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")
pytest.importorskip("transformers", reason="models are transformers' BERT")

from bench import gpu, gpu_run, gpu_works, limits, report
from bench.gpu_providers import at_most
from bench.gpu_time import MOST_CALLS, Direct, Replay, time_in_turns
from bench.gpu_works import Item
from bench.providers.base import ProviderError
from bench.providers.eager import Eager


def bench(**changes: object) -> gpu_run.Bench:
    measured = limits.torch_limits("cpu", width=16, sizes=(2**12,), cache=2**20)
    made = gpu_run.Bench("cpu", measured, 0.01, 2, 1.0, left=lambda: 1e3)
    return replace(made, **changes)


LINEAR = Item(gpu_works._linear("fwd", 4, 9, 7, 5, None), ("fp32",))


class Wrong(Eager):
    """A hundredth too large."""

    name = "slimkern triton"

    def prepare(self, work, setting):
        call = super().prepare(work, setting)
        return lambda: tuple(y * 1.01 for y in call())


class Broken(Eager):
    name = "slimkern triton"

    def prepare(self, work, setting):
        raise ZeroDivisionError("of its own")


@pytest.mark.parametrize(("provider", "said"), [(Wrong, "against fp64"), (Broken, "of its own")])
def test_what_is_wrong_or_broken_is_told_and_not_timed(monkeypatch, provider, said):
    monkeypatch.setattr(gpu_run, "gpu_providers", lambda seconds: [Eager(), provider()])
    eager, other = gpu_run.measure(LINEAR, "fp32", bench())
    assert said in other["failed"]
    assert "seconds" not in other
    assert len(eager["seconds"]) == 2  # rounds
    checked = gpu_run.measure(replace(LINEAR, checked_only=True), "fp32", bench())
    assert [row["provider"] for row in checked] == ["slimkern triton"]


def test_what_ended_a_process_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(gpu_run, "gpu_providers", lambda seconds: [Eager(), Broken()])
    lost = {(LINEAR.work.case, "slimkern triton", "fp32"): "no answer in 60 s"}
    told: list = []
    _, other = gpu_run.measure(LINEAR, "fp32", bench(lost=lost, tell=told.append))
    assert other["failed"] == "no answer in 60 s"
    assert {key[1] for key in told} == {"torch eager"}


def worker(tmp_path: Path, *lines: dict, then: str) -> tuple[list[str], Path]:
    """A process that says some lines and then does something."""
    log = tmp_path / "log.jsonl"
    log.touch()
    said = "".join(json.dumps(line) + "\n" for line in lines)
    code = f"import os, time; open({str(log)!r}, 'a').write({said!r}); {then}"
    return [sys.executable, "-c", code], log


KEY = ["op/a/M=1", "slimkern triton", "bf16"]


def test_a_process_that_ends_or_falls_silent_is_noticed(tmp_path):
    for then, wanted in (("os._exit(9)", "ended with 9"), ("time.sleep(60)", "no answer")):
        found = gpu.Found()
        command, log = worker(tmp_path, {"doing": KEY}, then=then)
        begun = time.monotonic()
        assert wanted in gpu._follow(command, log, found, 1.0, begun + 60)
        assert time.monotonic() - begun < 30
        assert not found.ended
        assert found.lose("it was so")
        assert found.lost == [(KEY, "it was so")]
        assert found.doing is None
        found.doing = KEY
        assert not found.lose("again")
        assert found.ending == "again"
        log.unlink()


def test_after_a_crash_the_rest_goes_on_and_the_command_fails(monkeypatch, tmp_path):
    row = {"level": "op", "case": KEY[0], "work": "a", "shape": "M=1", "provider": KEY[1]}
    row |= {"precision": "bf16", "failed": "the process ended with 9", "flops": 1.0, "bytes": 1.0}
    lives = [
        [{"limits": []}, {"doing": KEY}, {"crash": "CUDA error"}],
        [{"done": [KEY[0], "bf16"], "rows": [row], "took": 1.0}, {"end": True}],
    ]
    states: list[dict] = []

    def follow(command, log, found, silence, until):
        states.append(json.loads(Path(command[command.index("--state") + 1]).read_text()))
        for line in lives[len(states) - 1]:
            found.take(line)
        return "the process ended with 3"

    monkeypatch.setattr(gpu, "_follow", follow)
    out = tmp_path / "gpu.json"
    assert gpu.main(["--smoke", "--out", str(out)]) == 1
    assert states[0]["lost"] == []
    assert states[1]["lost"] == [[KEY, "CUDA error"]]
    assert report.load(out)["rows"][0]["failed"]


@pytest.mark.parametrize("how", ["silent", "late", "interrupted"])
def test_whatever_ends_a_run_what_was_found_is_written(monkeypatch, tmp_path, how):
    row = {"level": "op", "case": KEY[0], "work": "a", "shape": "M=1", "provider": KEY[1]}
    row |= {"precision": "bf16", "skipped": "for a test"}

    def follow(command, log, found, silence, until):
        found.take({"done": [KEY[0], "bf16"], "rows": [row]})
        if how == "interrupted":
            raise KeyboardInterrupt
        found.doing = None if how == "silent" else KEY
        monkeypatch.setattr(gpu.time, "monotonic", lambda: 1e12)
        return "the end"

    monkeypatch.setattr(gpu, "_follow", follow)
    out = tmp_path / "gpu.json"
    assert gpu.main(["--smoke", "--out", str(out)]) == 1
    assert "The run ended before all was done" in report.load(out)["notes"][-1]


class Device:
    """As much of ``torch.cuda`` as captures need, with a clock that replays move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.clock, self.capturing, self.calls, self.ended = 0.0, False, 0, 0
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, fake in {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda given: nullcontext(),
            "synchronize": lambda: None,
            "CUDAGraph": lambda: self.graph(seconds),
            "Event": lambda enable_timing: self.event(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def graph(self, seconds: float) -> SimpleNamespace:
        def begin() -> None:
            self.capturing, self.calls = True, 0

        def end() -> None:
            self.capturing, self.ended = False, self.ended + 1

        def replay() -> None:
            self.clock += seconds * self.calls

        return SimpleNamespace(capture_begin=begin, capture_end=end, replay=replay)

    def event(self) -> SimpleNamespace:
        made = SimpleNamespace(synchronize=lambda: None)
        made.record = lambda: setattr(made, "at", self.clock)
        made.elapsed_time = lambda later: (later.at - made.at) * 1e3
        return made

    def call(self) -> tuple[torch.Tensor, ...]:
        self.calls += self.capturing
        return (torch.tensor(float(self.calls)),)


@pytest.mark.parametrize(("seconds", "calls"), [(2e-5, 25), (1e-2, 1), (1e-7, MOST_CALLS)])
def test_a_graph_holds_as_many_calls_as_take_half_a_millisecond(monkeypatch, seconds, calls):
    device = Device(monkeypatch, seconds)
    replay = Replay(device.call)
    assert replay.calls == device.calls == calls
    assert replay.outputs[0] == calls  # those of the last call of the last capture
    before = device.clock
    replay()
    assert device.clock - before == pytest.approx(calls * seconds)


def test_a_capture_that_fails_is_ended_and_says_why(monkeypatch):
    device = Device(monkeypatch, 1e-3)

    def waits() -> tuple[torch.Tensor, ...]:
        if device.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return device.call()

    with pytest.raises(RuntimeError, match="not permitted"):
        Replay(waits)
    assert device.ended == 1
    assert not device.capturing


def test_an_error_after_which_nothing_can_be_captured_ends_the_process(monkeypatch):
    monkeypatch.setattr(gpu_run, "gpu_providers", lambda seconds: [Eager(), Broken()])
    real, given = gpu_run._still_there, bench()
    monkeypatch.setattr(gpu_run, "_still_there", lambda doing, device: real(doing, "cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: 1 / 0)  # on a device that is lost
    with pytest.raises(gpu_run.DeviceLost, match="of its own"):
        gpu_run.measure(LINEAR, "fp32", given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_short_call_is_captured_several_times_over():
    x = torch.ones(64, device="cuda")
    replay = Replay(lambda: (x * 2,))
    assert 1 < replay.calls <= MOST_CALLS
    x.fill_(5.0)
    replay()
    assert replay.outputs[0].eq(10.0).all()
    seconds = time_in_turns({"a": replay, "b": Direct(lambda: (x * 2,))}, 0.1)
    assert 1e-7 < min(seconds["a"]) < min(seconds["b"]) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_call_that_waits_for_the_device_is_no_graph():
    x = torch.ones(64, device="cuda")
    with pytest.raises(RuntimeError):
        Replay(lambda: (x * float(x.sum()),))
    try:
        gpu_run._still_there("a capture", "cuda")
    except gpu_run.DeviceLost:
        pytest.skip("this torch needs a new process after a failed capture")
    assert float(x.sum()) == 64.0


def test_what_takes_too_long_is_given_up():
    def patient() -> None:
        with at_most(0.05, "compiling"):
            try:
                time.sleep(20)
            except Exception:  # noqa: BLE001 - as compilers have them
                pytest.fail("an ordinary handler has seen it")

    with pytest.raises(ProviderError, match="compiling took more than 0 s"):
        patient()
    with at_most(5.0, "nothing"):
        pass
