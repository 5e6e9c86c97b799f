"""The attention's implementation is changed on a masked model: its blocks follow."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from masked_cases import FAMILIES, layer_of, masked_entries, masked_pair, step
from test_masked_blocks import assert_equal_steps
from torch import nn

import slimkern

pytest.importorskip("transformers")

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


def sharper(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """An attention of a user's own: scores that are twice as large."""
    mask = attention_mask
    y = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=2 * query.shape[-1] ** -0.5
    )
    return y.transpose(1, 2).contiguous(), None


@pytest.fixture
def own():
    AttentionInterface.register("sharper", sharper)
    AttentionMaskInterface.register("sharper", sdpa_mask)
    return "sharper"


SWITCHED = [family for family in FAMILIES if family != "mpnet"]  # which has one implementation


def switch(model, name, by_method):
    if by_method:
        model.set_attn_implementation(name)
    else:
        model.config._attn_implementation = name


@pytest.mark.parametrize("by_method", [True, False])
@pytest.mark.parametrize("family", SWITCHED)
def test_eager_and_sdpa_are_followed_in_blocks(family, by_method):
    masked, dense = masked_pair(family, attention="sdpa")
    given, owned = tiny_models.text_inputs(), masked_entries(masked)
    for name in ("eager", "sdpa"):
        switch(masked, name, by_method)
        switch(dense, name, by_method)
        assert not any(b.aside for b in slimkern.masked_blocks(masked))
        assert_equal_steps(step(masked, given), step(dense, given), owned)


@pytest.mark.parametrize("by_method", [True, False])
@pytest.mark.parametrize("family", SWITCHED)
def test_any_other_is_left_to_the_plain_forward(family, by_method, own):
    masked, dense = masked_pair(family, attention="sdpa")
    given, owned = tiny_models.text_inputs(), masked_entries(masked)
    before = step(masked, given)
    switch(masked, own, by_method)
    switch(dense, own, by_method)
    for block in slimkern.masked_blocks(masked):
        assert block.aside == "its attention implementation is 'sharper' now"
    got = step(masked, given)
    assert not torch.allclose(got[0], before[0])
    assert_equal_steps(got, step(dense, given), owned)
    switch(masked, "sdpa", by_method)
    assert not any(b.aside for b in slimkern.masked_blocks(masked))
    assert all(torch.equal(a, b) for a, b in zip(step(masked, given), before, strict=True))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_mpnet_has_one_implementation_whatever_its_configuration_says(name):
    masked, dense = masked_pair("mpnet")
    masked.config._attn_implementation = dense.config._attn_implementation = name
    given = tiny_models.text_inputs()
    assert not any(b.aside for b in slimkern.masked_blocks(masked))
    assert_equal_steps(step(masked, given), step(dense, given), masked_entries(masked))


def test_masks_that_are_no_tensors_reach_the_plain_forward(monkeypatch):
    """Those of flex attention have no dimensions to look at."""
    masked, _ = masked_pair("bert")
    layer, seen = layer_of(masked), []
    monkeypatch.setattr(
        type(layer).masked_from, "forward", lambda self, x, mask, *args, **kwargs: seen.append(mask)
    )
    layer.attention.self.config._attn_implementation = "flex_attention"
    mask = object()
    layer(torch.randn(1, 5, tiny_models.HIDDEN, dtype=torch.float64), mask)
    assert seen == [mask]
