"""``slimkern slim --method gradual`` on tiny models and files: results, resume, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_training import write_model, write_pairs
from transformers import AutoTokenizer
from typer.testing import CliRunner

import slimkern
from slimkern.cli.main import app

GRADUAL = ["--method", "gradual"]
FAST = [
    *GRADUAL,
    "--epochs",
    "2",
    "--batch-size",
    "16",
    "--warm-epochs",
    "0",
    "--cooldown-epochs",
    "1",
]
CUT = ["--ffn2-sparsity", "0.5", "--mha-sparsity", "0.5", "--round-multiplier", "8"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    made = {"model": str(write_model(folder / "model"))}
    for seed, name in enumerate(("train", "dev", "test")):
        made[name] = str(write_pairs(folder / f"{name}.csv", 48, seed))
        made[f"{name}_class"] = str(write_pairs(folder / f"{name}_class.csv", 48, seed, "class"))
    return made


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def slim(files, output, *more, kind=""):
    data = ["--train", files[f"train{kind}"], "--eval", files[f"dev{kind}"]]
    command = ["slim", files["model"], *data, "--output", str(output), "--threads", "1", *more]
    return CliRunner().invoke(app, command)


def check_run(output, task):
    results = json.loads((output / "results.json").read_text())
    assert (output / "report.html").stat().st_size > 10_000
    assert results["settings"]["task"] == task
    assert {row["kept"] / row["total"] for row in results["layers"]} == {0.5}
    points = [point for point in results["history"] if "loss" in point]
    assert points[-1]["ffn_sparsity"] == points[-1]["mha_sparsity"] == 0.5
    assert results["size"]["slim_parameters"] < results["size"]["dense_parameters"]
    assert not (output / "training").exists()
    model = slimkern.load(output / "slim")
    tokenizer = AutoTokenizer.from_pretrained(output / "slim")
    with torch.no_grad():
        assert torch.isfinite(model(**tokenizer("a cat", return_tensors="pt"))[0]).all()
    return results


def test_embeddings(files, tmp_path):
    done = slim(files, tmp_path / "run", *CUT, *FAST, "--test", files["test"])
    assert done.exit_code == 0, done.output
    assert "task: embeddings, because the model has no classification head" in done.output
    results = check_run(tmp_path / "run", "embeddings")
    found = {(row["split"], row["metric"]) for row in results["scores"]}
    assert found == {(s, m) for s in ("dev", "test") for m in ("Pearson", "Spearman")}
    again = slim(files, tmp_path / "run", *CUT, *FAST, "--test", files["test"])
    assert again.exit_code == 2
    assert "holds this run, finished" in again.output
    other = slim(files, tmp_path / "run", *CUT, *FAST, "--test", files["test"], "--seed", "1")
    assert other.exit_code == 2
    assert "other settings (settings.dense.seed, settings.slim.seed)" in other.output


def test_classification_and_a_teacher_that_is_there(files, tmp_path):
    done = slim(files, tmp_path / "a", *CUT, *FAST, "--dense-epochs", "1", kind="_class")
    assert done.exit_code == 0, done.output
    assert "task: classification, because the labels are words" in done.output
    results = check_run(tmp_path / "a", "classification")
    assert [row["metric"] for row in results["scores"]] == ["Accuracy"]
    teacher = str(tmp_path / "a" / "teacher")
    done = slim(files, tmp_path / "b", *CUT, *FAST, "--teacher", teacher, kind="_class")
    assert done.exit_code == 0, done.output
    other = check_run(tmp_path / "b", "classification")
    assert other["scores"][0]["dense"] == results["scores"][0]["dense"]
    assert not (tmp_path / "b" / "teacher").exists()


def test_regression_with_the_reference_loss(files, tmp_path):
    more = ["--task", "regression", "--dense-epochs", "1", "--distill", "hidden=2"]
    done = slim(files, tmp_path, *CUT, *FAST, *more)
    assert done.exit_code == 0, done.output
    results = check_run(tmp_path, "regression")
    assert results["settings"]["weights.hidden"] == 2
    assert results["settings"]["weights.task"] == 0
    assert results["size"]["slim_parameters"] < results["size"]["dense_parameters"]


def test_interrupt_and_go_on(files, tmp_path):
    """Ctrl-C within the slimming: exit code 130, and the same command ends as if undisturbed."""
    more = [*CUT, *GRADUAL, "--epochs", "4", "--batch-size", "4", "--threads", "1"]
    assert slim(files, tmp_path / "straight", *more).exit_code == 0
    data = ["--train", files["train"], "--eval", files["dev"]]
    command = ["slim", files["model"], *data, "--output", str(tmp_path / "stopped"), *more]
    call = [sys.executable, "-m", "slimkern.cli.main", *command]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for line in process.stderr:
        if line.startswith("slim while distilling"):
            break
    deadline = time.monotonic() + 60
    scratch = tmp_path / "stopped" / "training" / "slim"
    while not any(scratch.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(60) == 130, said
    assert "the same command goes on" in said
    assert not (tmp_path / "stopped" / "slim").exists()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "going on with the run" in done.output
    models = [slimkern.load(tmp_path / name / "slim") for name in ("straight", "stopped")]
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is nothing to remove"),
        ([*CUT, "--label", "gold"], "no column 'gold' in the file; it has sentence1, sentence2"),
        ([*CUT, "--distill", "hiden=2"], "'hiden=2' is not NAME=NUMBER"),
        ([*CUT, "--distill", "hidden=-2"], "hidden is -2.0; accepted: at least 0"),
        ([*CUT, "--epochs", "0"], "epochs is 0"),
        ([*CUT, "--task", "regression"], "has no trained head"),
        ([*CUT, "--cooldown-epochs", "9"], "cooldown_epochs=9"),
        ([*CUT, "--teacher", "nowhere"], "nowhere"),
        ([*CUT, "--delimiter", "::"], "--delimiter is '::'"),
    ],
)
def test_errors_name_what_is_wrong(files, tmp_path, options, message):
    done = slim(files, tmp_path / "run", "--no-finetune", *GRADUAL, *options)
    assert done.exit_code == 2, done.output
    flat = " ".join(done.output.replace("│", " ").split())
    assert message in flat


def test_bad_model_and_folder(files, tmp_path):
    missing = dict(files, model=str(tmp_path / "none"))
    done = slim(missing, tmp_path / "run", *CUT)
    assert done.exit_code == 2
    assert str(tmp_path / "none") in done.output
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    done = slim(files, tmp_path / "full", *CUT)
    assert done.exit_code == 2
    assert "is not empty and holds no run" in done.output
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


def test_bad_score_is_named_with_its_line(files, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("sentence1,sentence2,score\na,b,1\na,b,x\n", encoding="utf-8")
    done = slim(dict(files, train=str(path)), tmp_path / "run", *CUT, "--task", "regression")
    assert done.exit_code == 2
    assert "line 3: the score 'x' is not a number" in " ".join(done.output.split())


@pytest.mark.parametrize("script", ["run_auto_slim.sh", "run_ffn_slim_pipeline.sh"])
def test_examples(files, tmp_path, script):
    path = Path(__file__).resolve().parents[1] / "examples" / script
    variables = {"MODEL": "model", "TRAIN": "train", "EVAL": "dev", "TEST": "test"}
    ours = {name: files[key] for name, key in variables.items()}
    ours |= {"EPOCHS": "5", "OUTPUT": str(tmp_path / "run")}
    ours["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    options = ["--round-multiplier", "1", "--threads", "1"]
    done = subprocess.run(
        [str(path), *options], env={**os.environ, **ours}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    layers = json.loads((tmp_path / "run" / "results.json").read_text())["layers"]
    kept = {kind: {row["kept"] for row in layers if row["kind"] == kind} for kind in ("ffn", "mha")}
    heads = {2} if script == "run_auto_slim.sh" else set()
    assert kept == {"ffn": {13}, "mha": heads}  # 64 - int(0.8 * 64), 4 - int(0.6 * 4)
