"""The GPU's suite without a GPU: a rehearsal of all of it, and what it does when a part fails."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")
pytest.importorskip("transformers", reason="models are transformers' BERT")

from bench import check, gpu, gpu_report, gpu_run, gpu_works, limits, report
from bench.gpu_modules import LinearPart, MaskedFfn
from bench.gpu_providers import Triton, at_most, on_device
from bench.gpu_time import MOST_CALLS, Direct, Replay, time_in_turns
from bench.gpu_works import LAUNCHED, UNEVEN_FFN, Item, items
from bench.providers.base import ProviderError
from bench.providers.eager import Eager
from bench.work import Setting
from slimkern.report.speed_tables import full_tables

FULL = items("full")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results' file of a whole rehearsal."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    assert gpu.main(["--smoke", "--out", str(out)]) == 0
    return out


def test_the_rehearsal_goes_through_everything(rehearsal):
    results = report.load(rehearsal)
    timed = [row for row in results["rows"] if "seconds" in row]
    assert {row["level"] for row in timed} == {"op", "layer", "training", "model"}
    own = {row["work"] for row in timed if row["provider"] == "slimkern triton"}
    for part in ("fwd", "dx", "dW", "FFN 24->13 slim", "masked FFN", "layer", "tiny slim"):
        assert any(part in work for work in own), part
    assert any(row["provider"] == "slimkern masked" for row in timed)
    assert all(set(row["bounds"]) == {"A100", "H100", "H200", "MI300X"} for row in timed)
    for level in ("model", "training"):  # measured in two ways
        works = {row["work"] for row in timed if row["level"] == level}
        assert {w + LAUNCHED for w in works if not w.endswith(LAUNCHED)} <= works


def test_a_rehearsal_says_that_it_is_one(rehearsal, tmp_path):
    results = report.load(rehearsal)
    assert results["smoke"] is True
    assert "rehearsal" in results["title"]
    assert "nothing was measured" in results["notes"][0]
    assert "nothing was measured" in rehearsal.with_suffix(".md").read_text()
    assert "nothing was measured" in gpu_report.small_tables(results)
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(gpu_report.MARKERS))
    with pytest.raises(SystemExit):
        gpu_report.main([str(rehearsal), "--readme", str(readme)])
    assert readme.read_text() == "\n".join(gpu_report.MARKERS)


def test_results_become_tables_and_a_page(rehearsal, tmp_path):
    results = report.load(rehearsal)
    results["smoke"] = False
    path = tmp_path / "gpu.json"
    path.write_text(report.compact(results))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{gpu_report.MARKERS[0]}\nold\n{gpu_report.MARKERS[1]}\nafter\n")
    assert gpu_report.main([str(path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| tiny slim, fp32 | slimkern triton |" in text
    assert "| indexed linear, rows fwd, fp32 | 1 |" in text
    assert "## Bounds by data sheet: no results" in full_tables(results)
    assert report.main([str(path), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Bounds by data sheet: no results" in page
    assert "MI300X" in page


def test_the_readme_has_a_place_for_the_tables():
    readme = Path(gpu.ROOT / "README.md").read_text()
    made = report.into_readme(readme, "a table", markers=gpu_report.MARKERS)
    assert "a table" in made


def test_without_a_gpu_the_error_names_the_rehearsal(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main([])
    assert stop.value.code == 2
    assert "--smoke rehearses without a GPU" in capsys.readouterr().err


# ---- what is listed ----------------------------------------------------------------------------


def test_the_list_has_every_kind_once():
    cases = [(item.work.case, item.precisions) for item in FULL]
    assert len(set(cases)) == len(cases)
    names = " ; ".join(item.work.name for item in FULL)
    for part in ("614 rows fwd", "640 cols dx", "1536 rows dW", "32x32, 20% kept", "4x1, 50% kept"):
        assert part in names
    for part in ("FFN 768->614 slim", "masked FFN 768->3072, 640 kept fwd+bwd", "bge-base shape"):
        assert part in names
    steps = [item.work.shape for item in FULL if item.work.level == "training"]
    assert steps == ["32x128, 0%", "32x128, 25%", "32x128, 50%", "32x128, 80%"]
    models = {i.work.shape for i in FULL if i.work.name == "bge-base shape slim uneven"}
    assert models == {"8x128", "32x128", "1x128"}
    assert all(i.modes == ("graph", "launched") for i in FULL if i.work.level in ("model",))


def test_what_is_checked_only_comes_first_and_in_bf16():
    flags = [item.checked_only for item in FULL]
    assert flags == sorted(flags, reverse=True)
    assert any(flags)
    checked = [item for item in FULL if item.checked_only]
    assert all(item.precisions == ("bf16",) for item in checked)
    assert {tag for item in checked for tag in item.work.tags} == {"part", "blocks", "masked ffn"}


def test_uneven_models_are_as_large_as_even_ones():
    assert sum(UNEVEN_FFN) == 12 * 640
    assert all(width % 32 for width in UNEVEN_FFN[:-2])


@pytest.mark.parametrize("part", ["fwd", "dx", "dW"])
@pytest.mark.parametrize(("rows", "cols"), [(5, None), (None, 4), (5, 4), (None, None)])
def test_a_sliced_linear_is_the_kept_part(part, rows, cols):
    work = gpu_works._linear(part, 6, 9, 7, rows, cols)
    module = work.build()
    (want,) = module.kept(check.run_module(work, module, work.inputs()))
    (got,) = check.run_module(work, module.sliced(), work.inputs())
    torch.testing.assert_close(got, want)
    assert isinstance(module, LinearPart)


def test_the_three_forms_of_a_masked_ffn_agree():
    work = gpu_works._masked_ffn(8, 12, 5, 3, backward=True)
    module = work.build()
    assert isinstance(module, MaskedFfn)
    want = check.run_module(work, module, work.inputs())
    sliced = check.run_module(work, module.sliced(), work.inputs())
    for a, b in zip(sliced, module.kept(want), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(module.multiplied(*work.inputs()), want[0])


# ---- a part that fails -------------------------------------------------------------------------


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
    assert len(eager["seconds"]) == 2
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


def test_modules_and_inputs_are_made_once_and_copied():
    made = []

    def build():
        made.append(1)
        return LINEAR.work.build()

    work = on_device(replace(LINEAR.work, name="made once", build=build), "cpu")
    first, second = work.build(), work.build()
    assert len(made) == 1
    assert first is not second
    assert first.weight.data_ptr() != second.weight.data_ptr()
    assert Triton().refuses(work, Setting("fp32")) is None
