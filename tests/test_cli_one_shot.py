"""``slimkern slim`` on the one-shot road: results, healing, families, resume."""

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
from latency_cases import count_time
from tiny_training import WORDS, write_model, write_pairs
from typer.testing import CliRunner

import slimkern
from slimkern.cli.main import app

CUT = ["--ffn2-sparsity", "0.5", "--mha-sparsity", "0.5", "--round-multiplier", "8"]
SHAPE = ["--latency-shape", "4x16"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    made = {
        "model": str(write_model(folder / "model")),
        "classes": str(write_model(folder / "classes", head=3)),
        "scores": str(write_model(folder / "scores", head=1)),
        "texts": str(folder / "texts.txt"),
        "columns": str(folder / "columns.csv"),
    }
    for seed, name in enumerate(("train", "dev", "test")):
        made[name] = str(write_pairs(folder / f"{name}.csv", 48, seed))
    lines = [f"{a} {b} {c}" for a in WORDS for b in WORDS[:4] for c in WORDS[:2]]
    (folder / "texts.txt").write_text("\n".join([*lines, "", lines[0]]) + "\n", encoding="utf-8")
    rows = [f"{line},{line} {line}" for line in lines]
    (folder / "columns.csv").write_text("\n".join(["premise,hypothesis", *rows]), encoding="utf-8")
    return made


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def slim(model, output, *more):
    command = ["slim", model, "--output", str(output), "--threads", "1", *SHAPE, *more]
    return CliRunner().invoke(app, command)


def trained(files, *more):
    return ["--train", files["train"], "--eval", files["dev"], "--test", files["test"], *more]


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def weights(folder):
    return dict(slimkern.load(folder).named_parameters())


def test_texts_alone_are_enough(files, tmp_path):
    done = slim(files["model"], tmp_path / "run", *CUT, "--calibration", files["texts"])
    assert done.exit_code == 0, done.output
    results = read(tmp_path / "run")
    assert results["method"] == "one-shot"
    assert results["scores"] == results["history"] == []
    assert {row["kept"] / row["total"] for row in results["layers"]} == {0.5}
    assert all(0 <= row["error"] < 1 for row in results["layers"])
    about = results["one_shot"]["calibration"]
    assert about["source"] == "texts.txt"
    assert about["sequences"] == len(WORDS) * 4 * 2  # the repeated line counts once
    assert about["tokens"] == about["sequences"] * 5  # three words, [CLS] and [SEP]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"teacher", "slim", "results.json", "report.html"}
    assert not names & {"oneshot", "training", "family"}
    assert [r["tokens"] for r in results["latency"]["rows"]][-1] == 16
    again = slim(files["model"], tmp_path / "run", *CUT, "--calibration", files["texts"])
    assert again.exit_code == 2
    assert "holds this run, finished" in again.output


def test_the_result_is_that_of_the_call(files, tmp_path):
    """The command adds nothing to ``one_shot``: same sequences, same model, bit by bit."""
    more = [*CUT, "--calibration", files["texts"], "--calibration-rows", "20", "--seed", "3"]
    assert slim(files["model"], tmp_path / "a", *more).exit_code == 0
    assert slim(files["model"], tmp_path / "b", *more).exit_code == 0
    assert read(tmp_path / "a")["one_shot"]["calibration"]["sequences"] == 20
    first, second = (weights(tmp_path / n / "slim") for n in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    more[-1] = "4"
    assert slim(files["model"], tmp_path / "c", *more).exit_code == 0
    other = weights(tmp_path / "c" / "slim")
    assert any(not torch.equal(first[n], other[n]) for n in first if first[n].ndim == 2)


def test_evaluation_without_training(files, tmp_path):
    more = ["--calibration", files["columns"], "--eval", files["dev"]]
    done = slim(files["model"], tmp_path / "run", *CUT, *more)
    assert done.exit_code == 0, done.output
    results = read(tmp_path / "run")
    assert [(s["split"], s["metric"]) for s in results["scores"]] == [
        ("dev", "Pearson"),
        ("dev", "Spearman"),
    ]
    assert results["one_shot"]["before_healing"] == []
    assert not any(name.startswith("slim.") for name in results["settings"])
    sequences = results["one_shot"]["calibration"]["sequences"]
    assert sequences == 2 * len(WORDS) * 4 * 2  # embeddings read one column at a time


def test_a_cross_encoder_reads_pairs(files, tmp_path):
    done = slim(files["classes"], tmp_path / "run", *CUT, "--calibration", files["columns"])
    assert done.exit_code == 0, done.output
    assert "task: classification, because the model's head has several outputs" in done.output
    results = read(tmp_path / "run")
    assert results["one_shot"]["calibration"]["sequences"] == len(WORDS) * 4 * 2
    assert results["one_shot"]["calibration"]["tokens"] == len(WORDS) * 4 * 2 * (3 + 6 + 3)
    assert slimkern.load(tmp_path / "run" / "slim").config.num_labels == 3


@pytest.fixture
def counted_time(monkeypatch, tmp_path):
    count_time(monkeypatch, tmp_path / "latency")


def test_healing_and_a_family(files, tmp_path, counted_time):
    more = ["--target-params", "12000", "--round-multiplier", "8", "--heal-epochs", "2"]
    more += ["--family", "1.02,1.01", "--family-heal-epochs", "1", "--lr", "1e-3"]
    done = slim(files["model"], tmp_path / "run", *trained(files, *more))
    assert done.exit_code == 0, done.output
    results = read(tmp_path / "run")
    assert results["size"]["slim_parameters"] <= 12000
    assert results["one_shot"]["predicted"]["unit"] == "parameters"
    assert results["one_shot"]["predicted"]["slim"] == results["size"]["slim_parameters"]
    assert results["one_shot"]["predicted"]["dense"] == results["size"]["dense_parameters"]
    assert "measured" not in results["one_shot"]
    assert results["settings"]["one_shot.target.target_params"] == 12000
    before, after = results["one_shot"]["before_healing"], results["scores"]
    assert [s["dense"] for s in before] == [s["dense"] for s in after]
    assert len(after) == 4
    points = [p for p in results["history"] if "score" in p]
    assert [p["epoch"] for p in points] == [0, 1, 2]
    assert points[0]["score"] == pytest.approx(before[1]["slim"])
    # The best epoch by dev, the cut itself among them.
    assert after[1]["slim"] == pytest.approx(max(p["score"] for p in points))
    family = results["family"]
    assert [m["name"] for m in family["members"]] == ["slim", "1.01x", "1.02x"]
    assert [m.get("target_speedup") for m in family["members"]] == [None, 1.01, 1.02]
    assert family["members"][1]["predicted"]["unit"] == "seconds"
    assert family["members"][0]["scores"] == after
    for name in ("1.01x", "1.02x"):
        folder = tmp_path / "run" / "family" / name
        assert sorted(p.name for p in folder.iterdir()) == ["one_shot.json", "oneshot", "slim"]
    assert not (tmp_path / "run" / "training").exists()
    assert "side by side" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "against speed" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "family, 1.01x" in done.output


@pytest.mark.parametrize("labelled", [True, False])
def test_unlabelled_texts_heal(files, tmp_path, labelled):
    more = ["--unlabelled", files["texts"], "--eval", files["dev"], "--heal-epochs", "1"]
    more += ["--train", files["train"], "--no-finetune"] if labelled else []
    done = slim(files["model"], tmp_path / "run", *CUT, *more)
    assert done.exit_code == 0, done.output
    results = read(tmp_path / "run")
    pairs, texts = 48, len(WORDS) * 4 * 2 // 2  # two texts make a row
    assert results["data"]["splits"] == ({"train": 48} if labelled else {}) | {"dev": 48}
    steps = max(point["step"] for point in results["history"])
    assert steps == -(-(texts + pairs * labelled) // 32)
    source = results["one_shot"]["calibration"]["source"]
    assert source == ("the training rows and texts.txt" if labelled else "texts.txt")
    assert results["settings"]["one_shot.unlabelled"] == "texts.txt"


def test_latency_is_predicted_and_measured(files, tmp_path, counted_time):
    more = ["--target-speedup", "1.01", "--round-multiplier", "8", "--calibration", files["texts"]]
    done = slim(files["model"], tmp_path / "run", *more)
    assert done.exit_code == 0, done.output
    about = read(tmp_path / "run")["one_shot"]
    assert about["shape"] == [4, 16]
    assert about["predicted"]["unit"] == about["measured"]["unit"] == "seconds"
    for side in ("dense", "slim"):
        assert about["predicted"][side] == pytest.approx(about["measured"][side], rel=1e-9)
    assert about["measured"]["dense"] >= 1.01 * about["measured"]["slim"] > 0
    assert "predicted" in done.output
    assert "measured" in done.output


def test_interrupt_in_the_healing_and_go_on(files, tmp_path):
    """Ctrl-C: exit code 130, the cut is not done again, and the end is as if undisturbed."""
    more = [*CUT, *SHAPE, *trained(files), "--heal-epochs", "6", "--batch-size", "4"]
    more += ["--lr", "2e-3", "--no-finetune", "--distill", "task=1,hidden=0.1", "--threads", "1"]
    more += ["--task", "regression"]
    straight = CliRunner().invoke(
        app, ["slim", files["scores"], *more, "--output", str(tmp_path / "straight")]
    )
    assert straight.exit_code == 0, straight.output
    assert "healing did not improve" not in straight.output
    command = ["slim", files["scores"], *more, "--output", str(tmp_path / "stopped")]
    call = [sys.executable, "-m", "slimkern.cli.main", *command]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for line in process.stderr:
        if line.startswith("heal"):
            break
    deadline = time.monotonic() + 60
    scratch = tmp_path / "stopped" / "training" / "heal"
    while not any(scratch.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(60) == 130, said
    assert not (tmp_path / "stopped" / "slim").exists()
    cut = (tmp_path / "stopped" / "oneshot" / "slim_plan.json").stat()
    taken = json.loads((tmp_path / "stopped" / "stages.json").read_text())
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "one-shot ..." not in done.output
    assert (tmp_path / "stopped" / "oneshot" / "slim_plan.json").stat() == cut
    first, second = read(tmp_path / "straight"), read(tmp_path / "stopped")
    assert first["history"] == second["history"]
    assert first["scores"] == second["scores"]
    ours, theirs = (weights(tmp_path / n / "slim") for n in ("straight", "stopped"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    stages = {row["name"]: row["seconds"] for row in second["stages"]}
    assert stages["one-shot"] == pytest.approx(taken["one-shot"], abs=0.01)
    assert stages["heal"] > taken["heal"]
    assert second["seconds"] >= stages["one-shot"] + stages["heal"] - 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is nothing to remove; give one of them, or both, or one budget"),
        ([*CUT, "--target-speedup", "2"], "accepted: sparsities, or exactly one budget"),
        (["--target-params", "9", "--target-macs", "9"], "--target-params and --target-macs are"),
        (["--target-speedup", "1"], "more than 1"),
        (["--target-latency", "0"], "more than 0"),
        ([*CUT, "--epochs", "3"], "belongs to --method gradual; this run is --method one-shot"),
        ([*CUT, "--warm-epochs", "1"], "belongs to --method gradual"),
        ([*CUT, "--scope", "local"], "belongs to --method gradual"),
        ([*CUT, "--method", "gradual", "--target-speedup", "2"], "belongs to --method one-shot"),
        ([*CUT, "--method", "gradual", "--heal-epochs", "1"], "belongs to --method one-shot"),
        ([*CUT, "--method", "gradual", "--calibration", "x.txt"], "belongs to --method one-shot"),
        ([*CUT, "--method", "gradual"], "the gradual method trains: give the training rows"),
        ([*CUT], "give it, or --train: the model is calibrated on texts"),
        ([*CUT, "--heal-epochs", "2"], "--heal-epochs trains: give training rows, or --unlabelled"),
        ([*CUT, "--calibration", "@texts", "--lr", "1"], "has no effect: nothing is healed"),
        (
            [*CUT, "--unlabelled", "@texts", "--heal-epochs", "0", "--calibration", "@texts"],
            "has no effect: nothing is healed",
        ),
        ([*CUT, "--unlabelled", "@texts"], "epochs are compared on its rows"),
        ([*CUT, "--calibration", "@texts", "--patience", "1"], "has no effect: nothing is trained"),
        ([*CUT, "--calibration", "@texts", "--dense-lr", "1"], "the dense model is not trained"),
        ([*CUT, "--calibration", "@texts", "--finetune"], "--finetune trains"),
        ([*CUT, "--train", "@train"], "epochs are compared on its rows"),
        ([*CUT, "--calibration", "@texts", "--family", "2,one"], "'one' is not accepted"),
        ([*CUT, "--calibration", "@texts", "--family", "2,2"], "names a speed-up twice"),
        (
            [*CUT, "--train", "@train", "--eval", "@dev", "--family-heal-epochs", "1"],
            "there is no --family to heal",
        ),
        ([*CUT, "--calibration", "@texts", "--latency-shape", "8"], "accepted: BATCHxTOKENS"),
        ([*CUT, "--calibration", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--target-params", "1000", "--calibration", "@texts"], "can't be met"),
        (["--mha-sparsity", "0.5", "--calibration", "@dev", "--sentence1", "x"], "no column 'x'"),
    ],
)
def test_errors_name_what_is_wrong(files, tmp_path, options, message):
    options = [files[o[1:]] if o.startswith("@") else o for o in options]
    command = ["slim", files["model"], "--output", str(tmp_path / "run"), *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.output
    flat = " ".join(done.output.replace("│", " ").split())
    assert message in flat
    assert not (tmp_path / "run" / "slim").exists()


def test_example(files, tmp_path):
    path = Path(__file__).resolve().parents[1] / "examples" / "run_one_shot.sh"
    ours = {"MODEL": files["model"], "TEXTS": files["texts"], "OUTPUT": str(tmp_path / "run")}
    ours["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    call = [str(path), "--round-multiplier", "8", "--threads", "1", *SHAPE]
    done = subprocess.run(call, env={**os.environ, **ours}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {row["kept"] / row["total"] for row in read(tmp_path / "run")["layers"]} == {0.5}


def test_texts_of_every_format(tmp_path):
    from slimkern.training.data import DataError, read_texts

    rows = [{"text": "a cat", "n": 1}, {"text": "a dog", "n": 2}]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read_texts(tmp_path / "t.jsonl") == [("a cat", None), ("a dog", None)]
    (tmp_path / "t.tsv").write_text("query\tpassage\nq\tp\n")
    assert read_texts(tmp_path / "t.tsv") == [("q", "p")]
    (tmp_path / "t.txt").write_text("\ufeffone, line\n\n  two\u2028lines \n", encoding="utf-8")
    assert read_texts(tmp_path / "t.txt") == [("one, line", None), ("two\u2028lines", None)]
    for name, text, said in (
        ("e.txt", "\n \n", "has no text"),
        ("e.doc", "x", r"accepted: \.txt, \.csv"),
        ("e.csv", "text\n", "has no rows"),
        ("f.csv", "other\nx\n", "--sentence1"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=said):
            read_texts(tmp_path / name)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_texts(tmp_path / "b.txt")
