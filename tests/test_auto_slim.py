"""The three calls, end to end, on tiny models of every family."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from auto_slim_cases import assert_as_exact_as, outputs_of, prepared, train, zeroed
from tiny_models import FAMILIES, FFN, HEADS, Gated, text_inputs
from torch import nn

from slimkern.auto_slim import model_slim, parse_auto_slim_config, prepare_pruning
from slimkern.discovery import discover
from slimkern.masks import is_masked

SCHEDULE = {"pruning_scope": "local", "end_step": 2, "round_multiplier": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_slimmed_is_masked_is_dense_with_zeros(family, dtype):
    model = FAMILIES[family]("ForSequenceClassification", dtype=dtype)
    untouched = copy.deepcopy(model)
    configs = parse_auto_slim_config(model, ffn2_sparsity=0.5, mha_sparsity=0.5, **SCHEDULE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruning = prepare_pruning(model, configs, optimizer)
    train(model, optimizer)
    assert pruning.done
    assert is_masked(model)
    dense = untouched
    dense.load_state_dict(model.state_dict())  # the zeros alone, computed densely
    masked = copy.deepcopy(model)
    slim = model_slim(model, optimizer=optimizer)
    assert slim is model
    assert not is_masked(slim)
    assert_as_exact_as(slim, masked, dense)
    for entry in slim.slim_plan:
        assert len(entry.keep) == {"ffn": FFN // 2, "mha": HEADS // 2}[entry.group.kind]
    train(slim, optimizer, 1, first=2)  # training goes on


def test_the_signatures_are_the_compatible_ones():
    def shape(function):
        return [
            (p.name, p.default)
            for p in inspect.signature(function).parameters.values()
            if p.default is not p.empty
        ]

    assert list(inspect.signature(parse_auto_slim_config).parameters) == [
        "model", "dataloader", "ffn2_sparsity", "mha_sparsity", "kwargs",
    ]  # fmt: skip
    assert shape(parse_auto_slim_config) == [
        ("dataloader", None), ("ffn2_sparsity", 0.0), ("mha_sparsity", 0.0),
    ]  # fmt: skip
    assert list(inspect.signature(prepare_pruning).parameters)[:2] == ["model", "config"]
    assert shape(prepare_pruning) == [
        ("optimizer", None), ("dataloader", None), ("loss_func", None),
        ("framework", "pytorch"), ("device", None), ("process_group", None),
    ]  # fmt: skip
    assert shape(model_slim)[:2] == [("dataloader", None), ("round_multiplier", 32)]


def test_masks_of_the_config_stay_as_they_are_whatever_model_slim_would_round_to():
    model = FAMILIES["bert"]()
    values = {"pruning_scope": "local", "end_step": 1, "round_multiplier": 1}
    pruning = prepared(
        model, parse_auto_slim_config(model, ffn2_sparsity=0.65, mha_sparsity=0.25, **values)
    )
    train(model, pruning.optimizer, 1)
    model_slim(model, round_multiplier=32)
    assert model.get_submodule("encoder.layer.0.output.dense").in_features == FFN - 52
    assert model.get_submodule("encoder.layer.0.attention.output.dense").in_features == 36


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_state_of_a_masked_model_slims_to_the_same_weights(family):
    model = FAMILIES[family]()
    fresh = copy.deepcopy(model)
    values = {"pruning_scope": "local", "end_step": 1, "round_multiplier": 8}
    pruning = prepared(
        model, parse_auto_slim_config(model, ffn2_sparsity=0.6, mha_sparsity=0.5, **values)
    )
    train(model, pruning.optimizer, 1)
    fresh.load_state_dict(model.state_dict())
    model_slim(model)
    model_slim(fresh, round_multiplier=8)
    assert fresh.slim_plan.entries == model.slim_plan.entries
    for (name, a), (_, b) in zip(model.state_dict().items(), fresh.state_dict().items()):
        assert torch.equal(a, b), name


def test_one_masked_part_and_zeros_in_the_other():
    model = FAMILIES["mpnet"]()
    values = {"pruning_scope": "local", "end_step": 0, "pruning_type": "magnitude"}
    prepare_pruning(model, parse_auto_slim_config(model, mha_sparsity=0.5, **values))
    name = next(g.name for g in discover(FAMILIES["mpnet"]()) if g.kind == "ffn")
    zeroed(model, name, range(48))
    masked = copy.deepcopy(model)
    model_slim(model)
    assert model.get_submodule(name).in_features == 32
    assert {e.group.kind for e in model.slim_plan} == {"ffn", "mha"}
    x = text_inputs()
    torch.testing.assert_close(outputs_of(model, **x), outputs_of(masked, **x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inside", [False, True])
def test_a_model_that_was_masked_within_another_or_holds_a_masked_one(family, inside):
    model = FAMILIES[family]("ForSequenceClassification")
    pruned, slimmed = (model.base_model, model) if inside else (model, model.base_model)
    values = {"pruning_scope": "local", "end_step": 0, "pruning_type": "magnitude"}
    config = parse_auto_slim_config(
        pruned, ffn2_sparsity=0.65, mha_sparsity=0.5, round_multiplier=1, **values
    )
    prepare_pruning(pruned, config)
    masked, dense = copy.deepcopy(model), FAMILIES[family]("ForSequenceClassification")
    dense.load_state_dict(masked.state_dict())
    assert model_slim(slimmed) is slimmed
    assert not is_masked(model)
    assert {len(e.keep) for e in slimmed.slim_plan if e.group.kind == "ffn"} == {FFN - 52}
    assert_as_exact_as(model, masked, dense)
    assert [g.num_units for g in discover(model) if g.kind == "mha"][:1] == [2]
    text = repr(model)
    model_slim(model)  # what was masked is not looked for any more
    assert repr(model) == text


def test_a_single_head_left_can_only_be_slimmed_where_it_was_masked():
    model = FAMILIES["bert"]("ForSequenceClassification")
    values = {"pruning_scope": "local", "end_step": 0, "pruning_type": "magnitude"}
    prepare_pruning(model, parse_auto_slim_config(model, mha_sparsity=0.9, **values))
    text = repr(model.bert)
    with pytest.raises(ValueError, match="slim the model that was pruned"):
        model_slim(model.bert)
    assert repr(model.bert) == text
    assert parse_auto_slim_config(model, mha_sparsity=0.5)
    model_slim(model)
    assert model.bert.encoder.layer[0].attention.self.num_attention_heads == 1


def test_a_compiled_model_is_pruned_and_slimmed_by_what_is_inside():
    model = FAMILIES["bert"]("ForSequenceClassification")
    compiled = torch.compile(model, backend="eager")
    values = {"pruning_scope": "local", "end_step": 1, "round_multiplier": 1}
    config = parse_auto_slim_config(compiled, ffn2_sparsity=0.65, mha_sparsity=0.5, **values)
    assert config == parse_auto_slim_config(model, ffn2_sparsity=0.65, mha_sparsity=0.5, **values)
    pruning = prepared(compiled, config)
    train(compiled, pruning.optimizer, 1)
    masked, dense = copy.deepcopy(model), FAMILIES["bert"]("ForSequenceClassification")
    dense.load_state_dict(masked.state_dict())
    assert model_slim(compiled, optimizer=pruning.optimizer) is compiled
    assert model.slim_plan["bert.encoder.layer.0.output.dense"].sparsity == 0.65
    assert_as_exact_as(compiled, masked, dense)
    train(compiled, pruning.optimizer, 1)


def test_names_that_are_no_regular_expression():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("a(b", "a(b2"):
                self.add_module(name, Gated(10, 64))
            self.out = nn.Linear(10, 3)

        def forward(self, x):
            return self.out(torch.relu(self._modules["a(b2"](self._modules["a(b"](x))))

    model, batches = Odd(), [torch.randn(4, 10)]
    values = {"pruning_scope": "local", "end_step": 0, "pruning_type": "magnitude"}
    config = parse_auto_slim_config(model, batches, ffn2_sparsity=0.5, **values)
    pruning = prepare_pruning(model, config, dataloader=batches)
    assert sorted(pruning.sparsity().groups) == ["a(b.down", "a(b2.down"]
    config[0]["op_names"].pop()
    pruning = prepare_pruning(Odd(), config, dataloader=batches)
    assert sorted(pruning.sparsity().groups) == ["a(b.down"]
