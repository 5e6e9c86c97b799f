"""Save and load: bit-equal, uneven or even, within others or around them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
import tiny_models
import torch
from checkpoint_cases import (
    FAMILIES,
    assert_same,
    even_ffn_plan,
    loose_buffers,
    outputs,
    slimmed,
    transformers,
    uneven_plan,
)
from safetensors.torch import load_file, save_file
from torch import nn

from slimkern import checkpoint
from slimkern.checkpoint import CheckpointError, load, save
from slimkern.discovery import discover
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.skeleton import build
from slimkern.surgery import slim_


@pytest.mark.parametrize(
    ("task", "dtype"),
    [
        ("Model", torch.bfloat16),
        ("ForSequenceClassification", torch.float32),
        ("ForMaskedLM", torch.float32),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_uneven_round_trip(name, task, dtype, tmp_path):
    model = slimmed(name, task, dtype=dtype)
    save(model, tmp_path / "slim")
    loaded = load(tmp_path / "slim")
    assert_same(model, loaded)
    assert loaded.slim_plan == model.slim_plan
    assert not loaded.training
    for key, value in model.config.to_dict().items():
        if key not in ("dtype", "architectures", "_name_or_path"):
            assert loaded.config.to_dict()[key] == value, key
    groups = [e.group for e in model.slim_plan.entries]
    for attribute in (a for g in groups for a in g.attributes):
        ours, theirs = (
            getattr(m.get_submodule(attribute.module), attribute.name) for m in (model, loaded)
        )
        assert ours == theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_loader_refuses_an_uneven_model(name, tmp_path):
    model = slimmed(name, "ForSequenceClassification")
    save(model, tmp_path / "slim")
    for loader in (
        transformers.AutoModel,
        transformers.AutoModelForSequenceClassification,
        type(model),
    ):
        with pytest.raises((OSError, ValueError, RuntimeError)):
            loader.from_pretrained(tmp_path / "slim")
        with pytest.raises((OSError, ValueError, RuntimeError)):
            loader.from_pretrained(tmp_path / "slim", ignore_mismatched_sizes=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_alone_are_no_plain_model(name, tmp_path):
    def heads(model):
        return SlimPlan(tuple(PlanEntry(g, (0, 2)) for g in discover(model) if g.kind == "mha"))

    model = slimmed(name, plan=heads)
    save(model, tmp_path / "slim")
    assert_same(model, load(tmp_path / "slim"))
    with pytest.raises((OSError, ValueError, RuntimeError)):
        type(model).from_pretrained(tmp_path / "slim")


@pytest.mark.parametrize("task", ["Model", "ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_loader_takes_an_even_ffn_cut(name, task, tmp_path):
    model = slimmed(name, task, plan=even_ffn_plan)
    save(model, tmp_path / "slim")
    field = "hidden_dim" if name == "distilbert" else "intermediate_size"
    assert json.loads((tmp_path / "slim" / "config.json").read_text())[field] == 32
    assert_same(model, load(tmp_path / "slim"))
    plain = type(model).from_pretrained(tmp_path / "slim")
    assert getattr(plain.config, field) == 32
    assert torch.equal(outputs(model), outputs(plain))
    if task == "Model":
        auto = transformers.AutoModel.from_pretrained(tmp_path / "slim")
        assert torch.equal(outputs(model), outputs(auto))


def test_bit_equal_in_a_fresh_process(tmp_path):
    code = (
        "import sys, torch, slimkern; from safetensors.torch import load_file, save_file\n"
        "torch.set_num_threads(1)\n"
        "for folder in sys.argv[1:]:\n"
        "    inputs = load_file(folder + '/inputs')\n"
        "    with torch.no_grad(): y = slimkern.load(folder + '/slim')(**inputs)[0]\n"
        "    save_file({'y': y.contiguous()}, folder + '/outputs')\n"
    )
    made = {}
    for name in FAMILIES:
        model = slimmed(name, "ForSequenceClassification")
        made[name] = outputs(model)
        save(model, tmp_path / name / "slim")
        save_file(tiny_models.text_inputs(), tmp_path / name / "inputs")
    subprocess.run([sys.executable, "-c", code, *(str(tmp_path / n) for n in made)], check=True)
    for name, expected in made.items():
        assert torch.equal(load_file(tmp_path / name / "outputs")["y"], expected), name


@pytest.mark.parametrize("task", ["ForMaskedLM"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ties_are_ties_again(name, task, tmp_path):
    def identities(model):
        first: dict[int, str] = {}
        named = model.named_parameters(remove_duplicate=False)
        return {n: first.setdefault(id(p), n) for n, p in named}

    model = slimmed(name, task)
    save(model, tmp_path / "slim")
    ties = identities(model)
    assert any(n != first for n, first in ties.items())
    assert identities(load(tmp_path / "slim")) == ties


def test_slimmed_twice_and_saved_again(tmp_path):
    model = slimmed("bert", plan=even_ffn_plan)
    slim_(model, uneven_plan(model))
    save(model, tmp_path / "one")
    loaded = load(tmp_path / "one")
    assert_same(model, loaded)
    save(loaded, tmp_path / "two")
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()
    plan = (tmp_path / "two" / "slim_plan.json").read_text()
    assert SlimPlan.from_json(plan) == model.slim_plan
    assert model.slim_plan.entries[0].group.num_units in (tiny_models.FFN, tiny_models.HEADS)


def test_a_model_inside_the_one_that_was_slimmed(tmp_path):
    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = tiny_models.FAMILIES["bert"]()

        def forward(self, input_ids, attention_mask=None):
            return self.encoder(input_ids, attention_mask)[0].mean(1)

    model = Embedder()
    ffns = [g for g in discover(model, tiny_models.text_inputs()) if g.kind == "ffn"]
    slim_(model, SlimPlan(tuple(PlanEntry(g, tuple(range(48))) for g in ffns)))
    assert model.encoder.config.intermediate_size == 48
    save(model.encoder, tmp_path / "slim")
    assert_same(model.encoder, load(tmp_path / "slim"))
    assert transformers.AutoModel.from_pretrained(tmp_path / "slim").config.intermediate_size == 48


def test_a_model_around_a_slim_one(tmp_path):
    model = tiny_models.FAMILIES["bert"]("ForSequenceClassification")
    slim_(model.bert, uneven_plan(model.bert))
    save(model, tmp_path / "slim")
    loaded = load(tmp_path / "slim")
    assert_same(model, loaded)
    assert all(e.group.name.startswith("bert.") for e in loaded.slim_plan.entries)


def test_a_model_around_a_slim_one_is_slimmed_again_and_the_one_inside_too(tmp_path):
    model = tiny_models.FAMILIES["bert"]("ForSequenceClassification")
    slim_(model.bert, even_ffn_plan(model.bert))
    slim_(model, uneven_plan(model))
    slim_(model.bert, uneven_plan(model.bert))
    assert model.config.intermediate_size == 32
    save(model, tmp_path / "slim")
    assert_same(model, load(tmp_path / "slim"))
    save(model.bert, tmp_path / "inner")
    assert_same(model.bert, load(tmp_path / "inner"))


def test_a_model_that_does_not_tell_all_that_happened_to_it_is_refused(tmp_path):
    inner, x = tiny_models.mlp(6, 24, 6), torch.randn(2, 6)
    model = nn.Sequential(inner)
    everything = {"0.2": discover(model, x)["0.2"]}
    for keep in (12, 6, 3):
        group = discover(model, x)["0.2"]
        slim_(model, SlimPlan((PlanEntry(group, tuple(range(keep))),)))
        if keep == 12:
            inner.slim_plan = SlimPlan((PlanEntry(discover(inner, x)["2"], (0,)),))
    assert model.slim_plan["0.2"] == PlanEntry(everything["0.2"], (0, 1, 2))
    model.slim_plan = SlimPlan((PlanEntry(everything["0.2"], tuple(range(20))),))
    with pytest.raises(CheckpointError, match=r"slimmed apart: '0\.2': one plan leaves 20 units"):
        save(model, tmp_path / "slim")


def test_of_a_compiled_model_the_module_inside_is_saved(tmp_path):
    model = slimmed("bert")
    save(torch.compile(model, backend="eager"), tmp_path / "slim")
    assert_same(model, load(tmp_path / "slim"))


def test_a_dense_model_is_saved_as_any(tmp_path):
    model = tiny_models.FAMILIES["bert"]()
    save(model, tmp_path / "dense")
    assert torch.equal(outputs(load(tmp_path / "dense")), outputs(model))
    plain = transformers.AutoModel.from_pretrained(tmp_path / "dense")
    assert torch.equal(outputs(plain), outputs(model))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_implementation_comes_back(attention, tmp_path):
    model = slimmed("bert", attention=attention)
    save(model, tmp_path / "slim")
    assert load(tmp_path / "slim").config._attn_implementation == attention


def test_buffers_that_no_file_holds_are_right(tmp_path):
    # A model cast to bf16 computes with rounded rotary frequencies, also after loading.
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_models.OTHERS["llama"]("ForCausalLM", dtype=dtype)
        assert loose_buffers(model)
        save(model, tmp_path / str(dtype))
        assert_same(model, load(tmp_path / str(dtype)))
    assert not (tmp_path / str(torch.float32) / checkpoint.BUFFERS_FILE).exists()


def test_building_an_architecture_draws_no_random_numbers_and_takes_no_memory(tmp_path):
    model = slimmed("bert")
    before = torch.random.get_rng_state()
    save(model, tmp_path / "slim")
    load(tmp_path / "slim")
    assert torch.equal(torch.random.get_rng_state(), before)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    twin = build(type(model), {"vocab_size": 2**20, "hidden_size": 1024, "num_attention_heads": 16})
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
    assert grown < 2**20  # KiB: a quarter of the embedding table's 4 GiB
    assert all(p.is_meta for p in twin.parameters())
    assert twin.embeddings.position_ids.tolist() == [list(range(512))]
    assert nn.Linear(2, 2).weight.device.type == "cpu"
