"""Defects that the predecessor of this library is known for, and that it does not have: settings.

What is asked for is what is done, or an error; the numbers S14 ... F9 are those of the list they
were found in.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from known_defects_cases import ONE_STEP, run, train
from tiny_models import FAMILIES, FFN, LAYERS, mlp, randomize, text_inputs
from torch import nn

import slimkern
from slimkern.config import WeightPruningConfig


def test_s14_names_exclusions_and_limits_hold_for_heads_too():
    model = FAMILIES["bert"]()
    config = {
        "pattern": "mha", "end_step": 0, "pruning_type": "magnitude", "target_sparsity": 0.5,
        "op_names": [r"layer\.[12]\."], "excluded_op_names": ["layer.2.attention"],
        "max_sparsity_ratio_per_op": 0.5,
    }  # fmt: skip
    pruning = slimkern.prepare_pruning(model, config)
    assert [g.name for g in pruning.report().groups] == ["encoder.layer.1.attention.output.dense"]
    weak = FAMILIES["bert"]()
    with torch.no_grad():
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            weak.get_parameter(f"encoder.layer.1.attention.{part}.weight").mul_(1e-3)
    config = {**config, "op_names": None, "excluded_op_names": None, "target_sparsity": 0.4}
    pruning = slimkern.prepare_pruning(weak, config)
    assert max(pruning.sparsity().groups.values()) == 0.5


def test_s15_the_dataloader_of_the_user_is_used_for_heads():
    model = nn.Sequential(randomize(SelfAttention()), nn.Linear(12, 12))
    loader = [torch.randn(2, 5, 12)]
    configs = slimkern.parse_auto_slim_config(model, loader, mha_sparsity=0.5, **ONE_STEP)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruning = slimkern.prepare_pruning(model, configs, optimizer, dataloader=loader)
    train(model, optimizer, batch=loader[0])
    assert pruning.sparsity().mha == 0.5
    slimkern.model_slim(model, loader)
    assert model[0].o.in_features == 6


class SelfAttention(nn.Module):
    """Four heads of three, in a module that no library knows."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 3)).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 3**0.5, -1)
        return x + self.o((weights @ v).transpose(1, 2).flatten(2))


def test_s16_what_the_config_names_is_what_is_pruned():
    model = FAMILIES["electra"]("ForSequenceClassification")
    configs = slimkern.parse_auto_slim_config(
        model, ffn2_sparsity=0.5, mha_sparsity=0.5, **ONE_STEP
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruning = slimkern.prepare_pruning(model, configs, optimizer)
    named = [name for config in configs for name in config["op_names"]]
    assert [g.name for g in pruning.report().groups] == named
    assert "classifier.out_proj" not in named


def test_s17_a_linear_of_another_make_is_refused_with_its_name_not_skipped():
    class Strange(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), Strange(32, 6), nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"refused 2: .*Strange"):
        slimkern.parse_auto_slim_config(model, [torch.randn(3, 6)], ffn2_sparsity=0.5)


def test_s18_a_sparsity_given_by_position_is_told_to_be_a_keyword():
    with pytest.raises(TypeError, match="sparsities are keywords"):
        slimkern.parse_auto_slim_config(FAMILIES["bert"](), 0.5, 0.8)


@pytest.mark.parametrize("sparsity", [1.0, -0.2, 80])
def test_s19_a_sparsity_out_of_range_is_an_error(sparsity):
    for name in ("ffn2_sparsity", "mha_sparsity"):
        with pytest.raises(ValueError, match=rf"{name} must be a number in \[0, 1\)"):
            slimkern.parse_auto_slim_config(FAMILIES["bert"](), **{name: sparsity})


def test_f1_no_default_is_shared_between_configs():
    first = WeightPruningConfig(target_sparsity=0.5, pattern="channelx1", excluded_op_names=["a"])
    second = WeightPruningConfig(target_sparsity=0.8, pattern="mha", end_step=9)
    (rule,) = second.rules
    assert (rule.target_sparsity, rule.pattern, rule.end_step) == (0.8, "mha", 9)
    assert rule.excluded_op_names == ()
    assert first.rules[0].excluded_op_names == ("a",)
    for parameter in inspect.signature(WeightPruningConfig).parameters.values():
        assert not isinstance(parameter.default, (list, dict, set))


def test_f2_a_last_layer_called_b_excludes_nothing_but_itself():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = mlp(6, 32, 6)
            self.b = nn.Linear(6, 2)

        def forward(self, x):
            return self.b(x + self.block(x))

    (config,) = slimkern.parse_auto_slim_config(Net(), [torch.randn(3, 6)], ffn2_sparsity=0.5)
    assert config["op_names"] == ["block.2"]


@pytest.mark.parametrize("criterion", ["snip", "snip_momentum"])
def test_f3_a_frequency_longer_than_the_run_prunes_the_target_and_no_more(criterion):
    model = FAMILIES["bert"]()
    configs = slimkern.parse_auto_slim_config(
        model, ffn2_sparsity=0.5, start_step=0, end_step=3, pruning_frequency=100,
        pruning_type=criterion, round_multiplier=1,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruning = slimkern.prepare_pruning(model, configs, optimizer)
    assert pruning.sparsity().ffn == 0, "nothing goes before a gradient was seen"
    train(model, optimizer, 3)
    assert pruning.sparsity().ffn == 0.5


def test_ties_are_cut_to_exactly_k():
    model = FAMILIES["bert"]()
    with torch.no_grad():
        for layer in range(LAYERS):
            model.get_parameter(f"encoder.layer.{layer}.output.dense.weight").fill_(0.1)
    config = {
        "pattern": "channelx1", "end_step": 0, "pruning_type": "magnitude",
        "target_sparsity": 0.3, "pruning_scope": "local", "round_multiplier": 1,
    }  # fmt: skip
    pruning = slimkern.prepare_pruning(model, config)
    assert {g.kept for g in pruning.report().groups} == {FFN - 24}


def test_f4_a_default_schedule_is_an_error_that_says_what_is_missing():
    model = FAMILIES["bert"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=r"end_step .* or total_steps"):
        slimkern.prepare_pruning(model, WeightPruningConfig(pattern="mha"), optimizer)
    config = WeightPruningConfig(pattern="mha", start_step=0, end_step=0)
    with pytest.raises(ValueError, match="pruning_type='magnitude'"):
        slimkern.prepare_pruning(model, config, optimizer)


@pytest.mark.parametrize("kind", ["sparse_gpt", "retrain_free", "snip_progressive", "sniper"])
def test_f5_a_pruning_type_is_accepted_by_its_whole_name_alone(kind):
    with pytest.raises(ValueError, match=f"pruning_type='{kind}' is not accepted; accepted: magn"):
        WeightPruningConfig(pattern="mha", pruning_type=kind)


def test_f6_a_model_in_training_is_copied_and_pickled():
    model = FAMILIES["bert"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    configs = slimkern.parse_auto_slim_config(model, ffn2_sparsity=0.5, **ONE_STEP)
    slimkern.prepare_pruning(model, configs, optimizer)
    for _ in range(2):  # before and after the first cut
        expected = run(model, **text_inputs())
        assert torch.equal(run(copy.deepcopy(model), **text_inputs()), expected)
        assert torch.equal(run(pickle.loads(pickle.dumps(model)), **text_inputs()), expected)
        torch.save(model, io.BytesIO())
        train(model, optimizer)


def test_f8_a_run_is_resumed_where_it_stopped():
    def prepared(model):
        configs = slimkern.parse_auto_slim_config(
            model, ffn2_sparsity=0.5, mha_sparsity=0.5, **{**ONE_STEP, "end_step": 6}
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        return slimkern.prepare_pruning(model, configs, optimizer), optimizer

    whole = FAMILIES["bert"]()
    expected, optimizer = prepared(whole)
    train(whole, optimizer, 3)
    state = expected.state_dict(), whole.state_dict(), optimizer.state_dict()
    resumed = FAMILIES["bert"]()
    resumed.load_state_dict(copy.deepcopy(state[1]))
    pruning, other = prepared(resumed)
    other.load_state_dict(copy.deepcopy(state[2]))
    pruning.load_state_dict(copy.deepcopy(state[0]))
    train(whole, optimizer, 3)
    train(resumed, other, 3)
    assert pruning.plan() == expected.plan()
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items()):
        assert torch.equal(a, b), name


def test_f9_sparsity_is_a_value_and_counts_heads():
    model = FAMILIES["bert"]()
    values = {"end_step": 0, "pruning_type": "magnitude", "pruning_scope": "local"}
    configs = slimkern.parse_auto_slim_config(
        model, ffn2_sparsity=0.5, mha_sparsity=0.25, round_multiplier=1, **values
    )
    sparsity = slimkern.prepare_pruning(model, configs).sparsity()
    assert (sparsity.ffn, sparsity.mha) == (0.5, 0.25)
    assert len(sparsity.groups) == 2 * LAYERS
    assert 0.25 < sparsity.total < 0.5
