"""``slimkern bench`` on tiny models: what is compared, the table, the files, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import tiny_models
import torch
from typer.testing import CliRunner

import slimkern
from slimkern import accuracy
from slimkern.cli import _bench_measure, _bench_models, _bench_table
from slimkern.cli.main import app
from slimkern.discovery import discover
from slimkern.plan import PlanEntry, SlimPlan

pytest.importorskip("transformers")

FAST = ["--rounds", "3", "--shape", "2x7"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(_bench_measure, "_MIN_SECONDS", 0.0)


@pytest.fixture(scope="module")
def dense_model():
    return tiny_models.FAMILIES["bert"]()


@pytest.fixture(scope="module")
def slim_model(dense_model):
    model = copy.deepcopy(dense_model)
    entries = [
        PlanEntry(g, tuple(range(2 if g.kind == "mha" else 32)))
        for g in discover(model)
        if not g.is_head
    ]
    return slimkern.slim_(model, SlimPlan(tuple(entries)))


@pytest.fixture(scope="module")
def dense(dense_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "dense"
    dense_model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def slim(slim_model, tmp_path_factory):
    return str(slimkern.save(slim_model, tmp_path_factory.mktemp("models") / "slim"))


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def results_of(tmp_path, *arguments):
    done = bench(*arguments, "--json", tmp_path / "results.json")
    assert done.exit_code == 0, done.output
    return json.loads((tmp_path / "results.json").read_text()), done


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_a_slim_folder_against_what_it_was_cut_from(slim, dense_model, slim_model, tmp_path):
    results, done = results_of(tmp_path, slim, *FAST)
    assert [row["provider"] for row in results["rows"]] == ["dense", "slim", "fused"]
    counted = {name: known["parameters"] for name, known in results["models"].items()}
    left = parameters(slim_model)
    assert counted == {"dense": parameters(dense_model), "slim": left, "fused": left}
    assert results["models"]["slim"]["weight_bytes"] == 4 * parameters(slim_model)
    assert results["notes"][0] == "dense: what slim was cut from, random weights"
    assert results["notes"][1] == "slim: slim: FFN channels 32 of 80, heads 2 of 4"
    assert results["notes"][2] == "fused: slim, 3 x encoder layer in one call each"
    for row in results["rows"]:
        assert row["case"] == "model/slim/2x7"
        assert row["precision"] == "fp32"
        assert len(row["seconds"]) == results["rounds"] == 3
        assert min(row["seconds"]) > 0
        assert 0 < row["error"] <= row["bound"] < 1e-3
        assert row["first_call"] > 0
    # Products of 14 tokens: q, k, v and output of 2 heads of 12, the FFN of 32, and the pooler.
    hidden, heads = tiny_models.HIDDEN, 2 * tiny_models.HEAD_DIM
    layer = 14 * (4 * hidden * heads + 2 * hidden * 32) + 2 * 2 * 7 * 7 * heads
    assert results["rows"][1]["flops"] == 2 * (tiny_models.LAYERS * layer + 2 * hidden**2)
    assert done.stdout.splitlines()[0].endswith(results["date"][-6:])
    assert "random weights" in done.stdout
    assert "2x7" in done.stdout
    assert "x " in done.stdout.split("against dense")[1]


def test_slim_and_dense_folders_either_way_round(dense, slim, tmp_path):
    first, _ = results_of(tmp_path, slim, "--dense", dense, *FAST)
    second, _ = results_of(tmp_path, dense, "--slim", slim, *FAST)
    assert first["models"] == second["models"]
    assert first["notes"][0] == second["notes"][0] == "dense: dense, its own weights"


def test_a_dense_model_alone(dense, tmp_path):
    results, _ = results_of(tmp_path, dense, *FAST)
    assert [row["provider"] for row in results["rows"]] == ["dense", "fused"]
    assert results["title"] == "dense, dense against fused"


def test_a_model_that_nothing_is_fused_in(tmp_path):
    tiny_models.OTHERS["gpt2"]("LMHeadModel").save_pretrained(tmp_path / "gpt2")
    results, done = results_of(tmp_path, tmp_path / "gpt2", *FAST)
    assert [row["provider"] for row in results["rows"]] == ["dense"]
    assert results["title"] == "gpt2, dense"
    assert results["notes"][0].endswith("; nothing in it can be fused")
    assert "against dense" not in done.stdout


def test_what_a_cut_would_bring(dense, slim_model, tmp_path):
    cut = ["--ffn2-sparsity", "0.7", "--round-multiplier", "32", "--mha-sparsity", "0.5"]
    results, _ = results_of(tmp_path, dense, *FAST, *cut)
    assert results["models"]["slim"]["parameters"] == parameters(slim_model)
    assert "units drawn: FFN channels 32 of 80, heads 2 of 4" in results["notes"][1]


def test_a_folder_with_only_a_configuration(dense_model, tmp_path):
    (tmp_path / "bare").mkdir()
    dense_model.config.save_pretrained(tmp_path / "bare")
    refused = bench(tmp_path / "bare", *FAST)
    assert refused.exit_code == 2
    assert "MODEL is" in refused.stderr
    assert "--random" in refused.stderr
    results, _ = results_of(tmp_path, tmp_path / "bare", "--random", *FAST)
    assert results["notes"][0] == "dense: bare, random weights"
    assert results["models"]["dense"]["parameters"] == parameters(dense_model)


def test_usual_shapes_as_far_as_the_model_takes_them(slim, tmp_path):
    results, _ = results_of(tmp_path, slim, "--rounds", "3")
    assert list(dict.fromkeys(row["shape"] for row in results["rows"])) == [
        "1x16", "1x40", "8x40", "32x32",
    ]  # fmt: skip


def test_bfloat16_and_precisions(slim, slim_model, tmp_path):
    before = torch.get_float32_matmul_precision()
    results, _ = results_of(tmp_path, slim, *FAST, "--dtype", "bfloat16")
    assert {row["precision"] for row in results["rows"]} == {"bf16"}
    assert all(1e-4 < row["error"] <= row["bound"] < 0.5 for row in results["rows"])
    assert results["models"]["slim"]["weight_bytes"] == 2 * parameters(slim_model)
    results, done = results_of(tmp_path, slim, *FAST, "--precision", "high")
    assert {row["precision"] for row in results["rows"]} == {"fp32-high"}
    assert "the same under high as under highest" in done.stdout
    assert torch.get_float32_matmul_precision() == before


def test_threads_are_pinned_and_restored(slim, tmp_path, monkeypatch):
    seen = set()
    plain = _bench_measure.forward

    def forward(*arguments):
        seen.add(torch.get_num_threads())
        return plain(*arguments)

    monkeypatch.setattr(_bench_measure, "forward", forward)
    before = torch.get_num_threads()
    results, _ = results_of(tmp_path, slim, *FAST, "--threads", "2")
    assert seen == {2}
    assert results["threads"] == 2
    assert torch.get_num_threads() == before


def test_the_page(slim, tmp_path):
    for package in ("jinja2", "matplotlib"):
        pytest.importorskip(package)
    done = bench(slim, *FAST, "--html", tmp_path / "speed.html")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "speed.html").read_text()
    assert "slim, dense against slim against fused" in page
    assert "random weights" in page
    assert "2x7" in page


@pytest.mark.parametrize("family", ["roberta", "distilbert", "mpnet", "gpt2", "llama"])
def test_families(family, tmp_path):
    build = {**tiny_models.FAMILIES, **tiny_models.OTHERS}[family]
    model = build("LMHeadModel" if family == "gpt2" else "Model")
    model.save_pretrained(tmp_path / family)
    results, _ = results_of(tmp_path, tmp_path / family, *FAST)
    assert 0 < results["rows"][0]["error"] <= results["rows"][0]["bound"]
    longest = _bench_models.longest(model)
    # RoBERTa and MPNet number their positions from behind the padding's.
    assert longest == (38 if family in ("roberta", "mpnet") else 40)
    assert bench(tmp_path / family, "--rounds", "3", "--shape", f"1x{longest}").exit_code == 0


@pytest.mark.parametrize("wrong", ["value", "nan", "shape"])
def test_a_wrong_output_is_never_timed(slim, tmp_path, monkeypatch, wrong):
    plain, timed = _bench_measure.forward, []

    def forward(model, given):
        output = plain(model, given)
        narrow = model.encoder.layer[0].intermediate.dense.out_features == 32
        if not narrow or slimkern.fused_blocks(model) or output.dtype is not torch.float32:
            return output
        timed.append(wrong)
        return {
            "value": output * (1 + 1e-3),
            "nan": output.masked_fill(output == output.max(), float("nan")),
            "shape": output[:, 1:],
        }[wrong]

    monkeypatch.setattr(_bench_measure, "forward", forward)
    done = bench(slim, *FAST, "--json", tmp_path / "results.json")
    assert done.exit_code == 1
    assert len(timed) == 1
    assert "wrong  2x7 slim:" in done.stdout
    dense_row, slim_row, fused_row = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert "seconds" in dense_row
    assert "seconds" in fused_row
    assert "seconds" not in slim_row
    said = {"value": "its error against float64 is 0.001", "nan": "NaN", "shape": "expected (2, 7"}
    assert said[wrong] in slim_row["failed"]


def test_refusals(dense, slim, tmp_path):
    other = tiny_models.FAMILIES["bert"](intermediate_size=96)
    other.save_pretrained(tmp_path / "other")
    tiny_models.OTHERS["t5"]().save_pretrained(tmp_path / "t5")
    tiny_models.OTHERS["vit"]().save_pretrained(tmp_path / "vit")
    cases = [
        ([tmp_path / "nowhere"], "error: MODEL is "),
        ([slim, "--dense", tmp_path / "nowhere"], "error: --dense is "),
        ([slim, "--dense", slim], "a slim model; accepted: a dense one"),
        ([slim, "--dense", tmp_path / "other"], "the slim model was not cut from"),
        ([slim, "--slim", slim], "--slim is given, but MODEL is"),
        ([slim, "--mha-sparsity", "0.5"], "--mha-sparsity is given, but MODEL is"),
        ([dense, "--dense", dense], "--dense is given, but MODEL is"),
        ([dense, "--slim", dense], "--slim is "),
        ([dense, "--slim", slim, "--ffn2-sparsity", "0.5"], "--slim and --ffn2-sparsity are both"),
        ([dense, "--ffn2-sparsity", "0.1"], "removes nothing from MODEL (FFN channels 80 of 80)"),
        ([tmp_path / "t5"], "an encoder-decoder; accepted: encoders and decoders of token ids"),
        ([tmp_path / "vit"], "a model of pixel_values; accepted"),
        ([slim, "--shape", "8"], "--shape"),
        ([slim, "--shape", "1x41"], "MODEL takes 40 tokens"),
        ([slim, "--rounds", "2"], "--rounds"),
        ([slim, "--dtype", "float16"], "--dtype"),
        ([slim, "--dtype", "bfloat16", "--precision", "high"], "--precision"),
        ([slim, "--round-multiplier", "8"], "--round-multiplier"),
        ([slim, "--json", tmp_path / "no" / "file.json"], "--json"),
        ([slim, "--html", tmp_path], "--html"),
    ]
    for arguments, said in cases:
        refused = bench(*arguments)
        assert refused.exit_code == 2, (arguments, refused.output)
        assert said in " ".join(refused.stderr.replace("│", " ").split()), (
            arguments,
            refused.stderr,
        )
        assert refused.stdout == "", arguments


def test_nothing_to_cut_is_said(tmp_path):
    tiny_models.OTHERS["gpt2"]("LMHeadModel").save_pretrained(tmp_path / "gpt2")
    refused = bench(tmp_path / "gpt2", *FAST, "--mha-sparsity", "0.5")
    assert refused.exit_code == 2
    assert "--mha-sparsity is 0.5, but no heads of MODEL can be removed" in refused.stderr


def test_numbers_in_the_table():
    assert [_bench_table.duration(s) for s in (0.0000123, 0.00999, 0.0999, 0.9994, 12.3)] == [
        "0.01 ms", "9.99 ms", "99.9 ms", "999 ms", "12.3 s",
    ]  # fmt: skip
    assert [_bench_table.size(n) for n in (12, 90_900_000, 4.25e9)] == [
        "12 B",
        "90.9 MB",
        "4.25 GB",
    ]


# What the outputs are held against


@pytest.mark.parametrize("precision", ["fp32", "fp32-high", "fp32-medium", "bf16"])
@pytest.mark.parametrize("outputs", [1, 64])
def test_the_bound_is_met_by_rounding_and_by_nothing_else(precision, outputs):
    torch.manual_seed(0)
    model = tiny_models.mlp(64, 256, 64, outputs)
    x = torch.randn(4, 64)
    exact = copy.deepcopy(model).double()
    reference, flops = accuracy.reference(lambda: exact(x.double()))
    assert flops == 2 * 4 * (64 * 256 + 256 * 64 + 64 * outputs)
    bound = accuracy.rounding_bound(lambda: exact(x.double()), reference, precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.no_grad():
        output = copy.deepcopy(model).to(dtype)(x.to(dtype))
    error = accuracy.relative_error(output, reference)
    assert error <= bound
    unit = {"fp32": 2.0**-24, "fp32-high": 2.0**-11}.get(precision, 2.0**-8)
    assert unit < bound < 100 * unit
    again = accuracy.rounding_bound(lambda: exact(x.double()), reference, precision)
    assert again == bound


def test_the_bound_is_the_same_in_inference_mode():
    model = tiny_models.mlp(64, 256, 64).double()
    x = torch.randn(4, 64, dtype=torch.float64)
    reference, _ = accuracy.reference(lambda: model(x))
    bound = accuracy.rounding_bound(lambda: model(x), reference, "fp32")
    with torch.inference_mode():
        inside = accuracy.rounding_bound(lambda: model(x), reference, "fp32")
    assert inside == bound


def test_an_amplifying_model_has_a_wider_bound():
    class Cancels(torch.nn.Module):
        def forward(self, x):
            return (x + 1000.0) - 1000.0

    x = torch.randn(100, 100, dtype=torch.float64)
    reference, _ = accuracy.reference(lambda: Cancels()(x))
    bound = accuracy.rounding_bound(lambda: Cancels()(x), reference, "fp32")
    error = accuracy.relative_error(Cancels()(x.float()), reference)
    assert 1e-5 < error <= bound < 1e-3


def test_relative_error():
    one = torch.ones(3)
    assert accuracy.relative_error(one, one.double()) == 0.0
    assert accuracy.relative_error(one * 1.5, one.double()) == 0.5
    assert accuracy.relative_error(one * float("nan"), one.double()) == float("inf")
    with pytest.raises(ValueError, match="shape"):
        accuracy.relative_error(torch.ones(2), one.double())
