"""The command: what it prints, how it ends, and errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny_models
import torch
from typer.testing import CliRunner

import slimkern
from slimkern.cli import doctor as doctor_module
from slimkern.cli import inspect as inspect_module
from slimkern.cli.main import app, sentence
from slimkern.discovery import discover
from slimkern.plan import PlanEntry, SlimPlan

pytest.importorskip("transformers")


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def bert(tmp_path):
    model = tiny_models.FAMILIES["bert"]("ForSequenceClassification", num_labels=1)
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_version_is_quick():
    code = (
        "import sys; from slimkern.cli.main import app\n"
        "try: app(['--version'])\n"
        "finally: print([m for m in ('transformers', 'triton', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == [f"slimkern {slimkern.__version__}", "[]"]


def test_help_names_the_commands():
    shown = run("--help")
    assert shown.exit_code == 0
    for name in ("inspect", "slim", "bench", "demo", "doctor"):
        assert name in shown.output
        assert run(name, "--help").exit_code == 0


def test_inspect_as_json(bert):
    shown = run("inspect", str(bert), "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    model = tiny_models.FAMILIES["bert"]("ForSequenceClassification", num_labels=1)
    assert found["architecture"] == "BertForSequenceClassification"
    names = [g.name for g in discover(model).groups]
    assert [g["name"] for g in found["groups"]] == names
    assert [r["name"] for r in found["refused"]] == [r.name for r in discover(model).refused]
    counts = found["parameters"]
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    embeddings = sum(p.numel() for n, p in model.named_parameters() if "_embeddings.weight" in n)
    assert counts["embeddings"] == embeddings
    assert counts["layers"] == counts["total"] - embeddings
    hidden, ffn = tiny_models.HIDDEN, tiny_models.FFN
    heads = tiny_models.HEADS * tiny_models.HEAD_DIM
    per_layer = {
        "mha": 3 * (hidden * heads + heads) + heads * hidden,
        "ffn": hidden * ffn + ffn + ffn * hidden,
    }
    for group in found["groups"]:
        if not group["is_head"]:
            assert group["parameters_per_unit"] * group["units"] == per_layer[group["kind"]]
    plain = [g for g in found["groups"] if not g["is_head"]]
    assert len(plain) == 2 * tiny_models.LAYERS
    assert counts["removable"] >= tiny_models.LAYERS * sum(per_layer.values())


def test_inspect_prints_like_layers_once(bert):
    shown = run("inspect", str(bert))
    assert shown.exit_code == 0, shown.output
    assert "0-2" in shown.output
    assert "80 FFN channels" in shown.output
    assert "4 heads of 12" in shown.output
    assert "embedding tables" in shown.output


def test_inspect_loads_no_weights(bert):
    (bert / "model.safetensors").unlink()
    assert run("inspect", str(bert)).exit_code == 0


def test_inspect_a_slim_model(tmp_path):
    model = tiny_models.FAMILIES["bert"]()
    entries = [
        PlanEntry(g, tuple(range(2 + i // 2)))
        for i, g in enumerate(discover(model))
        if not g.is_head
    ]
    slimkern.slim_(model, SlimPlan(tuple(entries)))
    slimkern.save(model, tmp_path / "slim")
    found = json.loads(run("inspect", str(tmp_path / "slim"), "--json").stdout)
    kept = {e.group.name: len(e.keep) for e in entries}
    assert {g["name"]: g["units"] for g in found["groups"] if not g["is_head"]} == kept
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())


def test_what_can_not_be_removed_is_said(tmp_path):
    tiny_models.OTHERS["gpt2"]("LMHeadModel").save_pretrained(tmp_path / "gpt2")
    shown = run("inspect", str(tmp_path / "gpt2"))
    assert shown.exit_code == 0, shown.output
    assert "refused" in shown.output
    assert "Conv1D" in shown.output


@pytest.mark.parametrize("command", ["inspect", "bench"])
def test_errors_are_one_line(command, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        shown = run(command, str(path))
        assert shown.exit_code == 2
        assert shown.stderr.startswith("error: MODEL is ")
        assert len(shown.stderr.splitlines()) == 1
        assert "Traceback" not in shown.output
        assert shown.stdout == ""


def test_a_damaged_slim_model_is_one_line(tmp_path):
    slimkern.save(tiny_models.FAMILIES["bert"](), tmp_path / "slim")
    (tmp_path / "slim" / "slim_plan.json").write_text("{")
    shown = run("inspect", str(tmp_path / "slim"))
    assert shown.exit_code == 2
    assert "slim_plan.json is damaged" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path):
    shown = run("--debug", "inspect", str(tmp_path / "nowhere"))
    assert isinstance(shown.exception, ValueError)


def test_a_defect_is_not_hidden(monkeypatch):
    def defect():
        raise AssertionError("a defect")

    monkeypatch.setattr(doctor_module, "examine", defect)
    assert isinstance(run("doctor").exception, AssertionError)


def test_unknown_commands_and_options_end_with_2():
    assert run("nonsense").exit_code == 2
    assert run("inspect").exit_code == 2
    assert run("inspect", "x", "--nonsense").exit_code == 2


def test_a_missing_package_names_its_extra():
    error = ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
    assert sentence(error) == "this command needs jinja2: pip install 'slimkern[demo]'"
    assert sentence(ValueError("two\n  lines")) == "two lines"
    assert sentence(OSError()) == "OSError"


def test_ranges_of_layers():
    assert inspect_module._ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert inspect_module._ranges([]) == ""


# doctor


def test_doctor_on_this_machine():
    shown = run("doctor", "--json")
    findings = json.loads(shown.stdout)
    assert shown.exit_code == 0, shown.output
    by_name = {f["name"]: f for f in findings}
    assert "torch " + torch.__version__ in by_name["versions"]["detail"]
    assert f"in use {slimkern.cpu.isa()}" in by_name["instruction sets"]["detail"]
    kernels = [n for n in by_name if n.startswith("indexed_linear")]
    assert {n.split()[1] for n in kernels} >= set(slimkern.cpu.available_isas())
    assert all(f["state"] != "broken" for f in findings)
    assert "GPU" in by_name


def test_doctor_restores_the_instruction_set():
    before = slimkern.cpu.isa()
    slimkern.cpu.set_isa("scalar")
    try:
        run("doctor", "--json")
        assert slimkern.cpu.isa() == "scalar"
    finally:
        slimkern.cpu.set_isa(before)


def test_a_wrong_kernel_is_found(monkeypatch):
    right = slimkern.ops.indexed_linear
    monkeypatch.setattr(slimkern.ops, "indexed_linear", lambda *a, **k: right(*a, **k) * 1.0001)
    shown = run("doctor", "--json")
    assert shown.exit_code == 1
    broken = [f["name"] for f in json.loads(shown.stdout) if f["state"] == "broken"]
    assert broken
    assert all(n.startswith("indexed_linear") and n.endswith("float32") for n in broken)


def test_a_broken_module_is_found_and_the_rest_still_shown(monkeypatch):
    def broken():
        raise ImportError("slimkern's C++ module slimkern._C is missing or broken")
        yield

    monkeypatch.setattr(doctor_module, "_isas", broken)
    shown = run("doctor")
    assert shown.exit_code == 1
    assert "missing or broken" in " ".join(shown.output.split())
    assert "threads" in shown.output
