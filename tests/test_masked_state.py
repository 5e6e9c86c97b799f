"""Weights loaded into a masked model: it computes, saves and slims as the masked model at once."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from masked_cases import FAMILIES, plan_for
from pruning_cases import make, rule, start, train

import slimkern
from slimkern.nn import BlockMasked, MaskedLinear
from slimkern.surgery import mask_, slim_

EPS = torch.finfo(torch.float64).eps


def outputs(model):
    with torch.no_grad():
        return model(**tiny_models.text_inputs())[0]


def other_weights(model, seed=7):
    """The state of a dense model of the same sizes: no column of it is zero."""
    return tiny_models.randomize(copy.deepcopy(model), seed).state_dict()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_state_loaded_into_a_masked_model(family, assign):
    dense = tiny_models.FAMILIES[family]().double()
    plan, state = plan_for(dense), other_weights(dense)
    masked = mask_(copy.deepcopy(dense), plan)
    untouched = {name: tensor.clone() for name, tensor in state.items()}
    masked.load_state_dict(state, assign=assign)
    want = outputs(masked)
    dense.load_state_dict(masked.state_dict())  # what is saved, computed densely
    slim = slim_(copy.deepcopy(masked), plan)
    # Both leave terms out, or add zeros, in sums of up to a hundred terms: each differs by the
    # rounding of reassociated sums, a small multiple of eps times the size of the outputs.
    for other in (dense, slim):
        assert (outputs(other) - want).abs().max() <= 1e4 * EPS * want.abs().max()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in state.items())
    loaded = mask_(copy.deepcopy(dense), plan).state_dict()  # a weight is saved itself where it can
    assert {n for n, p in masked.named_parameters() if not torch.equal(p, loaded[n])} == {
        f"{member.name}.weight" for entry in plan for member in entry.group.consumers
    }


def test_what_is_saved_is_the_weight_itself_where_nothing_was_loaded():
    masked = tiny_models.FAMILIES["bert"]()
    mask_(masked, plan_for(masked))
    state = masked.state_dict()
    places = {name: p.data_ptr() for name, p in masked.named_parameters()}
    assert all(state[name].data_ptr() == place for name, place in places.items())
    variables = masked.state_dict(keep_vars=True)
    assert all(variables[name] is p for name, p in masked.named_parameters())


def test_a_nan_in_a_masked_column_is_not_saved():
    masked = tiny_models.FAMILIES["bert"]()
    mask_(masked, plan_for(masked))
    name, linear = next(
        (n, m)
        for n, m in masked.named_modules()
        if isinstance(m, MaskedLinear) and m.cols is not None
    )
    dead = sorted(set(range(linear.in_features)) - set(linear.cols.tolist()))
    linear.weight.data[3, dead[0]] = float("nan")
    saved = masked.state_dict()[f"{name}.weight"]
    assert not saved[:, dead].any()
    assert torch.equal(saved[:, linear.cols], linear.weight[:, linear.cols])


def test_an_earlier_state_can_be_gone_back_to():
    """Weights first, then the masks: what is masked now and was not then comes back."""
    rules = [rule(p, pruning_type="magnitude", end_step=9) for p in ("channelx1", "mha")]
    model = make()
    pruning, optimizer = start(model, *rules)
    train(model, optimizer, 4)
    weights, masks = copy.deepcopy(model.state_dict()), pruning.state_dict()
    x = torch.randn(4, 5, model[0].fc1.in_features)
    want = model(x)
    train(model, optimizer, 8, first=4)
    assert sum(len(k) for k in pruning.state_dict()["keep"].values()) < sum(
        len(k) for k in masks["keep"].values()
    )
    model.load_state_dict(weights)
    pruning.load_state_dict(masks)
    assert torch.equal(model(x), want)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_block_masks():
    model = tiny_models.mlp(10, 24, 16)
    dense = copy.deepcopy(model)
    config = {"pattern": "4x1", "target_sparsity": 0.5, "end_step": 0, "pruning_type": "magnitude"}
    slimkern.prepare_pruning(model, [{**config, "op_names": [".*"], "pruning_scope": "local"}])
    assert any(isinstance(m, BlockMasked) for m in model.modules())
    saved = model.state_dict()
    assert all(saved[n].data_ptr() == p.data_ptr() for n, p in model.named_parameters())
    model.load_state_dict(other_weights(dense))
    x = torch.randn(6, 10)
    with torch.no_grad():
        want = model(x)
        for name, module in model.named_modules():
            if isinstance(module, BlockMasked):
                kept = model.state_dict()[f"{name}.weight"]
                assert torch.equal(kept, module.weight * module.mask.dense())
                assert not torch.equal(kept, module.weight)
        dense.load_state_dict(model.state_dict())
        again = copy.deepcopy(model)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), want)
        exact = copy.deepcopy(dense).double()(x.double())
        error = (dense(x).double() - exact).abs().max()
        sums = (10 + 24) ** 0.5 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (want.double() - exact).abs().max() <= error + sums
