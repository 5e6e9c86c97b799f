"""The configuration: completed, checked, shared with nobody."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import pytest

from slimkern.config import PruningRule, WeightPruningConfig

FFN = {"pattern": "channelx1", "end_step": 9}


def test_the_signature_is_the_compatible_one():
    names = list(inspect.signature(WeightPruningConfig).parameters)
    assert names == [
        "pruning_configs", "target_sparsity", "pruning_type", "pattern", "op_names",
        "excluded_op_names", "backend", "start_step", "end_step", "pruning_scope",
        "pruning_frequency", "min_sparsity_ratio_per_op", "max_sparsity_ratio_per_op",
        "sparsity_decay_type", "pruning_op_types", "low_memory_usage", "kwargs",
    ]  # fmt: skip


def test_defaults():
    (rule,) = WeightPruningConfig().rules
    assert dataclasses.asdict(rule) == {
        "target_sparsity": 0.9, "pruning_type": "snip_momentum", "pattern": "4x1",
        "op_names": (), "excluded_op_names": (), "start_step": 0, "end_step": None,
        "pruning_frequency": 1, "pruning_scope": "global", "min_sparsity_ratio_per_op": 0.0,
        "max_sparsity_ratio_per_op": 0.98, "sparsity_decay_type": "exp",
        "criterion_reduce_type": "mean", "pruning_op_types": ("Conv", "Linear"),
        "low_memory_usage": False, "round_multiplier": 32, "total_steps": None,
        "regrow": False,
    }  # fmt: skip


def test_a_rule_is_completed_by_the_common_values_and_wins_over_them():
    config = WeightPruningConfig(
        [{**FFN, "target_sparsity": 0.5}, {"pattern": "mha", "start_step": 3}],
        target_sparsity=0.25,
        end_step=20,
        pruning_scope="local",
        round_multiplier=8,
    )
    ffn, mha = config.rules
    assert (ffn.target_sparsity, ffn.end_step, ffn.start_step) == (0.5, 9, 0)
    assert (mha.target_sparsity, mha.end_step, mha.start_step) == (0.25, 20, 3)
    assert {r.pruning_scope for r in config.rules} == {"local"}
    assert {r.round_multiplier for r in config.rules} == {8}
    assert "channelx1" in repr(config)


def test_dictionaries_are_read_and_never_written_to():
    rules = [dict(FFN), {"pattern": "mha", "op_names": ["a"]}]
    before = copy.deepcopy(rules)
    WeightPruningConfig(rules, target_sparsity=0.5, excluded_op_names=["b"], total_steps=10)
    assert rules == before


def test_total_steps_derives_what_is_not_given_and_leaves_what_is():
    (rule,) = WeightPruningConfig({"pattern": "mha"}, total_steps=1300).rules
    assert (rule.start_step, rule.end_step, rule.pruning_frequency) == (100, 1000, 22)
    (rule,) = WeightPruningConfig({"pattern": "mha", "start_step": 0}, total_steps=1300).rules
    assert (rule.start_step, rule.end_step) == (0, 1000)


def test_one_dictionary_an_empty_list_and_a_prefix():
    (rule,) = WeightPruningConfig({"pattern": "tile_pattern_channelx1", "end_step": 1}).rules
    assert rule.pattern == "channelx1"
    assert WeightPruningConfig([]).rules == ()


def test_a_single_string_is_one_entry_not_its_characters():
    (rule,) = WeightPruningConfig(
        {**FFN, "op_names": "fc2", "excluded_op_names": "pooler"}, pruning_op_types="Linear"
    ).rules
    assert rule.op_names == ("fc2",)
    assert rule.excluded_op_names == ("pooler",)
    assert rule.pruning_op_types == ("Linear",)


@pytest.mark.parametrize("given", [{"patern": "mha"}, {"pruning_configs": [{"patern": "mha"}]}])
def test_an_unknown_key_is_an_error_that_suggests_the_nearest(given):
    with pytest.raises(TypeError, match=r"unknown key 'patern'; did you mean 'pattern'\?"):
        WeightPruningConfig(**given)


def test_a_rule_that_is_no_dictionary_is_an_error():
    with pytest.raises(TypeError, match="must hold dictionaries, got 'mha'"):
        WeightPruningConfig(["mha"])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("target_sparsity", 1.0, r"target_sparsity must be a number in \[0, 1\), got 1.0"),
        ("target_sparsity", -0.1, "got -0.1"),
        ("target_sparsity", "0.5", "got '0.5'"),
        ("target_sparsity", True, "got True"),
        ("target_sparsity", float("nan"), "got nan"),
        ("target_sparsity", 0.99, "can't be reached with max_sparsity_ratio_per_op=0.98"),
        ("max_sparsity_ratio_per_op", 1.0, "got 1.0"),
        ("min_sparsity_ratio_per_op", 0.99, "is above target_sparsity=0.9"),
        ("start_step", -1, "start_step must be a whole number of at least 0, got -1"),
        ("start_step", 1.5, "got 1.5"),
        ("end_step", True, "got True"),
        ("pruning_frequency", 0, "pruning_frequency must be a whole number of at least 1, got 0"),
        ("round_multiplier", 0, "round_multiplier must be"),
        ("total_steps", 0, "total_steps must be"),
        ("pruning_scope", "layer", "pruning_scope='layer' is not accepted; accepted: global, loc"),
        ("sparsity_decay_type", "cubic", "accepted: exp, cos, linear, cube"),
        ("criterion_reduce_type", "median", "accepted: mean, sum, max"),
        ("pruning_type", "snip_momentum_progressive", "'snip_momentum_progressive' is not acc"),
        ("pruning_type", "pattern_lock", "accepted: magnitude, gradient, snip, snip_momentum"),
        ("pruning_type", "block_mask", "'block_mask' is not accepted"),
        ("pruning_type", "retrain_free", "'retrain_free' is not accepted"),
        ("pruning_type", "sparse_gpt", "'sparse_gpt' is not accepted"),
        ("pattern", "chanelx1", "'chanelx1' is no pattern; accepted: channelx1, mha"),
        ("op_names", ["("], r"holds '\(', no regular expression"),
        ("op_names", [3], "must hold strings, got 3"),
        ("pruning_op_types", [], "is empty"),
        ("criterion_type", "magnitude", "differs from pruning_type='snip_momentum'"),
        ("reg_type", "group_lasso", "reg_type='group_lasso' is not supported"),
        ("reg_coeff", 0.1, "reg_coeff=0.1 is not supported"),
        ("parameters", {"reg_coeff": 0.1}, "is not supported"),
        ("resume_from_pruned_checkpoint", True, "load_state_dict"),
        ("low_memory_usage", 1, "must be True or False, got 1"),
        ("backend", "itex", "is not supported"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(key, value, words):
    with pytest.raises(ValueError, match=words):
        WeightPruningConfig([{**FFN, key: value}])


def test_keys_that_are_switched_off_and_a_matching_criterion_are_accepted():
    WeightPruningConfig(
        FFN, criterion_type="snip_momentum", reg_type=None, reg_coeff=0.0,
        parameters={"reg_coeff": 0.0}, resume_from_pruned_checkpoint=False, low_memory_usage=True,
    )  # fmt: skip


def test_a_rule_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PruningRule().pattern = "mha"
