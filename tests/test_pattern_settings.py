"""Settings of block patterns: which layers, limits, refusals; and what becomes of the model."""

from __future__ import annotations

import copy

import pytest
import torch
from auto_slim_cases import assert_as_exact_as
from pattern_cases import SIZES, Net, batch, one_shot, started, train
from tiny_models import FAMILIES, FFN, HIDDEN, LAYERS, OTHERS, mlp, text_inputs
from torch import nn

import slimkern
from slimkern.config import WeightPruningConfig
from slimkern.masks import is_masked
from slimkern.patterns.masks import block_masked


def pruned(run):
    return [g.name for g in run.report().groups]


def test_every_linear_but_the_head_is_pruned_and_the_head_is_told():
    model = FAMILIES["bert"]("ForSequenceClassification")
    run = one_shot(model)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert pruned(run) == linears[:-1]
    assert linears[-1] == "classifier"
    assert run.notes == (
        "classifier: taken for the model's head and left out; op_names takes it in",
    )
    run = one_shot(FAMILIES["bert"]("ForSequenceClassification"), op_names=["classifier"])
    assert pruned(run) == ["classifier"]
    bare = one_shot(FAMILIES["distilbert"]())  # a LayerNorm comes last: there is no head
    assert bare.notes == ()


@pytest.mark.parametrize(
    ("family", "head"),
    [("roberta", "classifier.out_proj"), ("electra", "classifier.out_proj"),
     ("distilbert", "classifier")],
)  # fmt: skip
def test_heads_of_families(family, head):
    assert head not in pruned(one_shot(FAMILIES[family]("ForSequenceClassification")))


def test_a_last_layer_called_b_excludes_nothing_but_itself():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.bb, self.ab, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    assert pruned(one_shot(Other())) == ["bb", "ab"]


def test_names_and_exclusions_are_exact_names_or_regular_expressions():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("fc1", "fc10", "fc11", "last"):
                setattr(self, name, nn.Linear(8, 8))

    assert pruned(one_shot(Other(), op_names=["fc1"])) == ["fc1"]
    assert pruned(one_shot(Other(), op_names=["fc1.$"])) == ["fc10", "fc11"]
    assert pruned(one_shot(Other(), excluded_op_names=["fc1"])) == ["fc10", "fc11"]
    run = one_shot(Other(), op_names=[".*"], excluded_op_names=["fc1", "none"])
    assert pruned(run) == ["fc10", "fc11", "last"]
    assert run.notes == ("excluded_op_names: 'none' is the name of no module",)


def test_op_types_are_parts_of_class_names_and_a_string_is_one():
    model = FAMILIES["bert"]()
    assert pruned(one_shot(model, pruning_op_types="Linear")) == list(block_masked(model))
    with pytest.raises(ValueError, match=r"no linear layer .*pruning_op_types=\['Conv'\]"):
        one_shot(FAMILIES["bert"](), pruning_op_types="Conv")
    gpt = OTHERS["gpt2"]("LMHeadModel")
    run = one_shot(gpt, pruning_op_types="Conv")
    assert len(pruned(run)) == 4 * LAYERS
    assert gpt.transformer.h[0].mlp.c_fc.mask.shape == (FFN, HIDDEN), "outputs x inputs"
    assert gpt.transformer.h[0].mlp.c_fc.weight.shape == (HIDDEN, FFN)


def test_convolutions_are_left_out_with_a_note_unless_they_are_named():
    model = OTHERS["vit"]("Model")
    run = one_shot(model)
    (note,) = (n for n in run.notes if "projection" in n)
    assert note.startswith("embeddings.patch_embeddings.projection: left out: Conv2d is not supp")
    with pytest.raises(ValueError, match=r"patch_embeddings.projection: Conv2d is not supported"):
        one_shot(OTHERS["vit"]("Model"), op_names=[".*"])


class Strange(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


def tied():
    model = Net()
    model.fc3 = nn.Linear(SIZES[0], SIZES[1])
    model.fc3.weight = model.fc1.weight
    return model


def unit_masked():
    model = nn.Sequential(mlp(8, 64, 8), nn.Linear(8, 8))
    config = {"pattern": "channelx1", "pruning_type": "magnitude", "end_step": 0,
              "round_multiplier": 1}  # fmt: skip
    slimkern.prepare_pruning(model, config, dataloader=[torch.randn(3, 8)])
    return model


@pytest.mark.parametrize(
    ("make", "values", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8)), {"pattern": "2:4"},
         r"  0: its 6 inputs can't be divided into groups of 4, which 2:4 needs"),
        (lambda: nn.Sequential(Strange(8, 8), nn.Linear(8, 8)), {}, "  0: Strange is not supp"),
        (tied, {}, r"  fc1: its weight is tied to 'fc3.weight'"),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
                               nn.Linear(8, 8)), {}, "  0: ParametrizedLinear is not supported"),
        (unit_masked, {}, r"  0\.0: it carries masks of whole units already"),
        (Net, {"op_names": ["nothing"]}, r"no linear layer that op_names=\['nothing'\] selects"),
        (Net, {"excluded_op_names": ["fc"]}, r"(?s)excluded_op_names=\['fc'\] left out.*head: tak"),
        (lambda: nn.Sequential(nn.Embedding(4, 4)), {"pruning_op_types": "Embedding",
                                                     "op_names": [".*"]}, "Embedding is not supp"),
        (lambda: nn.Linear(8, 8), {}, "no linear layer in this Linear"),
        (Net, {"target_sparsity": 0.5, "pruning_type": "snip"}, "prune before the first"),
    ],
)  # fmt: skip
def test_what_can_not_be_pruned_is_refused_by_name_and_reason(make, values, words):
    model = make()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=words):
        one_shot(model, **values)
    assert [type(m) for m in model.modules()] == before


def test_a_fused_model_is_refused():
    model = slimkern.fuse_(FAMILIES["bert"]())
    with pytest.raises(ValueError, match=r"is fused.*unfuse_"):
        one_shot(model)


def test_two_rules_do_not_share_a_layer_even_where_one_is_of_units():
    loader, optimizer = [torch.randn(3, SIZES[0])], None
    for first, second, name in (
        ({"pattern": "4x1"}, {"pattern": "1x1", "op_names": ["fc2"]}, "fc2"),
        ({"pattern": "channelx1", "op_names": ["fc2"]}, {"pattern": "4x1", "op_names": "fc1"},
         "fc1"),
    ):  # fmt: skip
        common = {"pruning_type": "magnitude", "end_step": 0}
        with pytest.raises(ValueError, match=f"rules 0 and 1 both prune '{name}'"):
            slimkern.prepare_pruning(Net(), [{**first, **common}, {**second, **common}],
                                     optimizer, loader)  # fmt: skip


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pattern": "2:4"}, r"2 zeros of every 4: give at most 0\.5"),
        ({"pattern": "1:4", "target_sparsity": 0.3}, r"give at most 0\.25"),
        ({"pattern": "4:2"}, "0 < N < M"),
        ({"pattern": "0x1"}, "at least one output"),
        ({"pattern": "4x1", "pruning_type": "obs"}, "accepted: channelx1, mha"),
        ({"pattern": "4x1", "regrow": True}, "pruning_type='snip_momentum'; accepted: a block"),
        ({"pattern": "mha", "regrow": True, "pruning_type": "gradient"}, "pattern='mha' and"),
        ({"pattern": "4x1", "regrow": 1}, "must be True or False"),
        ({"pruning_type": "snip_momentum_progressive"}, "interpolated between prune steps"),
        ({"pruning_type": "pattern_lock"}, "zeros that a model brings"),
        ({"pruning_type": "block_mask"}, "criterion_reduce_type"),
        ({"pruning_type": "retrain_free"}, "one_shot"),
        ({"pruning_type": "sparse_gpt"}, "one_shot"),
    ],
)
def test_settings_that_can_not_be_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        WeightPruningConfig(**values, end_step=5)


def test_n_of_m_caps_every_layer_and_prefixes_are_stripped():
    (rule,) = WeightPruningConfig(pattern="tile_pattern_2:4", target_sparsity=0.4).rules
    assert rule.pattern == "2:4"
    assert rule.max_sparsity_ratio_per_op == 0.5
    (rule,) = WeightPruningConfig(pattern="2:4", target_sparsity=0.4,
                                  max_sparsity_ratio_per_op=0.45).rules  # fmt: skip
    assert rule.max_sparsity_ratio_per_op == 0.45


def weak_net():
    """Four layers of which one is so weak that the global scope would take it whole."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)), nn.Linear(16, 2))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model:
            layer.weight.uniform_(0.5, 1)
        model[0].weight.mul_(1e-3)
    return model


@pytest.mark.parametrize("pattern", ["1x1", "4x1", "1xchannel", "2:4"])
def test_limits_hold_and_the_target_is_met_all_the_same(pattern):
    model = weak_net()
    low, high, target = (0.15, 0.3, 0.25) if ":" in pattern else (0.4, 0.6, 0.5)
    values = {"target_sparsity": target, "min_sparsity_ratio_per_op": low,
              "max_sparsity_ratio_per_op": high}  # fmt: skip
    run = one_shot(model, pattern, **values)
    rows = run.report().groups
    each = run.sparsity().groups
    step = 1 / min(r.num_units for r in rows)
    assert max(each.values()) == each["0"]
    assert high - step < each["0"] <= high
    assert all(s > low - step for s in each.values())
    assert run.sparsity().blocks == target
    assert run.notes == ("4: taken for the model's head and left out; op_names takes it in",)


def test_a_target_that_the_limits_forbid_is_told():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)), nn.Linear(3, 2))
    run = one_shot(model, "3x1", target_sparsity=0.5, max_sparsity_ratio_per_op=0.5)
    assert run.sparsity().blocks == pytest.approx(1 / 3)  # int(0.5 * 3) of 3 blocks each
    assert "the limits per layer make 4 items go instead of 6" in run.notes[-1]


def test_a_cut_of_less_than_one_block_is_told():
    run = one_shot(Net(), "32x32", pruning_scope="local", target_sparsity=0.2)
    assert any("fc1: 0.2 of its 2 items of pattern 32x32 is less than one" in n for n in run.notes)


@pytest.mark.parametrize("pattern", ["1x1", "4x1", "2:4"])
def test_ties_are_cut_to_exactly_k_in_order(pattern):
    model = Net()
    with torch.no_grad():
        for layer in (model.fc1, model.fc2):
            layer.weight.fill_(0.1)
    run = one_shot(model, pattern, target_sparsity=0.3)
    rows = run.report().groups
    zeros, of = map(int, pattern.split(":")) if ":" in pattern else (1, 1)
    total = int(0.3 * of / zeros * sum(r.num_units // of for r in rows)) * zeros
    assert sum(r.num_units - r.kept for r in rows) == total
    first = model.fc1.mask.blocks().view(-1, of)
    assert not first[: len(first) // 2, :zeros].any(), "the first layers and rows go first"


def test_the_default_config_says_what_it_lacks_and_runs_with_it():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"end_step .* or total_steps"):
        slimkern.prepare_pruning(model, WeightPruningConfig(), optimizer)
    run = slimkern.prepare_pruning(model, WeightPruningConfig(total_steps=13), optimizer)
    train(model, optimizer, 13)
    rows = run.report().groups
    assert {r.kind for r in rows} == {"4x1"}
    total = sum(r.num_units for r in rows)
    assert total - sum(r.kept for r in rows) == int(0.9 * total + 1e-9)


@pytest.mark.parametrize("criterion", ["snip", "snip_momentum"])
def test_a_frequency_longer_than_the_run_prunes_the_target_and_no_more(criterion):
    model = Net()
    run, optimizer = started(model, pruning_type=criterion, end_step=3, pruning_frequency=100)
    assert not is_masked(model)
    train(model, optimizer, 3)
    assert run.sparsity().blocks == 0.5


@pytest.mark.parametrize("decay", ["exp", "cos", "linear", "cube"])
@pytest.mark.parametrize("steps", [2, 3, 7, 9])
def test_every_schedule_ends_at_the_target_exactly(decay, steps):
    model = Net()
    run, optimizer = started(model, end_step=steps, sparsity_decay_type=decay)
    train(model, optimizer, steps)
    assert run.sparsity().blocks == 0.5


def test_gradients_that_never_came_or_are_not_finite_stop_the_run():
    for factor, words in ((None, "no gradient has reached"), (0.0, "all scores are zero"),
                          (float("nan"), "not finite")):  # fmt: skip
        model = Net()
        _, optimizer = started(model, end_step=1)
        if factor is not None:
            (model(batch(0)) * factor).sum().backward()
        with pytest.raises(RuntimeError, match=f"fc1: .*{words}"):
            optimizer.step()
        assert not is_masked(model)
    model = Net()
    model.fc2.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="these weights are frozen: fc2;"):
        started(model)


@pytest.mark.parametrize("pattern", ["4x1", "2:4", "32x32"])
def test_a_slim_model_has_the_zeros_and_is_saved_and_loaded(pattern, tmp_path):
    model = FAMILIES["bert"]("ForSequenceClassification")
    one_shot(model, pattern)
    dead = [~m.mask.dense() for m in block_masked(model).values()]
    share = sum(int(d.sum()) for d in dead) / sum(d.numel() for d in dead)
    with pytest.raises(slimkern.CheckpointError, match="the model is masked"):
        slimkern.save(model, tmp_path / "masked")
    with pytest.raises(slimkern.FuseError, match="masked"):
        slimkern.fuse_(model)
    masked, dense = copy.deepcopy(model), FAMILIES["bert"]("ForSequenceClassification")
    dense.load_state_dict(model.state_dict())
    keys = list(model.state_dict())
    slimkern.model_slim(model)
    assert not is_masked(model)
    assert list(model.state_dict()) == keys
    assert_as_exact_as(model, masked, dense)
    (note,) = model.slim_plan.notes
    assert f"{len(dead)} linears with block masks are plain ones now: {share:.2%}" in note
    slimkern.save(model, tmp_path / "slim")
    loaded = slimkern.load(tmp_path / "slim")
    inputs = text_inputs()
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    assert loaded.slim_plan.notes == (note,)


def test_channels_that_blocks_have_emptied_go_as_dead_ones_do():
    model = FAMILIES["bert"]()
    name = "encoder.layer.0.output.dense"
    with torch.no_grad():
        model.get_submodule(name).weight[:, :10] *= 1e-6
    one_shot(model, "4x1", op_names=[name], target_sparsity=10 / FFN)
    copied = copy.deepcopy(model)
    expected = model(**text_inputs())[0]
    slimkern.model_slim(model, round_multiplier=1)
    assert model.get_submodule(name).in_features == FFN - 10
    torch.testing.assert_close(model(**text_inputs())[0], expected)
    slimkern.model_slim(copied)  # rounding to 32 keeps them
    assert copied.get_submodule(name).in_features == FFN


def test_discovery_and_the_other_calls_take_a_block_masked_model():
    model = FAMILIES["bert"]()
    one_shot(model, op_names=["attention"])
    masks = {n: m.mask.blocks() for n, m in block_masked(model).items()}
    dense = slimkern.discover(FAMILIES["bert"]())
    assert slimkern.discover(model).groups == dense.groups
    configs = slimkern.parse_auto_slim_config(model, ffn2_sparsity=0.5, end_step=0,
                                              pruning_type="magnitude")  # fmt: skip
    run = slimkern.prepare_pruning(model, configs)
    assert run.sparsity().ffn is not None
    assert all(torch.equal(m.mask.blocks(), masks[n]) for n, m in block_masked(model).items())
    heads = {"pattern": "mha", "pruning_type": "magnitude", "end_step": 0}
    with pytest.raises(ValueError, match=r"'mha': '.*dense' carries block masks already"):
        slimkern.prepare_pruning(model, heads)


def test_the_report_prints_blocks_beside_their_pattern():
    model = Net()
    run, optimizer = started(model)
    train(model, optimizer, 4)
    lines = str(run.report()).splitlines()
    assert lines[1].split()[:2] == ["fc1", "4x1"]
    assert lines[1].split()[3] == str(SIZES[0] * SIZES[1] // 4)
    assert lines[3] == "step 4 (last cut at 4): 50.00% of the weights in these groups removed"
