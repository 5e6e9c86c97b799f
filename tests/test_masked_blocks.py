"""Masked blocks: masked = dense with zeros, forward and backward; the same model otherwise."""

from __future__ import annotations

import copy
import io

import pytest
import tiny_models
import torch
from masked_cases import (
    FAMILIES,
    layer_of,
    masked_entries,
    masked_pair,
    plan_for,
    step,
)
from torch import nn

import slimkern
from slimkern.masks import carried_masks
from slimkern.nn import MaskedBlock, MaskedLinear
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import mask_, slim_, unmasked

pytest.importorskip("transformers")
EPS = torch.finfo(torch.float64).eps


def assert_equal_steps(got, want, owned):
    """Outputs and gradients agree to the rounding of float64, and masked entries get none.

    A multiple of eps that leaves room for sums of thousands of terms, in every tensor's own scale
    and not below that of the largest: gradients of keys' biases are zero but for rounding.
    """
    largest = max(t.abs().max() for t in want[1:])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i > 0:
            assert not a[owned[i - 1]].any()
            a, b = a[~owned[i - 1]], b[~owned[i - 1]]
        if b.numel():
            scale = torch.maximum(b.abs().max(), 1e-3 * largest if i else b.abs().max())
            assert (a - b).abs().max() <= 1e4 * EPS * scale, i


@pytest.mark.parametrize("attention", ["eager", "sdpa", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_is_dense_with_zeros(family, attention):
    if family == "mpnet" and attention is not None:
        pytest.skip("has one implementation of attention")
    masked, dense = masked_pair(family, attention=attention)
    found = slimkern.masked_blocks(masked)
    assert [b.kind for b in found] == ["encoder_layer"] * 2
    assert not found.refused
    assert not any(b.aside for b in found)
    given = tiny_models.text_inputs()
    assert_equal_steps(step(masked, given), step(dense, given), masked_entries(masked))
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    assert_equal_steps(step(masked, given), step(dense, given), masked_entries(masked))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_inside_leaves_the_block_to_its_masked_linears(family):
    masked, dense = masked_pair(family)
    given = tiny_models.text_inputs()
    in_blocks = step(masked, given)
    seen = []
    inner = [m for m in layer_of(masked).modules() if isinstance(m, MaskedLinear)][-1]
    handle = inner.register_forward_hook(lambda *_: seen.append(1))
    asides = [b.aside for b in slimkern.masked_blocks(masked)]
    assert "has a hook" in asides[0]
    assert asides[1] is None
    assert "linear by linear" in str(slimkern.masked_blocks(masked))
    owned = masked_entries(masked)
    assert_equal_steps(step(masked, given), in_blocks, owned)
    assert_equal_steps(step(masked, given), step(dense, given), owned)
    assert len(seen) == 2
    handle.remove()
    assert not any(b.aside for b in slimkern.masked_blocks(masked))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_hooks_on_layers(family):
    masked, dense = masked_pair(family)
    given, seen = tiny_models.text_inputs(), []
    layer_of(masked).register_forward_hook(lambda *_: seen.append(1))
    keep = given["attention_mask"].bool()
    with torch.no_grad():
        got = masked(**given, output_hidden_states=True).hidden_states
        want = dense(**given, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 3
    for a, b in zip(got, want):
        assert (a - b)[keep].abs().max() <= 1e4 * EPS * b.abs().max()
    assert seen == [1]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_maps_are_the_kept_heads(family):
    masked, dense = masked_pair(family, **({} if family == "mpnet" else {"attention": "eager"}))
    given = tiny_models.text_inputs()
    with torch.no_grad():
        got = masked(**given, output_attentions=True).attentions
        want = dense(**given, output_attentions=True).attentions
    heads = got[0].shape[1]
    assert len(got) == 2
    first = want[0] if heads == want[0].shape[1] else want[0][:, ::2]
    assert (got[0] - first).abs().max() <= 1e4 * EPS


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_states_and_the_way_back(family):
    masked, dense = masked_pair(family)
    plan = carried_masks(masked)
    given = tiny_models.text_inputs()
    want = step(masked, given)
    again = copy.deepcopy(masked)
    assert len(slimkern.masked_blocks(again)) == 2
    assert all(torch.equal(a, b) for a, b in zip(step(again, given), want))
    assert list(masked.state_dict()) == list(dense.state_dict())
    file = io.BytesIO()
    torch.save(masked.state_dict(), file)
    file.seek(0)
    dense.load_state_dict(torch.load(file))
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), masked.parameters()))
    kinds = {n: type(m) for n, m in dense.named_modules()}
    assert all(isinstance(m, kinds[n]) for n, m in masked.named_modules())
    assert type(layer_of(masked)).__name__ == f"Masked{type(layer_of(dense)).__name__}"
    slim_(masked, plan)
    assert {n: type(m) for n, m in masked.named_modules()} == kinds
    attributes = {n: set(vars(m)) - {"slim_plan"} for n, m in dense.named_modules()}
    assert {n: set(vars(m)) - {"slim_plan"} for n, m in masked.named_modules()} == attributes
    keep = given["attention_mask"].bool()
    with torch.no_grad():
        assert (masked(**given)[0][keep] - want[0]).abs().max() <= 1e4 * EPS * want[0].abs().max()


def test_masks_move_are_lifted_and_left_out():
    masked, dense = masked_pair("bert")
    plan = carried_masks(masked)
    given = tiny_models.text_inputs()
    nothing = masked_entries(dense)
    with unmasked(masked, [e.group for e in plan]):
        assert_equal_steps(step(masked, given), step(dense, given), nothing)
    entries = [PlanEntry(e.group, e.keep[:-1]) for e in plan if e.group.kind == "ffn"]
    mask_(masked, SlimPlan(tuple(entries)))
    for entry in entries:
        name = entry.group.consumers[0].name
        dense.get_submodule(name).weight.data.copy_(masked.get_submodule(name).weight.data)
    assert_equal_steps(step(masked, given), step(dense, given), masked_entries(masked))
    full = [PlanEntry(e.group, tuple(range(e.group.num_units))) for e in plan]
    mask_(masked, SlimPlan(tuple(full)))
    assert not any(isinstance(m, (MaskedBlock, MaskedLinear)) for m in masked.modules())
    assert len(slimkern.masked_blocks(masked)) == 0


@pytest.mark.parametrize("kind", ["ffn", "mha"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_half_of_a_layer_is_masked(family, kind):
    dense = tiny_models.FAMILIES[family]().double()
    plan = SlimPlan(tuple(e for e in plan_for(dense) if e.group.kind == kind))
    masked = mask_(copy.deepcopy(dense), plan)
    assert len(slimkern.masked_blocks(masked)) == tiny_models.LAYERS
    for entry in plan:
        for member in entry.group.consumers:
            weight = masked.get_parameter(f"{member.name}.weight")
            dense.get_parameter(f"{member.name}.weight").data.copy_(weight.data)
    given = tiny_models.text_inputs()
    assert_equal_steps(step(masked, given), step(dense, given), masked_entries(masked))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_gradient_checkpointing(family, reentrant):
    masked, _ = (
        masked_pair(family, hidden_dropout_prob=0.2)
        if family == "bert"
        else masked_pair(family, dropout=0.2, attention_dropout=0.2)
    )
    given = tiny_models.text_inputs()
    masked.train()
    torch.manual_seed(5)
    want = step(masked, given)
    masked.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        masked.enable_input_require_grads()
    torch.manual_seed(5)
    got = step(masked, given)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_compile(family):
    torch._dynamo.reset()
    masked, _ = masked_pair(family)
    given = tiny_models.text_inputs()
    want = step(masked, given)
    compiled = torch.compile(masked, backend="aot_eager", fullgraph=True)
    got = step(compiled, given)
    assert_equal_steps(got, want, masked_entries(masked))


class Feed(nn.Module):
    """An FFN of a model that nobody knows."""

    def __init__(self, act, drop=None, hidden=10, width=24):
        super().__init__()
        self.first, self.second = nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.act, self.drop = act, drop

    def forward(self, x):
        y = self.act(self.first(x))
        if self.drop == "functional":
            y = nn.functional.dropout(y, 0.5, self.training)
        return self.second(self.drop(y) if isinstance(self.drop, nn.Module) else y)


class Two(nn.Module):
    def __init__(self, *args):
        super().__init__()
        self.feed, self.head = Feed(*args), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(x + self.feed(x))


def masked_two(*args):
    torch.manual_seed(0)
    model = Two(*args).double()
    x = torch.randn(4, 10, dtype=torch.float64)
    entries = [
        PlanEntry(g, tuple(range(0, g.num_units, 3)))
        for g in slimkern.discover(model, x)
        if not g.is_head
    ]
    return mask_(model, SlimPlan(tuple(entries))), x


def test_an_ffn_of_any_model():
    model, x = masked_two(nn.SiLU())
    assert [(b.name, b.kind) for b in slimkern.masked_blocks(model)] == [("feed", "ffn")]
    y = model(x)
    handle = model.feed.first.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    handle.remove()


def test_dropout_whose_place_is_unknown_is_left_to_the_linears():
    model, x = masked_two(nn.GELU(), nn.Dropout(0.5))
    assert "drops" in slimkern.masked_blocks(model.train()).blocks[0].aside
    assert not torch.equal(model(x), model(x))
    assert slimkern.masked_blocks(model.eval()).blocks[0].aside is None
    model, _ = masked_two(nn.GELU(), "functional")
    found = slimkern.masked_blocks(model)
    assert len(found) == 0
    assert "in training it computes something else" in found.refused[0].reason


def test_what_does_not_fit_is_told():
    model, _ = masked_two(nn.Softsign())
    found = slimkern.masked_blocks(model)
    assert len(found) == 0
    assert found.refused[0].name == "feed"
    assert "computes something else" in str(found)
    assert isinstance(model.feed.first, MaskedLinear)
    full = [PlanEntry(e.group, tuple(range(24))) for e in carried_masks(model)]
    mask_(model, SlimPlan(tuple(full)))
    assert slimkern.masked_blocks(model).refused == ()
    assert not hasattr(model, "mask_refused")


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_in_training(family):
    """What is dropped has torch's distribution: the mean over many draws is the output without."""
    names = {"dropout": 0.3, "attention_dropout": 0.3}
    if family != "distilbert":
        names = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    masked, _ = masked_pair(family, torch.float32, **names)
    layer, x = layer_of(masked), torch.randn(1, 5, tiny_models.HIDDEN)

    def out():
        y = layer(x, None, None) if family == "mpnet" else layer(x)
        return (y[0] if isinstance(y, tuple) else y).detach()

    layer.train()
    torch.manual_seed(0)
    first, second = out(), out()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(out(), first)
    x = x.expand(400, -1, -1)  # as many draws in one call: each row has its own
    in_block = out()
    layer.register_module("watched", nn.Identity())
    layer.watched.register_forward_hook(lambda *_: None)  # now linear by linear
    by_linears = out()
    spread = (in_block.var(0) + by_linears.var(0)) / 400
    far = (in_block.mean(0) - by_linears.mean(0)) / spread.sqrt()
    # 240 numbers that are normal to a good approximation: one beyond 5 is a chance of 1e-4.
    assert far.abs().max() < 5
    ratio = in_block.var(0).mean() / by_linears.var(0).mean()
    assert 0.9 < ratio < 1.1


@pytest.mark.parametrize("added", [False, True])
def test_a_sequence_of_nothing_but_padding_in_training(added):
    """As PyTorch's attention: queries that see no key get zeros, and no gradient is NaN."""
    masked, _ = masked_pair("bert", attention_probs_dropout_prob=0.5)
    layer = layer_of(masked).train()
    for name in ("attention.output.dropout", "output.dropout"):
        layer.get_submodule(name).p = 0.0
    x = torch.randn(2, 5, tiny_models.HIDDEN, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1] = False
    if added:
        mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, -torch.inf)
    y = layer(x, mask)
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(y[1], layer.eval()(x, mask)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropouts_of_another_kind(family):
    """A dropout that was taken out drops nothing; one of another kind is the linears' business."""
    masked, dense = masked_pair(family)
    given, seen = tiny_models.text_inputs(), masked_entries(masked)
    layer = layer_of(masked)
    for name in filter(None, layer.drops):
        layer.set_submodule(name, nn.Identity())
    assert layer.aside() is None
    assert_equal_steps(step(masked, given), step(dense, given), seen)
    layer.set_submodule(layer.drops[2], nn.AlphaDropout(0.1))
    assert "no plain dropout" in layer.aside()
    assert_equal_steps(step(masked.eval(), given), step(dense.eval(), given), seen)


def test_a_mask_of_tokens_is_left_to_the_plain_forward(monkeypatch):
    """Flash attention gets one: of two dimensions, which would be broadcast over queries."""
    masked, _ = masked_pair("bert")
    layer, calls = layer_of(masked), []
    monkeypatch.setattr(type(layer), "_attend", lambda *_: calls.append(1))
    x = torch.randn(5, 5, tiny_models.HIDDEN, dtype=torch.float64)
    layer(x, torch.ones(5, 5, dtype=torch.bool))
    assert not calls


def test_norms_of_another_dtype_are_left_to_the_linears():
    """A bfloat16 model with float32 norms trains, as the plain one does."""
    masked, _ = masked_pair("bert")
    masked.bfloat16()
    for module in masked.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    assert "another dtype" in layer_of(masked).aside()
    masked(**tiny_models.text_inputs())[0].float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in masked.parameters())
