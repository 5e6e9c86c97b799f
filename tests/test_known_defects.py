"""Defects that the predecessor of this library is known for, and that it does not have.

One test (or a few) for each; the numbers S1 ... F9 are those of the list they were found in.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import slimkern
from slimkern.config import WeightPruningConfig
from slimkern.plan import dead_units
from tests.tiny_models import (
    FAMILIES,
    FFN,
    HEAD_DIM,
    HEADS,
    LAYERS,
    OTHERS,
    Between,
    mlp,
    randomize,
    text_inputs,
)

ONE_STEP = {"pruning_scope": "local", "end_step": 1, "round_multiplier": 8}


def zero_columns(linear, columns):
    with torch.no_grad():
        linear.weight[:, columns] = 0


def run(model, *args, **kwargs):
    with torch.no_grad():
        outputs = model(*args, **kwargs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def train(model, optimizer, steps=1, batch=None):
    for step in range(steps):
        inputs = text_inputs(seed=step) if batch is None else {}
        outputs = model(batch) if batch is not None else model(**inputs)[0]
        outputs.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def refusal_of(model, x):
    """What ``model_slim`` raises, or None."""
    try:
        slimkern.model_slim(model, [x], round_multiplier=1)
    except ValueError as error:
        return str(error)
    return None


def slimmed_or_refused(model, x):
    """Slim, or be refused; in both cases the outputs stay and the model runs."""
    model, x = model.double(), x.double()
    expected = run(model, x)
    before = {n: p.clone() for n, p in model.named_parameters()}
    refusal = refusal_of(model, x)
    smaller = any(p.shape != before[n].shape for n, p in model.named_parameters())
    assert smaller == (refusal is None), "smaller, or an error: never neither, never both"
    if refusal is not None:
        assert "refused" in refusal
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    torch.testing.assert_close(run(model, x), expected, rtol=1e-12, atol=1e-12)


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2a, self.fc2b = nn.Linear(6, 32), nn.Linear(32, 6), nn.Linear(32, 6)

    def forward(self, x):
        h = torch.relu(self.fc1(x))
        return self.fc2a(h) - torch.tanh(self.fc2b(h))


def test_s1_two_linears_reading_one_with_different_zeros_give_no_wrong_output():
    torch.manual_seed(0)
    model = TwoReaders()
    zero_columns(model.fc2a, [0, 1, 2, 3])
    zero_columns(model.fc2b, [2, 3, 4, 5])
    slimmed_or_refused(model, torch.randn(5, 6))


@pytest.mark.parametrize(
    ("middle", "children"),
    [
        (lambda m, h, x: torch.relu(h) + h, {}),  # S2: a residual into the middle
        (lambda m, h, x: torch.relu(h) + m.skip(x), {"skip": nn.Linear(10, 24)}),
        (lambda m, h, x: torch.relu(h) * m.scale, {"scale": nn.Parameter(torch.rand(24))}),  # S3
        (lambda m, h, x: torch.relu(h) + m.scale, {"scale": nn.Parameter(torch.rand(24))}),
        (lambda m, h, x: h * h, {}),  # S4: a square written as a product
        (lambda m, h, x: torch.relu(h) ** 2, {}),
        (lambda m, h, x: torch.softmax(h, -1), {}),  # a mixing operation
        (lambda m, h, x: m.norm(h), {"norm": nn.LayerNorm(24)}),
        (lambda m, h, x: torch.cat([h[:, 12:], h[:, :12]], -1), {}),
    ],
)
def test_s2_s3_s4_what_stands_between_two_linears_is_cut_with_them_or_refused(middle, children):
    torch.manual_seed(0)
    model = nn.Sequential(Between(middle, **copy.deepcopy(children)), nn.Linear(10, 10))
    zero_columns(model[0].second, [0, 3, 5, 23])
    slimmed_or_refused(model, torch.randn(5, 10))


def test_s5_nothing_passes_through_silently():
    with pytest.raises(ValueError, match="Conv1D"):
        slimkern.model_slim(OTHERS["gpt2"]("LMHeadModel"))


@pytest.mark.parametrize(
    ("family", "extra"),
    [("bert", {}), ("llama", {}), ("llama", {"num_key_value_heads": HEADS // 2})],
)
def test_s6_half_precision_finds_what_single_precision_finds(family, extra):
    build = {**FAMILIES, **OTHERS}[family]
    found = [
        slimkern.discover(build(dtype=dtype, **extra))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("decay", ["exp", "cos", "linear", "cube"])
@pytest.mark.parametrize("steps", [2, 3, 7, 9])
def test_s7_the_target_is_met_to_the_unit(decay, steps):
    model = FAMILIES["bert"]()
    values = {"pruning_scope": "local", "end_step": steps, "sparsity_decay_type": decay}
    configs = slimkern.parse_auto_slim_config(
        model, ffn2_sparsity=0.5, mha_sparsity=0.5, round_multiplier=1, **values
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruning = slimkern.prepare_pruning(model, configs, optimizer)
    train(model, optimizer, steps)
    assert {g.kept for g in pruning.report().groups if g.kind == "ffn"} == {FFN // 2}
    assert {g.kept for g in pruning.report().groups if g.kind == "mha"} == {HEADS // 2}


def test_s8_slimming_is_the_same_every_time_and_leaves_no_dead_channel():
    def slim(seed):
        torch.manual_seed(0)
        model = FAMILIES["bert"]()
        configs = slimkern.parse_auto_slim_config(model, ffn2_sparsity=0.45, **ONE_STEP)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        slimkern.prepare_pruning(model, configs, optimizer)
        train(model, optimizer)
        torch.manual_seed(seed)
        return slimkern.model_slim(model)

    first, second = slim(1), slim(2)
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items()):
        assert torch.equal(a, b), name
    for group in slimkern.discover(first):
        if group.kind == "ffn":
            assert group.num_units == 48  # 80 - 36 = 44, rounded up at selection
            assert not dead_units(first, group).any()


def test_s9_a_handful_of_zero_channels_can_go_and_rounding_that_keeps_them_is_told(caplog):
    model = FAMILIES["bert"]()
    zero_columns(model.get_submodule("encoder.layer.0.output.dense"), [3, 4])
    slimkern.model_slim(copy.deepcopy(model))
    assert "encoder.layer.0.output.dense: rounding 78 live of 80 units" in caplog.text
    slimkern.model_slim(model, round_multiplier=1)
    assert model.get_submodule("encoder.layer.0.output.dense").in_features == 78


def test_s10_a_weak_layer_keeps_a_head_and_a_channel_in_the_global_scope():
    model = FAMILIES["bert"]()
    with torch.no_grad():
        for name, parameter in model.get_submodule("encoder.layer.1").named_parameters():
            if "LayerNorm" not in name:
                parameter.mul_(1e-4)
    configs = slimkern.parse_auto_slim_config(
        model, ffn2_sparsity=0.4, mha_sparsity=0.5, end_step=0, pruning_type="magnitude",
        pruning_scope="global", max_sparsity_ratio_per_op=0.999, round_multiplier=1,
    )  # fmt: skip
    slimkern.prepare_pruning(model, configs)
    slimkern.model_slim(model)
    weak = model.get_submodule("encoder.layer.1")
    assert weak.attention.self.query.out_features == HEAD_DIM
    assert weak.output.dense.in_features == 1
    assert run(model, **text_inputs()).isfinite().all()


def test_s11_training_goes_on_frozen_stays_frozen_and_ties_stay_tied():
    model = FAMILIES["bert"]("ForMaskedLM")
    frozen = model.get_parameter("bert.encoder.layer.1.intermediate.dense.weight")
    frozen.requires_grad_(False)
    configs = slimkern.parse_auto_slim_config(model, ffn2_sparsity=0.5, **ONE_STEP)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    slimkern.prepare_pruning(model, configs, optimizer)
    train(model, optimizer)
    slimkern.model_slim(model, optimizer=optimizer)
    assert not model.get_parameter("bert.encoder.layer.1.intermediate.dense.weight").requires_grad
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer)
    for name in ("intermediate.dense.weight", "output.dense.weight"):
        name = f"bert.encoder.layer.0.{name}"
        assert not torch.equal(model.get_parameter(name), before[name])


def test_s11_an_optimizer_that_was_left_behind_raises():
    model = FAMILIES["bert"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    configs = slimkern.parse_auto_slim_config(model, ffn2_sparsity=0.5, **ONE_STEP)
    slimkern.prepare_pruning(model, configs, optimizer)
    train(model, optimizer)
    slimkern.model_slim(model)
    with pytest.raises(RuntimeError, match="still holds the old ones"):
        train(model, optimizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_s12_attributes_are_right_and_a_saved_model_loads_with_equal_outputs(family, tmp_path):
    model = FAMILIES[family]()
    values = {**ONE_STEP, "end_step": 0, "pruning_type": "magnitude"}
    configs = slimkern.parse_auto_slim_config(model, ffn2_sparsity=0.5, mha_sparsity=0.5, **values)
    slimkern.prepare_pruning(model, configs)
    slimkern.model_slim(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        for name in ("num_attention_heads", "n_heads"):
            assert getattr(module, name, HEADS // 2) == HEADS // 2
    slimkern.save(model, tmp_path / "slim")
    loaded = slimkern.load(tmp_path / "slim").eval()
    assert torch.equal(run(loaded, **text_inputs()), run(model, **text_inputs()))


def test_s13_a_head_that_is_dead_in_the_output_projection_alone_goes():
    model = FAMILIES["bert"]()
    zero_columns(model.get_submodule("encoder.layer.0.attention.output.dense"), range(HEAD_DIM))
    before = run(copy.deepcopy(model).double(), **text_inputs())
    slimkern.model_slim(model)
    attention = model.get_submodule("encoder.layer.0.attention.self")
    assert attention.query.out_features == (HEADS - 1) * HEAD_DIM
    torch.testing.assert_close(run(model.double(), **text_inputs()), before)


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
