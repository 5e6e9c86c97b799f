"""Attention that discovery reads, and attention that it must refuse."""

from __future__ import annotations

import math

import pytest
import tiny_models as tm
import torch
from discovery_cases import X
from exactness import assert_deletion_is_exact
from torch import nn

from slimkern.discovery import discover


def test_grouped_query_attention_is_refused_and_its_ffn_found():
    found = discover(tm.OTHERS["llama"]("ForCausalLM", num_key_value_heads=2))
    assert [g.kind for g in found] == ["ffn"] * tm.LAYERS
    assert len(found.refused) == tm.LAYERS
    assert all("grouped-query" in r.reason for r in found.refused)


def test_attention_maps_as_outputs_forbid_cutting_heads():
    model = tm.FAMILIES["bert"](attention="eager", output_attentions=True)
    found = discover(model)
    assert [g.kind for g in found] == ["ffn"] * tm.LAYERS
    assert all("an output of the model" in r.reason for r in found.refused)


def rotated(x):
    """Complex rotary embedding over dim -2 (tokens) and -1 (channels of a head)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    angles = torch.outer(torch.arange(x.shape[-2]), torch.arange(pairs.shape[-1])).to(x.dtype)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class Attention(nn.Module):
    """Self-attention by hand; ``fused``: one projection for query, key and value."""

    def __init__(self, heads=3, head_dim=4, fused=False, other=False, mix=False, rope=False):
        super().__init__()
        width = heads * head_dim
        self.head_dim, self.other, self.mix, self.rope = head_dim, other, mix, rope
        sizes = [3 * width] if fused else [width] * 3
        self.ins = nn.ModuleList(nn.Linear(10, n) for n in sizes)
        self.out = nn.Linear(width, 10)

    def forward(self, x, y=None):
        sources = (x, y, y) if self.other else (x,) * 3
        parts = [p(s) for p, s in zip(self.ins, sources)]
        parts = parts[0].chunk(3, -1) if len(parts) == 1 else parts
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in parts)
        if self.rope:
            q, k = rotated(q), rotated(k)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(self.head_dim)
        if self.mix:
            scores = scores + scores.mean(1, keepdim=True)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rope", [False, True])
def test_attention_of_a_model_nobody_has_heard_of(rope):
    model = tm.randomize(Attention(rope=rope).double())
    found = discover(model, X)
    (group,) = found.groups
    assert (group.kind, group.num_units, group.name) == ("mha", 3, "out")
    assert [m.role for m in group.producers] == ["query", "key", "value"]
    assert not found.refused
    with torch.no_grad():
        assert_deletion_is_exact(model, found, lambda m: m(X))


@pytest.mark.parametrize("kernel", ["efficient", "flash", "cudnn", "flash_for_cpu"])
def test_every_fused_attention_is_read(kernel):
    ops = torch.ops.aten
    run = {
        "efficient": lambda q, k, v: ops._scaled_dot_product_efficient_attention(
            q, k, v, None, False
        ),
        "flash": lambda q, k, v: ops._scaled_dot_product_flash_attention(q, k, v),
        "cudnn": lambda q, k, v: ops._scaled_dot_product_cudnn_attention(q, k, v, None, False),
        "flash_for_cpu": lambda q, k, v: ops._scaled_dot_product_flash_attention_for_cpu(q, k, v),
    }[kernel]

    class Fused(Attention):
        def forward(self, x):
            q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in self.ins)
            return self.out(run(q, k, v)[0].transpose(1, 2).flatten(2))

    (group,) = discover(Fused(), X).groups
    assert (group.kind, group.num_units) == ("mha", 3)
    assert [m.role for m in group.producers] == ["query", "key", "value"]


@pytest.mark.parametrize(
    ("options", "inputs", "reason"),
    [
        ({"fused": True}, (X,), "a fused projection"),
        ({"other": True}, (X, X + 1), "cross-attention"),
        ({"mix": True}, (X,), "'mean'"),
        ({"heads": 1}, (X,), "single head"),
    ],
)
def test_attention_that_is_refused(options, inputs, reason):
    if "other" in options:

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.pre, self.att = nn.Linear(10, 10), Attention(**options)

            def forward(self, x, y):
                return self.att(x, self.pre(y).softmax(-1))

        model = Two().double()
    else:
        model = Attention(**options).double()
    found = discover(model, inputs)
    assert not found.groups
    assert any(reason in r.reason for r in found.refused), str(found)


def test_torch_encoder_is_read_as_far_as_it_goes():
    layer = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True)
    found = discover(nn.TransformerEncoder(layer, 2), torch.zeros(2, 3, 8))
    assert [g.name for g in found] == ["layers.0.linear2", "layers.1.linear2"]
    refused = {r.name for r in found.refused}
    assert {"layers.0.self_attn", "layers.0.self_attn.out_proj"} <= refused
