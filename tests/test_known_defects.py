"""Defects that the predecessor of this library is known for, and that it does not have: cuts.

One test (or a few) for each; the numbers S1 ... S13 are those of the list they were found in.
"""

from __future__ import annotations

import copy

import pytest
import torch
from known_defects_cases import ONE_STEP, run, train, zero_columns
from tiny_models import FAMILIES, FFN, HEAD_DIM, HEADS, OTHERS, Between, text_inputs
from torch import nn

import slimkern
from slimkern.plan import dead_units


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
