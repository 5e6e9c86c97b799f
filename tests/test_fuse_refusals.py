"""What ``fuse_`` and fused modules refuse, with what is said, and that nothing changes then."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from fuse_cases import FAMILIES, fused_copy, inputs, layer_of, run, tiny
from torch import nn
from torch.nn.utils import parametrizations

import slimkern
from slimkern import fuse_check
from slimkern.nn import FusedModule
from slimkern.plan import SlimPlan

pytest.importorskip("transformers")

GIVEN = inputs()


def assert_untouched(model: nn.Module) -> None:
    assert not any(isinstance(m, FusedModule) or hasattr(m, "packs") for m in model.modules())
    assert "fuse_refused" not in vars(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_maps(family):
    fused = fused_copy(tiny(family, attention="eager"))
    for task in ("call", "config"):
        asked = {"output_attentions": True} if task == "call" else {}
        fused.config.output_attentions = task == "config"
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"attention maps.*unfuse_"):
            fused(**GIVEN, **asked)
    fused.config.output_attentions = False
    run(fused, GIVEN)
    layer = layer_of(fused)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"attention maps.*unfuse_"):
        layer(torch.zeros(1, 3, 48), output_attentions=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_and_gradients(family):
    fused = fused_copy(tiny(family))
    fused.train()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"training mode.*eval\(\).*unfuse_"):
        fused(**GIVEN)
    fused.eval()
    with pytest.raises(RuntimeError, match=r"no gradient.*unfuse_"):
        fused(**GIVEN)
    x = torch.zeros(1, 3, 48, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no gradient.*unfuse_"):
        layer_of(fused)(x)
    with torch.no_grad():
        layer_of(fused)(x)


def test_ffns_in_training_mode():
    fused = fused_copy(tiny_models.mlp(10, 24, 10)).train()
    with pytest.raises(RuntimeError, match=r"FusedSequential is in training mode.*unfuse_"):
        fused(torch.zeros(2, 10))


@pytest.mark.parametrize("name", ["encoder_hidden_states", "past_key_values", "is_causal"])
def test_what_decoders_hand_to_a_layer(name):
    layer = layer_of(fused_copy(tiny("bert")))
    x = torch.zeros(1, 3, 48)
    layer(x, **{name: None}, position_ids=torch.arange(3))
    with pytest.raises(RuntimeError, match=rf"{name}.*unfuse_"):
        layer(x, **{name: x})


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_that_differ_by_query(family):
    fused = fused_copy(tiny(family, attention="eager"))
    causal = torch.ones(3, 1, 9, 9).tril()
    mask = torch.zeros_like(causal).masked_fill(causal == 0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"every query and head.*unfuse_"):
            fused(GIVEN["input_ids"], attention_mask=mask)
        x = torch.zeros(3, 9, 48)
        with pytest.raises(ValueError, match=r"every query and head.*unfuse_"):
            layer_of(fused)(x, mask)
        heads = torch.zeros(3, 2, 1, 9)
        heads[:, 1] = 1
        with pytest.raises(ValueError, match=r"every query and head.*unfuse_"):
            layer_of(fused)(x, heads)
        with pytest.raises(ValueError, match=r"shape \(9, 9\).*unfuse_"):
            layer_of(fused)(x, mask[0, 0])
        with pytest.raises(TypeError, match=r"torch.int64.*unfuse_"):
            layer_of(fused)(x, mask.long())


def test_a_position_bias_that_differs_by_sequence():
    layer, x = layer_of(fused_copy(tiny("mpnet", "dense"))), torch.zeros(2, 3, 48)
    bias = torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        layer(x, None, bias[:1])
        layer(x, None, bias[:1].expand(2, -1, -1, -1))
        with pytest.raises(ValueError, match=r"every sequence.*unfuse_"):
            layer(x, None, bias)


def test_surgery_and_discovery_name_unfuse():
    plain = tiny("bert", "dense")
    groups = slimkern.discover(plain).groups
    scores = slimkern.importance(plain, groups)
    plan = slimkern.make_plan(groups, scores, ffn_sparsity=0.5)
    fused = fused_copy(plain)
    for verb in (slimkern.slim_, slimkern.mask_):
        with pytest.raises(slimkern.SurgeryError, match="unfuse_"):
            verb(fused, plan)
    with pytest.raises(slimkern.SurgeryError, match="unfuse_"):
        slimkern.slim_(fused, SlimPlan(()))
    with pytest.raises(ValueError, match="unfuse_"):
        slimkern.discover(fused)
    slimkern.slim_(slimkern.unfuse_(fused), plan)
    assert len(slimkern.fused_blocks(slimkern.fuse_(fused))) == 2


def test_models_that_are_not_ready():
    plain = tiny("bert", "dense")
    groups = [g for g in slimkern.discover(plain).groups if g.kind == "ffn"]
    plan = slimkern.make_plan(groups, slimkern.importance(plain, groups), ffn_sparsity=0.5)
    masked = slimkern.mask_(copy.deepcopy(plain), plan)
    with pytest.raises(slimkern.FuseError, match=r"masked.*slim_"):
        slimkern.fuse_(masked)
    assert_untouched(masked)
    with pytest.raises(slimkern.FuseError, match="compiled"):
        slimkern.fuse_(torch.compile(plain))
    with pytest.raises(ValueError, match="'fast'; accepted: None, highest, high, medium"):
        slimkern.fuse_(plain, precision="fast")
    with pytest.raises(slimkern.FuseError, match="nothing can be fused"):
        slimkern.fuse_(nn.Linear(3, 3))
    assert_untouched(plain)


def _hook(layer):
    layer.attention.self.register_forward_hook(lambda *_: None)


def _own_forward(layer):
    layer.output.forward = type(layer.output).forward.__get__(layer.output)


def _other_linear(layer):
    class Adapted(nn.Linear):
        pass

    layer.intermediate.dense.__class__ = Adapted


def _parametrized(layer):
    parametrizations.weight_norm(layer.output.dense)


def _decoder(layer):
    layer.is_decoder = True


def _half(layer):
    layer.half()


def _mixed(layer):
    layer.output.LayerNorm.double()


def _meta(layer):
    layer.to("meta")


def _subclass(layer):
    layer.__class__ = type("Mine", (type(layer),), {"forward": type(layer).forward})


def _implementation(layer):
    layer.attention.self.config = copy.copy(layer.attention.self.config)
    layer.attention.self.config._attn_implementation = "flex_attention"


def _nan(layer):
    layer.output.dense.weight.data[0, 0] = float("nan")


UNFIT = [
    (_hook, "attention.self has a forward hook"),
    (_own_forward, "the forward of output was replaced"),
    (_other_linear, "intermediate.dense is no plain Linear, but Adapted"),
    (_parametrized, "output.dense is no plain Linear, but Parametrized"),
    (_decoder, "decoder"),
    (_half, "dtype torch.float16; accepted: torch.float32 or torch.bfloat16"),
    (_mixed, "dtype torch.float32, torch.float64; accepted"),
    (_meta, "on meta; accepted: cpu"),
    (_subclass, "derived from BertLayer"),
    (_implementation, "'flex_attention'; accepted: eager and sdpa"),
    (_nan, "its own output on a sample is not finite"),
]


@pytest.mark.parametrize(("spoil", "reason"), UNFIT, ids=[f.__name__[1:] for f, _ in UNFIT])
def test_a_layer_that_can_not_be_matched_is_left_with_the_reason(spoil, reason):
    model = tiny("bert", "dense")
    spoil(layer_of(model))
    kind = type(layer_of(model))
    slimkern.fuse_(model)
    found = slimkern.fused_blocks(model)
    assert "encoder.layer.1" in {b.name for b in found}
    assert "encoder.layer.0" not in {b.name for b in found}
    said = {r.name: r.reason for r in found.refused}
    assert reason in said["encoder.layer.0"]
    assert type(layer_of(model)) is kind
    assert f"refused  encoder.layer.0: {said['encoder.layer.0']}" in str(found)


def test_decoders_are_refused_whole():
    model = tiny("bert", "dense", is_decoder=True)
    with pytest.raises(slimkern.FuseError, match=r"refused  encoder.layer.1: .*decoder"):
        slimkern.fuse_(model)
    assert_untouched(model)


def test_activations_that_differ_far_out_are_told_apart():
    for act in (nn.ReLU6(), nn.Hardtanh(), nn.ELU(), nn.Tanh()):
        with pytest.raises(slimkern.FuseError, match="computes something else"):
            slimkern.fuse_(tiny_models.mlp(10, 24, 10, act=act))
    clipped = tiny("bert", "dense", hidden_act="gelu_10")  # gelu, with a ceiling at 10
    assert {b.kind for b in slimkern.fused_blocks(slimkern.fuse_(clipped))} == {"attention_block"}


def test_a_module_that_does_more_is_no_ffn():
    class More(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(10, 24), nn.Linear(24, 10)

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x))) * 1.0001

    class Fails(More):
        def forward(self, x):
            raise KeyError("nothing")

    for kind, said in ((More, "computes something else"), (Fails, "can't be called .*KeyError")):
        model = kind()
        with pytest.raises(slimkern.FuseError, match=said):
            slimkern.fuse_(model)
        assert type(model) is kind


@pytest.mark.parametrize("fused_before", [False, True])
def test_an_unexpected_error_changes_nothing(monkeypatch, fused_before):
    model = tiny("bert")
    if fused_before:
        slimkern.fuse_(model, precision="medium")
    state = [(type(m), vars(m).get("packs")) for m in model.modules()]
    want = run(model, GIVEN)
    calls = []

    def fails_late(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError("no more")
        return real(*arguments)

    real = fuse_check.fitting
    monkeypatch.setattr(fuse_check, "fitting", fails_late)
    with pytest.raises(MemoryError):
        slimkern.fuse_(model)
    assert [(type(m), vars(m).get("packs")) for m in model.modules()] == state
    assert torch.equal(run(model, GIVEN), want)


def test_fuse_prints_nothing(capfd):
    slimkern.unfuse_(slimkern.fuse_(tiny("bert")))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
