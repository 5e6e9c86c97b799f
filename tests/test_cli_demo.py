"""``slimkern demo`` on a tiny model and tiny files: both methods, one folder, one page."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from latency_cases import count_time
from tiny_training import write_model, write_pairs
from typer.testing import CliRunner

import slimkern
from slimkern.cli import fetch
from slimkern.cli._demo_settings import recipe
from slimkern.cli._options import Protocol
from slimkern.cli.main import app
from slimkern.training import EmbeddingTask, RegressionTask


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The demo's files, but small: what is downloaded is all that is exchanged."""
    paths = {}
    for seed, name in enumerate(("train", "dev", "test")):
        pairs = write_pairs(tmp_path / "pairs.csv", 40, seed)
        with pairs.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        lines = [
            f"g\tf\ty\t{i}\t{r['score']}\t{r['sentence1']}\t{r['sentence2']}"
            for i, r in enumerate(rows)
        ]
        paths[name] = tmp_path / f"sts-{name}.csv"
        paths[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = fetch.DemoFiles(model_dir=write_model(tmp_path / "model"), **paths)
    monkeypatch.setattr(fetch, "fetch_demo_files", lambda cache=None: files)
    before = torch.get_num_threads()
    yield files
    torch.set_num_threads(before)


def demo(output, *more):
    return CliRunner().invoke(
        app, ["demo", "--output", str(output), "--smoke", "--threads", "1", *more]
    )


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_both_methods_in_one_folder(tiny, tmp_path):
    home = tmp_path / "demo"
    done = demo(home)
    assert done.exit_code == 0, done.output
    assert str(home / "one-shot" / "slim") in done.output.replace("\n", "")
    first = read(home)
    assert first == read(home / "one-shot")
    assert first["method"] == "one-shot"
    assert first["settings"]["slim.epochs"] == 1
    assert len(first["one_shot"]["before_healing"]) == len(first["scores"]) == 4
    names = ["fused", "fused, medium", "fused, bf16"]
    assert [m["name"] for m in first["fused"]["models"] if "high" not in m["name"]] == names
    # In bfloat16, near ties among 40 rows change places.
    for made, most in zip(first["fused"]["models"], (1e-5, 0.05, 0.05)):
        scores = [(s["slim"], f["slim"]) for s, f in zip(first["scores"], made["scores"])]
        assert all(abs(a - b) <= most for a, b in scores), scores
        assert all(row["further_min"][made["name"]] > 0 for row in first["latency"]["rows"])
    kept = {(row["kind"], row["kept"]) for row in first["layers"]}
    assert kept == {("ffn", 32), ("mha", 2)}  # 64 - int(0.8 * 64) up to 32s, 4 - int(0.6 * 4)
    teacher = (home / "teacher" / "model.safetensors").stat()

    done = demo(home, "--method", "gradual")
    assert done.exit_code == 0, done.output
    assert "train the dense teacher" not in done.output
    assert (home / "teacher" / "model.safetensors").stat() == teacher
    both, gradual = read(home), read(home / "gradual")
    assert gradual["method"] == "gradual"
    assert "one_shot" not in gradual
    assert [p["ffn_sparsity"] for p in gradual["history"] if "loss" in p][-1] == 0.5
    assert {k: v for k, v in both.items() if k != "methods"} == first
    assert [m["name"] for m in both["methods"]] == ["one-shot", "gradual"]
    assert [m["scores"] for m in both["methods"]] == [first["scores"], gradual["scores"]]
    assert [s["dense"] for s in gradual["scores"]] == [s["dense"] for s in first["scores"]]
    assert all(m["seconds"] > 0 for m in both["methods"])
    page = (home / "report.html").read_text(encoding="utf-8")
    assert "One-shot and gradual, side by side" in page
    for name in ("one-shot", "gradual"):
        assert (home / name / "report.html").is_file()
        with torch.no_grad():
            model = slimkern.load(home / name / "slim")
            assert torch.isfinite(model(torch.tensor([[2, 5, 3]]))[0]).all()

    again = demo(home)
    assert again.exit_code == 2
    assert "holds this run, finished" in again.output
    assert demo(home, "--seed", "1").exit_code == 2  # the teacher is another one
    assert read(home) == both
    anew = demo(home, "--overwrite")
    assert anew.exit_code == 0, anew.output
    assert (home / "teacher" / "model.safetensors").stat() == teacher
    assert [m["name"] for m in read(home)["methods"]] == ["one-shot", "gradual"]
    other = demo(home, "--overwrite", "--seed", "1")
    assert other.exit_code == 0, other.output
    assert "methods" not in read(home)
    assert not (home / "gradual").exists()


def test_a_family(tiny, tmp_path, monkeypatch):
    count_time(monkeypatch, tmp_path / "latency")
    done = demo(tmp_path / "demo", "--family", "1.01")
    assert done.exit_code == 0, done.output
    results = read(tmp_path / "demo")
    assert [m["name"] for m in results["family"]["members"]] == ["slim", "1.01x"]
    assert (tmp_path / "demo" / "one-shot" / "family" / "1.01x" / "slim").is_dir()
    assert "against speed" in (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")


def test_pairs(tiny, tmp_path):
    done = demo(tmp_path / "demo", "--protocol", "cross-encoder")
    assert done.exit_code == 0, done.output
    assert read(tmp_path / "demo")["model"]["protocol"] == "cross-encoder"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--full"], "--full or --smoke, not both"),
        (["--method", "gradual", "--family", "2"], "belongs to --method one-shot"),
        (["--family", "0.5"], "'0.5' is not accepted"),
        (["--family-heal-epochs", "1"], "there is no --family to heal"),
        (["--teacher", "nowhere"], "nowhere is no folder of a model"),
    ],
)
def test_errors_name_what_is_wrong(options, message, tmp_path):
    done = demo(tmp_path / "demo", *options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("protocol", list(Protocol))
@pytest.mark.parametrize("full", [False, True])
def test_both_methods_have_one_teacher(protocol, full, tmp_path):
    bi_encoder = protocol is Protocol.bi_encoder
    task = EmbeddingTask(5.0) if bi_encoder else RegressionTask()
    common = {"full": full, "smoke": False, "seed": 5}
    a, b = (recipe(protocol, m, tmp_path, task, **common) for m in ("one-shot", "gradual"))
    assert (a.dense, a.task, a.max_length) == (b.dense, b.task, b.max_length)
    assert (a.ffn2_sparsity, a.mha_sparsity) == (b.ffn2_sparsity, b.mha_sparsity) == (0.8, 0.6)
    assert a.slim.epochs == (10 if full else 6)
    assert a.slim.learning_rate == pytest.approx(6e-4)
    if bi_encoder:
        assert a.weights.task == 0.5
    assert a.one_shot.seed == a.slim.seed == b.slim.seed == 5
