"""The three calls, end to end, on tiny models of every family; what each refuses, and how."""

from __future__ import annotations

import copy
import inspect
import logging
import math

import pytest
import torch
from torch import nn

from slimkern.auto_slim import model_slim, parse_auto_slim_config, prepare_pruning
from slimkern.config import WeightPruningConfig
from slimkern.criteria import importance
from slimkern.discovery import discover
from slimkern.masks import is_masked
from slimkern.plan import PlanEntry, SlimPlan, make_plan
from slimkern.surgery import mask_
from tests.tiny_models import (
    FAMILIES,
    FFN,
    HEAD_DIM,
    HEADS,
    LAYERS,
    OTHERS,
    Gated,
    mlp,
    text_inputs,
)

SCHEDULE = {"pruning_scope": "local", "end_step": 2, "round_multiplier": 8}


def ids(seed=0):
    return text_inputs(2, 6, seed)


def train(model, optimizer, steps=2, first=0):
    model.train()
    for step in range(first, first + steps):
        outputs = model(**ids(step))
        sum(o.float().square().mean() for o in outputs.to_tuple()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def outputs_of(model, **inputs):
    with torch.no_grad():
        return torch.cat([o.double().flatten() for o in model(**inputs).to_tuple()])


def assert_as_exact_as(model, masked, dense):
    """``model`` is as near to the masked weights in fp64 as the dense computation of them is."""
    inputs = text_inputs()
    exact = outputs_of(copy.deepcopy(dense).double(), **inputs)
    dtype = next(dense.parameters()).dtype
    # Another order of summation: as good as independent roundings of the sums in each layer.
    sums = torch.finfo(dtype).eps * math.sqrt(LAYERS * FFN) * exact.abs().max()
    allowed = (outputs_of(dense, **inputs) - exact).abs().max() + sums
    for candidate in (model, masked):
        assert (outputs_of(candidate, **inputs) - exact).abs().max() <= allowed


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
        ("framework", "pytorch"), ("device", None),
    ]  # fmt: skip
    assert shape(model_slim)[:2] == [("dataloader", None), ("round_multiplier", 32)]


# --- parse_auto_slim_config ---------------------------------------------------------------------


def test_the_rules_that_are_written():
    model = FAMILIES["bert"]("ForSequenceClassification")
    configs = parse_auto_slim_config(
        model, ffn2_sparsity=0.8, mha_sparsity=0.6, pruning_scope="local", total_steps=100
    )
    layers = [f"bert.encoder.layer.{i}." for i in range(LAYERS)]
    common = {"pruning_scope": "local", "total_steps": 100}
    assert configs == [
        {
            "op_names": [f"{n}output.dense" for n in layers],
            "pattern": "channelx1", "target_sparsity": 0.8, **common,
        },
        {
            "op_names": [f"{n}attention.output.dense" for n in layers],
            "pattern": "mha", "target_sparsity": 0.6, **common,
        },
    ]  # fmt: skip
    only = parse_auto_slim_config(model, mha_sparsity=0.6)
    assert [c["pattern"] for c in only] == ["mha"]
    assert parse_auto_slim_config(model) == []


def test_the_head_of_a_model_is_left_out_unless_it_is_named():
    model = FAMILIES["electra"]("ForSequenceClassification")
    assert discover(model)["classifier.out_proj"].is_head
    (config,) = parse_auto_slim_config(model, ffn2_sparsity=0.5)
    assert "classifier.out_proj" not in config["op_names"]
    assert len(config["op_names"]) == LAYERS
    (config,) = parse_auto_slim_config(model, ffn2_sparsity=0.5, op_names=["classifier"])
    assert config["op_names"] == ["classifier.out_proj"]


def test_op_names_and_exclusions_narrow_ffns_and_heads_down():
    model = FAMILIES["bert"]()
    configs = parse_auto_slim_config(
        model, ffn2_sparsity=0.5, mha_sparsity=0.5, op_names=r"layer\.[01]\.",
        excluded_op_names=["layer.0.attention"],
    )  # fmt: skip
    ffn, mha = (c["op_names"] for c in configs)
    assert ffn == ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]
    assert mha == ["encoder.layer.1.attention.output.dense"]


def test_a_plain_module_needs_and_takes_a_dataloader():
    model = mlp(6, 32, 6)
    with pytest.raises(ValueError, match="example_inputs: needed for Sequential"):
        parse_auto_slim_config(model, ffn2_sparsity=0.5)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(8, 6), torch.randn(8)), batch_size=4
    )
    (config,) = parse_auto_slim_config(model, loader, ffn2_sparsity=0.5, op_names=["2"])
    assert config["op_names"] == ["2"]
    with pytest.raises(ValueError, match="dataloader holds no batch"):
        parse_auto_slim_config(model, [], ffn2_sparsity=0.5)
    with pytest.raises(TypeError, match=r"got 0\.5; sparsities are keywords"):
        parse_auto_slim_config(model, 0.5, 0.5)


def test_columns_of_a_dataset_that_are_no_arguments_are_left_out():
    model = FAMILIES["bert"]("ForSequenceClassification")
    batch = {**ids(), "labels": torch.tensor([0, 1]), "idx": torch.arange(2), "text": ["a", "b"]}
    assert parse_auto_slim_config(model, [batch], ffn2_sparsity=0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"ffn2_sparsity": 1.0}, ValueError, r"ffn2_sparsity must be a number in \[0, 1\), got 1"),
        ({"ffn2_sparsity": -0.5}, ValueError, "got -0.5"),
        ({"mha_sparsity": 1.5}, ValueError, "mha_sparsity must be a number"),
        ({"mha_sparsity": float("nan")}, ValueError, "got nan"),
        ({"mha_sparsity": "0.5"}, ValueError, r"mha_sparsity must be a number .* got '0\.5'"),
        ({"ffn_sparsity": 0.5}, TypeError, "unknown key 'ffn_sparsity'"),
        (
            {"ffn2_sparsity": 0.5, "prunning_scope": "local"},
            TypeError,
            r"unknown key 'prunning_scope'; did you mean 'pruning_scope'\?",
        ),
        ({"ffn2_sparsity": 0.5, "pattern": "4x1"}, TypeError, "pattern= is decided here"),
        ({"target_sparsity": 0.5}, TypeError, "ask for FFN channels with ffn2_sparsity"),
        ({"ffn2_sparsity": 0.5, "pruning_scope": "layer"}, ValueError, "accepted: global, local"),
        (
            {"ffn2_sparsity": 0.5, "op_names": ["nothing"]},
            ValueError,
            r"'channelx1': no FFN .* that op_names=\['nothing'\] selects",
        ),
    ],
)
def test_what_is_asked_wrongly_is_an_error(arguments, error, words):
    with pytest.raises(error, match=words):
        parse_auto_slim_config(FAMILIES["bert"](), **arguments)


def test_a_part_that_is_not_there_is_an_error_with_the_reasons():
    model = OTHERS["gpt2"]("LMHeadModel")
    with pytest.raises(ValueError, match=r"(?s)no self-attention in this GPT2LMHeadModel.*Conv1D"):
        parse_auto_slim_config(model, mha_sparsity=0.5)


# --- prepare_pruning ----------------------------------------------------------------------------


def prepared(model, config, **arguments):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return prepare_pruning(model, config, optimizer, **arguments)


@pytest.mark.parametrize("wrap", [lambda c: [c], lambda c: c, WeightPruningConfig])
def test_a_config_is_a_list_a_dictionary_or_an_object(wrap):
    pruning = prepared(FAMILIES["bert"](), wrap({"pattern": "mha", "total_steps": 10}))
    assert [g.kind for g in pruning.report().groups] == ["mha"] * LAYERS


@pytest.mark.parametrize("pattern", ["4x1", "1x1", "2:4", "channelx2", "1xchannel"])
def test_a_pattern_of_no_whole_units_is_refused_by_name(pattern):
    with pytest.raises(NotImplementedError, match=f"pattern='{pattern}' is not supported yet"):
        prepared(FAMILIES["bert"](), WeightPruningConfig(pattern=pattern, end_step=5))


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        ({"pattern": "mha"}, {}, "give end_step .* or total_steps"),
        ([], {}, "config holds no rule"),
        ({"pattern": "mha", "end_step": 1}, {"framework": "keras"}, "accepted: 'pytorch'"),
        ({"pattern": "mha", "end_step": 1}, {"device": "meta"}, r"the model is on \['cpu'\]"),
        (
            {"pattern": "mha", "end_step": 1, "op_names": ["attention.dense"]},
            {},
            r"'mha': no self-attention that op_names=\['attention.dense'\] selects",
        ),
        (
            {"pattern": "mha", "end_step": 1, "excluded_op_names": ["query"]},
            {},
            r"excluded_op_names=\['query'\] left out",
        ),
        (
            [{"pattern": "mha", "end_step": 1, "op_names": n} for n in ("layer.0", "query")],
            {},
            r"rules 0 and 1 both prune 'encoder.layer.0.attention.output.dense'",
        ),
        ({"pattern": "mha", "end_step": 1, "pruning_op_types": "Conv"}, {}, "no self-attention"),
    ],
)
def test_what_can_not_be_prepared_is_refused_and_changes_nothing(config, arguments, words):
    model = FAMILIES["bert"]()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=words):
        prepare_pruning(model, config, optimizer, **arguments)
    assert not is_masked(model)
    assert not optimizer._optimizer_step_pre_hooks
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_without_an_optimizer_it_says_what_is_needed():
    with pytest.raises(ValueError, match="optimizer= is needed"):
        prepare_pruning(FAMILIES["bert"](), {"pattern": "mha", "end_step": 3})


def test_one_shot_magnitude_without_an_optimizer():
    model = FAMILIES["bert"]()
    config = {
        "pattern": "mha", "end_step": 0, "pruning_type": "magnitude", "target_sparsity": 0.5,
        "pruning_scope": "local",
    }  # fmt: skip
    assert prepare_pruning(model, config).sparsity().mha == 0.5
    model_slim(model)
    assert model.get_submodule("encoder.layer.0.attention.self.query").out_features == 2 * HEAD_DIM


def test_an_exact_name_means_that_module_and_anything_else_is_a_regular_expression():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for i in (1, 10):
                setattr(self, f"a{i}", nn.Linear(6, 16))
                setattr(self, f"fc{i}", nn.Linear(16, 6))
            self.last = nn.Linear(6, 6)

        def forward(self, x):
            x = x + self.fc1(torch.relu(self.a1(x)))
            return self.last(x + self.fc10(torch.relu(self.a10(x))))

    def chosen(entry):
        config = {"pattern": "channelx1", "end_step": 1, "op_names": [entry]}
        pruning = prepared(Net(), config, dataloader=[torch.randn(4, 6)])
        return [g.name for g in pruning.report().groups]

    assert chosen("fc1") == ["fc1"]
    assert chosen("fc") == ["fc1", "fc10"]
    assert chosen("0$") == ["fc10"]


def test_the_name_of_a_module_means_what_is_in_it():
    model = FAMILIES["bert"](num_hidden_layers=12)
    (config,) = parse_auto_slim_config(model, ffn2_sparsity=0.5, op_names=["encoder.layer.1"])
    assert config["op_names"] == ["encoder.layer.1.output.dense"]


def test_an_exclusion_that_names_nothing_is_reported():
    pruning = prepared(
        FAMILIES["bert"](), {"pattern": "mha", "end_step": 1, "excluded_op_names": ["decoder"]}
    )
    assert pruning.notes == ("excluded_op_names: 'decoder' is the name of no module",)


# --- model_slim ---------------------------------------------------------------------------------


def zeroed(model, name, units, size=1):
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        for unit in units:
            weight[:, unit * size : (unit + 1) * size] = 0
    return model


@pytest.mark.parametrize("seed", [0, 1])
def test_zeros_that_are_already_there_go_and_dead_channels_of_lowest_index_stay(seed):
    torch.manual_seed(seed)  # and no random number plays a part
    model = FAMILIES["bert"]()
    dead = [1, 5, *range(20, 72)]  # 80 - 54 = 26 live, 32 stay
    zeroed(model, "encoder.layer.1.output.dense", dead)
    zeroed(model, "encoder.layer.2.attention.output.dense", [0, 2], HEAD_DIM)
    before = copy.deepcopy(model)
    model_slim(model)
    assert {e.group.name: e.keep for e in model.slim_plan} == {
        "encoder.layer.1.output.dense": tuple(
            sorted({*range(80)} - {*dead} | {1, 5, 20, 21, 22, 23})
        ),
        "encoder.layer.2.attention.output.dense": (1, 3),
    }
    assert_as_exact_as(model, before, before)
    assert not [m for m in model.modules() if type(m) not in {type(b) for b in before.modules()}]


def test_the_rounding_is_an_argument_for_zeros_that_others_made():
    model = zeroed(FAMILIES["bert"](), "encoder.layer.0.output.dense", range(50))
    model_slim(model, round_multiplier=1)
    assert model.get_submodule("encoder.layer.0.output.dense").in_features == 30
    with pytest.raises(ValueError, match="round_multiplier must be at least 1, got 0"):
        model_slim(model, round_multiplier=0)


def test_a_layer_that_is_all_zero_keeps_one_dead_unit():
    model = zeroed(FAMILIES["bert"](), "encoder.layer.0.attention.output.dense", range(4), HEAD_DIM)
    zeroed(model, "encoder.layer.0.output.dense", range(FFN))
    before = copy.deepcopy(model)
    model_slim(model, round_multiplier=1)
    assert model.get_submodule("encoder.layer.0.output.dense").in_features == 1
    assert model.get_submodule("encoder.layer.0.attention.self.key").out_features == HEAD_DIM
    assert_as_exact_as(model, before, before)


def test_a_second_call_does_no_harm_and_says_so(caplog):
    model = zeroed(FAMILIES["bert"](), "encoder.layer.0.output.dense", range(48))
    with caplog.at_level(logging.INFO, "slimkern"):
        before = sum(p.numel() for p in model.parameters())
        model_slim(model)
        after = sum(p.numel() for p in model.parameters())
        assert f"1 groups cut, {before} -> {after} parameters" in caplog.text
        caplog.clear()
        weights = {n: id(p) for n, p in model.named_parameters()}
        assert model_slim(model) is model
        assert "has a masked or zero unit; the model is unchanged" in caplog.text
    assert {n: id(p) for n, p in model.named_parameters()} == weights


def test_zeros_that_rounding_keeps_are_told(caplog):
    model = zeroed(FAMILIES["bert"](), "encoder.layer.0.output.dense", range(10))
    with caplog.at_level(logging.WARNING, "slimkern"):
        model_slim(model, round_multiplier=64)
    assert "encoder.layer.0.output.dense: rounding 70 live of 80 units" in caplog.text
    assert model.get_submodule("encoder.layer.0.output.dense").in_features == FFN


def test_a_gpt2_raises_and_names_conv1d():
    model = OTHERS["gpt2"]("LMHeadModel")
    with pytest.raises(ValueError, match="GPT2LMHeadModel: its layers are Conv1D"):
        model_slim(model)


def test_a_model_in_which_nothing_is_found_raises_with_the_reasons():
    with pytest.raises(ValueError, match="nothing can be removed from this Linear"):
        model_slim(nn.Linear(4, 4), [torch.randn(2, 4)])


def test_a_gated_unit_loses_its_channels_in_both_branches():
    model = nn.Sequential(Gated(10, 64), nn.Linear(10, 10)).eval()
    zeroed(model, "0.down", range(0, 64, 2))
    x = torch.randn(7, 10)
    before = model.double()(x.double())
    model_slim(model, [x])
    assert [model[0].gate.out_features, model[0].up.out_features] == [32, 32]
    torch.testing.assert_close(model(x.double()), before)


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


def test_zeros_where_a_removal_would_not_be_exact_raise_when_there_is_nothing_else():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc0, self.fc1, self.fc2 = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 6)
            self.other1, self.other2 = nn.Linear(6, 32), nn.Linear(32, 6)

        def forward(self, x):
            h = torch.tanh(self.fc0(x)).flip(-1)
            return self.fc2(torch.relu(self.fc1(h)) + h) + self.other2(torch.relu(self.other1(x)))

    model = zeroed(Residual(), "fc2", range(5))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="can't be removed exactly\n  refused fc2"):
        model_slim(model, [torch.randn(3, 6)])
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


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


def test_a_refused_parameter_of_the_model_itself_is_no_module():
    class Rooted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(10))
            self.body = Gated(10, 64)

        def forward(self, x):
            return self.body(x @ self.weight)

    model = zeroed(Rooted(), "body.down", range(32))
    model_slim(model, [torch.randn(4, 10)])
    assert model.body.gate.out_features == 32


def test_an_optimizer_of_another_model_is_refused_before_anything_changes():
    model = zeroed(FAMILIES["bert"](), "encoder.layer.0.output.dense", range(48))
    text = repr(model)
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        model_slim(model, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0))
    assert repr(model) == text


def test_a_plan_made_of_a_masked_or_partly_dead_model_takes_what_is_dead_first():
    model = FAMILIES["bert"]()
    found = discover(model)
    groups = [g for g in found if g.kind == "mha"]
    with torch.no_grad():  # large weights of a head that nothing reads
        for group in groups:
            for member in group.producers:
                model.get_submodule(member.name).weight[:HEAD_DIM] *= 100
    zeroed(model, groups[0].name, [0], HEAD_DIM)
    mask_(model, SlimPlan(tuple(PlanEntry(g, (1, 2, 3)) for g in groups[1:])))
    scores = importance(model, groups)
    assert all(s[0] == 0 and (s[1:] > 0).all() for s in scores.values())
    plan = make_plan(groups, scores, mha_sparsity=0.25)
    assert all(e.keep == (1, 2, 3) for e in plan)
