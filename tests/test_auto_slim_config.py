"""What ``parse_auto_slim_config`` writes and ``prepare_pruning`` takes, and what each refuses."""

from __future__ import annotations

import pytest
import torch
from auto_slim_cases import ids, prepared
from tiny_models import FAMILIES, HEAD_DIM, LAYERS, OTHERS, mlp
from torch import nn

from slimkern.auto_slim import model_slim, parse_auto_slim_config, prepare_pruning
from slimkern.config import WeightPruningConfig
from slimkern.discovery import discover
from slimkern.masks import is_masked


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


@pytest.mark.parametrize("wrap", [lambda c: [c], lambda c: c, WeightPruningConfig])
def test_a_config_is_a_list_a_dictionary_or_an_object(wrap):
    pruning = prepared(FAMILIES["bert"](), wrap({"pattern": "mha", "total_steps": 10}))
    assert [g.kind for g in pruning.report().groups] == ["mha"] * LAYERS


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
