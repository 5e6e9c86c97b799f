"""The report's command: both kinds of files, the README, and what changed between two runs."""

from __future__ import annotations

import copy
import json

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from speed_cases import full_results, pytest_benchmark_file, small_results

from bench.report import END, START, compact, into_readme, load, main
from slimkern.report.speed_compare import compare, comparison_text

FULL = full_results()
CASE = "model/MiniLM-L6 slim/8x128"


def changed(factor: float, case: str, provider: str, precision: str = "fp32") -> dict:
    results = copy.deepcopy(FULL)
    for row in results["rows"]:
        if (row["case"], row["provider"], row["precision"]) == (case, provider, precision):
            row["seconds"] = [factor * value for value in row["seconds"]]
    return results


def written(path, results):
    path.write_text(json.dumps(results), encoding="utf-8")
    return path


# What changed


def test_a_planted_slow_down_shows_and_nothing_else():
    slower = changed(1.2, CASE, "slimkern avx512")
    found = compare(FULL, slower)
    assert [c.key for c in found.changes] == [(CASE, "slimkern avx512", "fp32")]
    assert found.changes[0].slower == pytest.approx(0.2)
    assert found.changes[0].peer == "torch eager"
    assert "**20 % slower** | " + CASE in comparison_text(found, FULL, slower)
    assert [c.key[1] for c in found.own_slower(0.1)] == ["slimkern avx512"]
    assert found.own_slower(0.25) == []
    assert compare(slower, FULL).changes[0].slower == pytest.approx(1 / 1.2 - 1)


def test_a_slower_machine_is_no_change():
    slow = copy.deepcopy(FULL)
    for row in slow["rows"]:
        if "seconds" in row:
            row["seconds"] = [3.0 * value for value in row["seconds"]]
    found = compare(FULL, slow)
    assert found.changes == ()
    assert found.compared > 1000


def test_noise_within_the_intervals_is_no_change():
    assert compare(FULL, changed(1.004, CASE, "slimkern avx512")).changes == ()


def test_changes_are_sorted_slower_first_and_training_is_held_to_mask_multiply():
    step = "training/12 x 384 masked step/16x48, 80%"
    results = changed(1.5, step, "slimkern masked")
    for row in results["rows"]:
        if (row["case"], row["provider"], row["precision"]) == (CASE, "openvino", "fp32"):
            row["seconds"] = [0.5 * value for value in row["seconds"]]
        if (row["case"], row["provider"], row["precision"]) == (CASE, "onnxruntime", "fp32"):
            row["seconds"] = [3.0 * value for value in row["seconds"]]
    found = compare(FULL, results).changes
    assert [c.key[1] for c in found] == ["onnxruntime", "slimkern masked", "openvino"]
    assert found[1].peer == "mask multiply"
    assert [c.key[1] for c in compare(FULL, results).own_slower(0.1)] == ["slimkern masked"]


def test_new_missing_and_newly_wrong_rows_are_listed():
    results = copy.deepcopy(FULL)
    wrong = next(r for r in results["rows"] if r["case"] == CASE and r["provider"] == "openvino")
    del wrong["seconds"]
    wrong["failed"] = "its error is too large"
    gone = next(r for r in results["rows"] if r["case"] == CASE and "seconds" in r)
    gone["provider"] = "torch eager, renamed"
    found = compare(FULL, results)
    assert found.new == ((CASE, "torch eager, renamed", "fp32"),)
    assert set(found.missing) == {(CASE, "torch eager", "fp32"), (CASE, "openvino", "fp32")}
    assert found.failed == ((CASE, "openvino", "fp32"),)
    assert (CASE, "slimkern avx2", "fp32") in found.alone  # its peer is gone: never absolute times
    text = comparison_text(found, FULL, results)
    for said in ("Wrong now, and not before", "New:", "Missing now:", "Without a common peer"):
        assert said in text


def test_another_machine_is_said():
    other = copy.deepcopy(FULL)
    other["machine"]["cpu"] = "Another"
    assert "are not the same" in comparison_text(compare(FULL, other), FULL, other)
    assert "are not the same" not in comparison_text(compare(FULL, FULL), FULL, FULL)


# Files


def test_pytest_benchmark_s_file_holds_the_same_results(tmp_path):
    loaded = load(written(tmp_path / "a.json", pytest_benchmark_file(FULL)))
    plain = load(written(tmp_path / "b.json", FULL))
    assert plain == FULL
    subjects = [row for row in loaded["rows"] if row.pop("subject", False)]
    assert len(subjects) == len({row["case"] for row in FULL["rows"]})
    for own, row in zip(loaded["rows"], FULL["rows"]):
        assert own.pop("seconds", None) == pytest.approx(row.get("seconds"))
        assert own == {key: value for key, value in row.items() if key != "seconds"}


def test_rows_that_no_provider_was_timed_on_are_kept(tmp_path):
    results = pytest_benchmark_file(small_results())
    lost = [dict(row) for row in small_results(("4x4",))["rows"]]
    for row in lost:
        del row["seconds"]
        row["failed"] = "wrong"
    results["machine_info"]["slimkern"]["rows"] = lost
    loaded = load(written(tmp_path / "a.json", results))
    assert [row["case"] for row in loaded["rows"] if "failed" in row] == ["model/my-model/4x4"] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is no JSON"),
        ("[1]", "neither benchmarks nor rows"),
        ('{"benchmarks": []}', "no machine_info.slimkern"),
        (
            '{"benchmarks": [{"name": "t"}], "machine_info": {"slimkern": {}}}',
            "benchmark 't' has no extra_info.rows",
        ),
        (
            '{"benchmarks": [{"name": "t", "extra_info": {"rows": [{"subject": true}]}}], '
            '"machine_info": {"slimkern": {}}}',
            "its subject has no seconds",
        ),
        ('{"rows": [{}]}', "lacks title"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(path)
    with pytest.raises(SystemExit, match="2"):
        main([str(path)])
    assert "a.json" in capsys.readouterr().err


def test_compact_results_are_small_and_say_the_same(tmp_path):
    text = compact(FULL)
    path = tmp_path / "small.json"
    path.write_text(text, encoding="utf-8")
    again = load(path)
    assert len(text.splitlines()) < len(FULL["rows"]) + 20
    assert len(text) < 0.8 * len(json.dumps(FULL))
    assert compact(again) == text
    assert compare(FULL, again).changes == ()


def test_compact_leaves_out_what_is_not_finite(tmp_path):
    results = small_results()
    del results["rows"][0]["seconds"]
    results["rows"][0] |= {"failed": "not finite", "error": float("nan")}
    row = json.loads(compact(results))["rows"][0]
    assert "error" not in row
    assert row["failed"] == "not finite"


# The command


def test_all_outputs_at_once(tmp_path, capsys):
    source = written(tmp_path / "results.json", pytest_benchmark_file(FULL))
    readme = tmp_path / "README.md"
    readme.write_text(f"# a\n\n{START}\nold\n{END}\n\nrest\n", encoding="utf-8")
    outputs = {"--html": "s.html", "--markdown": "s.md", "--compact": "out/s.json"}
    options = [word for name, file in outputs.items() for word in (name, str(tmp_path / file))]
    assert main([str(source), *options, "--readme", str(readme)]) == 0
    for file in outputs.values():
        assert (tmp_path / file).stat().st_size > 1000
    text = readme.read_text(encoding="utf-8")
    assert "MiniLM-L6: dense → slim" in text
    assert "old" not in text
    assert text.startswith("# a\n\n" + START)
    assert text.endswith(END + "\n\nrest\n")
    assert main([str(source), "--readme", str(readme)]) == 0
    assert readme.read_text(encoding="utf-8") == text
    capsys.readouterr()
    assert main([str(source)]) == 0
    assert "MiniLM-L6: dense → slim" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["no markers", START, END + START, START + START + END])
def test_a_readme_without_its_markers_is_refused(text):
    with pytest.raises(ValueError, match="once each"):
        into_readme(text, "table")


def test_the_exit_code_tells_a_slow_down(tmp_path, capsys):
    before = written(tmp_path / "before.json", FULL)
    now = written(tmp_path / "now.json", changed(1.2, CASE, "slimkern avx512"))
    asked = [str(now), "--base", str(before)]
    assert main(asked) == 0
    assert "20 % slower" in capsys.readouterr().out
    assert main([*asked, "--fail-above", "10"]) == 1
    assert "too slow: " + CASE in capsys.readouterr().err
    assert main([*asked, "--fail-above", "30"]) == 0
    peer = written(tmp_path / "peer.json", changed(1.2, CASE, "openvino"))
    assert main([str(peer), "--base", str(before), "--fail-above", "10"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main([str(now), "--fail-above", "10"])
