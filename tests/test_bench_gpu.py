"""The GPU's suite without a GPU: a rehearsal of all of it, and what it does when a part fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")
pytest.importorskip("transformers", reason="models are transformers' BERT")

from bench import check, gpu, gpu_report, gpu_works, report
from bench.gpu_modules import LinearPart, MaskedFfn
from bench.gpu_providers import Triton, on_device
from bench.gpu_works import LAUNCHED, UNEVEN_FFN, items
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


def test_modules_and_inputs_are_made_once_and_copied():
    made, work = [], gpu_works._linear("fwd", 4, 9, 7, 5, None)

    def build():
        made.append(1)
        return work.build()

    copied = on_device(replace(work, name="made once", build=build), "cpu")
    first, second = copied.build(), copied.build()
    assert len(made) == 1
    assert first is not second
    assert first.weight.data_ptr() != second.weight.data_ptr()
    assert Triton().refuses(copied, Setting("fp32")) is None
