"""Discovery on the supported families: what is found, what is left alone, and that it is exact."""

from __future__ import annotations

import time

import pytest
import tiny_models as tm
import torch
from exactness import assert_deletion_is_exact, first_output
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slimkern.discovery import discover
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import mask_, slim_

ATTENTION = {name: ("eager",) if name == "mpnet" else ("eager", "sdpa") for name in tm.FAMILIES}
CASES = [
    (name, task, attention)
    for name in tm.FAMILIES
    for task in tm.TASKS
    for attention in ATTENTION[name]
]


def kinds(groups) -> dict[str, int]:
    return {kind: sum(g.kind == kind for g in groups) for kind in ("ffn", "mha")}


@pytest.mark.parametrize(("name", "task", "attention"), CASES)
def test_finds_every_layer_of_every_family(name, task, attention):
    model = tm.FAMILIES[name](task, attention=attention)
    found = discover(model)
    body = [g for g in found if not g.is_head]
    layers = 1 if name == "mpnet" else tm.LAYERS  # MPNet: one group, tied by the position bias
    assert kinds(body) == {"ffn": tm.LAYERS, "mha": layers}
    for group in body:
        if group.kind == "ffn":
            assert group.num_units == tm.FFN
            assert [m.unit_size for m in (*group.producers, *group.consumers)] == [1, 1]
        else:
            tied = tm.LAYERS if name == "mpnet" else 1
            assert group.num_units == tm.HEADS
            assert [m.role for m in group.producers] == ["query", "key", "value"] * tied
            assert {m.unit_size for m in (*group.producers, *group.consumers)} == {tm.HEAD_DIM}
            assert len(group.consumers) == tied
        assert group.name == group.consumers[0].name
    # A head that is a second linear (classifier after a dense layer) is shown as one.
    heads = [g for g in found if g.is_head]
    assert len(heads) == (1 if task == "ForSequenceClassification" else 0)
    # The only other second linear is the decoder of a language model, behind a norm.
    assert len(found.refused) == (1 if task == "ForMaskedLM" else 0)
    for refusal in found.refused:
        assert "layer_norm" in refusal.reason


@pytest.mark.parametrize("name", tm.FAMILIES)
def test_order_of_execution_and_roles_do_not_come_from_names(name):
    groups = discover(tm.FAMILIES[name]()).groups
    linears = [n for n, m in tm.FAMILIES[name]().named_modules() if isinstance(m, nn.Linear)]
    firsts = [linears.index(g.producers[0].name) for g in groups]
    assert firsts == sorted(firsts)
    again = discover(tm.FAMILIES[name]()).groups
    assert again == groups


def test_names_play_no_part():
    model = tm.FAMILIES["bert"]("ForSequenceClassification")
    expected = [(g.kind, g.num_units, g.is_head) for g in discover(model)]
    for module in list(model.modules()):
        for i, key in enumerate(list(module._modules)):
            if isinstance(module, (nn.ModuleList, nn.Sequential)):
                continue
            if isinstance(module._modules[key], nn.Linear):  # swap in an alias under a new name
                child = module._modules.pop(key)
                module._modules[f"m{i}"] = child
                module.__dict__[key] = child
    found = discover(model)
    assert [(g.kind, g.num_units, g.is_head) for g in found] == expected
    assert all(".m" in m.name or m.name.startswith("m") for g in found for m in g.producers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", tm.FAMILIES)
def test_any_dtype(name, dtype):
    assert discover(tm.FAMILIES[name](dtype=dtype)) == discover(tm.FAMILIES[name]())


def test_mpnet_heads_are_tied_by_the_position_bias():
    (group,) = [g for g in discover(tm.FAMILIES["mpnet"]()) if g.kind == "mha"]
    (bias,) = group.between
    assert (bias.name, bias.dim, bias.unit_size) == (
        "encoder.relative_attention_bias.weight", 1, 1,
    )  # fmt: skip
    counts = {(a.module, a.name): a.per_unit for a in group.attributes}
    assert counts["encoder", "n_heads"] == 1
    assert counts["encoder.layer.2.attention.attn", "num_attention_heads"] == 1
    assert counts["encoder.layer.2.attention.attn", "all_head_size"] == tm.HEAD_DIM


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", {"num_attention_heads": 1, "all_head_size": tm.HEAD_DIM}),
        ("distilbert", {"n_heads": 1, "dim": tm.HEAD_DIM}),
    ],
)
def test_attributes_that_count_heads(name, expected):
    groups = [g for g in discover(tm.FAMILIES[name]()) if g.kind == "mha"]
    for group in groups:
        assert {a.name: a.per_unit for a in group.attributes} == expected


def test_ffn_width_of_its_own_module():
    groups = [g for g in discover(tm.OTHERS["llama"]("ForCausalLM")) if g.kind == "ffn"]
    assert [a.name for g in groups for a in g.attributes] == ["intermediate_size"] * tm.LAYERS
    assert [len(g.producers) for g in groups] == [2] * tm.LAYERS  # gate and up


def test_a_large_model_takes_under_three_seconds():
    model = tm.FAMILIES["bert"]("ForSequenceClassification", num_hidden_layers=24)
    discover(tm.FAMILIES["bert"]())  # imports and caches of the first call are not the model's
    start = time.process_time()  # not the clock: other tests may share the cores
    found = discover(model)
    assert len(found) == 49
    assert time.process_time() - start < 3


def test_meta_device_model():
    with torch.device("meta"):
        model = tm.mlp(6, 9, 7)
    found = discover(model, torch.zeros(2, 6))
    assert [g.name for g in found] == ["2"]


def test_model_of_fake_tensors():
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7))
    assert [g.name for g in discover(model, torch.zeros(2, 6))] == ["2"]


@pytest.mark.parametrize("name", tm.FAMILIES)
def test_a_masked_model_reads_like_the_dense_one(name):
    model = tm.FAMILIES[name]("ForSequenceClassification")
    found = discover(model)
    plan = SlimPlan(tuple(PlanEntry(g, tuple(range(0, g.num_units, 2))) for g in found))
    mask_(model, plan)
    assert discover(model) == found
    slim_(model, plan)
    assert [g.num_units for g in discover(model)] == [g.num_units // 2 for g in found]
    assert not discover(model).refused


def test_compiled_models_are_read_without_compiling():
    model = tm.FAMILIES["bert"]()
    expected = discover(model)
    names = [g.name for g in discover(torch.compile(model))]
    assert names == [f"_orig_mod.{g.name}" for g in expected]
    model.encoder.layer[1] = torch.compile(model.encoder.layer[1])
    assert len(discover(model)) == len(expected)


# ------------------------------------------------ deleting units changes nothing


@pytest.mark.parametrize(("name", "attention"), [(n, a) for n in ATTENTION for a in ATTENTION[n]])
def test_deletion_is_exact_in_every_family(name, attention):
    model = tm.FAMILIES[name]("ForSequenceClassification", attention, torch.float64)
    inputs = tm.text_inputs()
    with torch.no_grad():
        assert_deletion_is_exact(model, discover(model), lambda m: first_output(m(**inputs)))


ELSEWHERE = {
    "llama": ("ForCausalLM", tm.LAYERS, tm.LAYERS),
    "gptj": ("ForCausalLM", tm.LAYERS, tm.LAYERS),
    "xlm": ("Model", tm.LAYERS, tm.LAYERS),
    "t5": ("ForConditionalGeneration", 2 * tm.LAYERS, 2),
    "bart": ("Model", 2 * tm.LAYERS, 2 * tm.LAYERS),
    "vit": ("Model", tm.LAYERS, tm.LAYERS),
    "deberta": ("Model", tm.LAYERS, 0),
    "modernbert": ("Model", 0, 0),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_deletion_is_exact_elsewhere(name):
    task, ffn, mha = ELSEWHERE[name]
    model = tm.OTHERS[name](task, dtype=torch.float64)
    inputs = tm.text_inputs()
    if name == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16).double()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    found = discover(model)
    assert kinds(found) == {"ffn": ffn, "mha": mha}
    with torch.no_grad():
        assert_deletion_is_exact(model, found, lambda m: first_output(m(**inputs)))
