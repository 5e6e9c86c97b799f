"""``fuse_``: the fused model computes what the slim one does, and is the same model otherwise."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from fuse_cases import BERT_LIKE, FAMILIES, assert_as_exact, fused_copy, inputs, layer_of, run, tiny
from torch import nn

import slimkern
from slimkern import accuracy
from slimkern.nn import FusedModule
from slimkern.ops import available_maths

pytest.importorskip("transformers")

KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("cut", "dtype"),
    [
        *((cut, torch.float32) for cut in ("dense", "even", "uneven", "extreme")),
        ("uneven", torch.bfloat16),
    ],
)
def test_a_fused_model_computes_what_the_plain_one_does(family, cut, dtype):
    plain = tiny(family, cut, dtype)
    fused = fused_copy(plain)
    found = slimkern.fused_blocks(fused)
    assert [b.kind for b in found] == ["encoder_layer"] * 2
    assert found.refused == ()
    for padded in (False, True):
        assert_as_exact(fused, plain, inputs(padded), KINDS[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_model_and_unfuse_gives_it_back(family):
    plain, given = tiny(family), inputs()
    fused, before = copy.deepcopy(plain), run(plain, given)
    kinds = {name: type(m) for name, m in fused.named_modules()}
    objects = {name: id(m) for name, m in fused.named_modules()}
    assert slimkern.fuse_(fused) is fused
    assert {name: id(m) for name, m in fused.named_modules()} == objects
    assert all(isinstance(m, kinds[name]) for name, m in fused.named_modules())
    layer = layer_of(fused)
    assert type(layer).__name__ == f"Fused{type(layer_of(plain)).__name__}"
    assert type(layer) is type(layer_of(fused, 1)) is type(layer_of(fused_copy(plain)))
    state, other = fused.state_dict(), plain.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert slimkern.unfuse_(fused) is fused
    assert {name: type(m) for name, m in fused.named_modules()} == kinds
    assert torch.equal(run(fused, given), before)
    attributes = {name: sorted(vars(m)) for name, m in plain.named_modules()}
    assert {name: sorted(vars(m)) for name, m in fused.named_modules()} == attributes
    assert slimkern.unfuse_(fused) is fused  # not fused: nothing to do


def test_an_ffn_with_nothing_left():
    plain = tiny("bert", "dense")
    layer = layer_of(plain)
    layer.intermediate.dense = nn.Linear(tiny_models.HIDDEN, 0)
    layer.output.dense = nn.Linear(0, tiny_models.HIDDEN)
    fused = fused_copy(plain)
    assert len(slimkern.fused_blocks(fused)) == 2
    assert_as_exact(fused, plain, inputs(), "fp32")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*BERT_LIKE, "distilbert"])
def test_masks_of_both_attention_implementations(family, attention):
    plain = tiny(family, attention=attention)
    fused = fused_copy(plain)
    for given in (inputs(), inputs(False), {"input_ids": inputs()["input_ids"]}):
        mask = given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
        assert_as_exact(fused, plain, given, "fp32")
        # Left padding, and a hole: every position is computed, only keys are left out.
        assert_as_exact(fused, plain, {**given, "attention_mask": mask.flip(1)}, "fp32")
    holed = inputs()
    holed["attention_mask"][:, 1] = 0
    assert_as_exact(fused, plain, holed, "fp32")


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_behind_the_last_key_are_zeros(family):
    fused, given = fused_copy(tiny(family)), inputs()
    with torch.inference_mode():
        y = fused(**given)[0]
    kept = given["attention_mask"].bool()
    assert not y[~kept].any()
    assert y[kept].all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForTokenClassification"])
def test_models_with_a_head(family, task):
    plain = tiny(family, task=task)
    fused = fused_copy(plain)
    assert len(slimkern.fused_blocks(fused)) == 2
    given = inputs()
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(**given).logits
        want, got = plain(**given).logits, fused(**given).logits
    if task == "ForTokenClassification":
        kept = given["attention_mask"].bool()
        exact, want, got = exact[kept], want[kept], got[kept]
    eager = accuracy.relative_error(want, exact)
    assert accuracy.relative_error(got, exact) <= 4 * eager + 2.0**-22


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_recorded_and_hooks_called(family):
    plain, given = tiny(family), inputs()
    fused = fused_copy(plain)
    seen = []
    layer_of(fused, 1).register_forward_hook(lambda module, args, output: seen.append(output))
    kept = given["attention_mask"].bool()
    for return_dict in (True, False):
        with torch.inference_mode():
            asked = {**given, "output_hidden_states": True, "return_dict": return_dict}
            want, got = plain(**asked), fused(**asked)
        if return_dict:
            want, got = want.hidden_states, got.hidden_states
        else:
            want, got = want[-1], got[-1]
        assert len(got) == len(want) == 3
        for a, b in zip(want, got):
            torch.testing.assert_close(a[kept], b[kept], rtol=1e-4, atol=1e-4)
    assert len(seen) == 2
    last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(last[kept], got[-1][kept])


def test_pipelines_that_recorded_before_can_be_fused():
    model, given = tiny("bert", attention="eager"), inputs()
    with torch.no_grad():
        assert len(model(**given, output_attentions=True).attentions) == 2
    assert len(slimkern.fused_blocks(slimkern.fuse_(model))) == 2
    with pytest.raises(RuntimeError, match="unfuse_"), torch.no_grad():
        model(**given, output_attentions=True)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_is_pytorchs_own_or_the_one_that_is_given(precision):
    plain, given = tiny("bert"), inputs()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        fused = fused_copy(plain, None)
    finally:
        torch.set_float32_matmul_precision(before)
    other = fused_copy(plain, precision)
    assert torch.equal(run(fused, given), run(other, given))
    wanted = {"highest": ("bf16x6", "fp32"), "high": ("bf16x3", "fp32"), "medium": ("bf16",)}
    math = next(m for m in wanted[precision] if m in available_maths())
    assert {b.math for b in slimkern.fused_blocks(other)} == {math}
    kind = {"highest": "fp32", "high": "fp32-high", "medium": "fp32-medium"}[precision]
    assert_as_exact(other, plain, given, kind)


def test_fusing_again_takes_the_new_precision():
    model = fused_copy(tiny("bert"), "highest")
    first = slimkern.fused_blocks(model)
    assert slimkern.fuse_(model, precision="medium") is model
    second = slimkern.fused_blocks(model)
    assert {b.math for b in second} == {"bf16"} != {b.math for b in first}
    assert sum(b.nbytes for b in second) < sum(b.nbytes for b in first)


class PreNorm(nn.Module):
    """A feed-forward block of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(10, eps=1e-6)
        self.wide, self.narrow = nn.Linear(10, 24, bias=False), nn.Linear(24, 10)

    def forward(self, x):
        return x + self.narrow(nn.functional.silu(self.wide(self.norm(x))))


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(), "relu"),
        (nn.SiLU(), "silu"), (nn.Identity(), "none"),
    ],
)  # fmt: skip
def test_ffns_of_any_module(act, name):
    plain = tiny_models.mlp(10, 24, 10, act=act)
    fused = fused_copy(plain)
    assert type(fused).__name__ == "FusedSequential"
    assert isinstance(fused, nn.Sequential)
    assert fused.packs.block.ffn.activation == name
    for shape in ((10,), (7, 10), (2, 3, 10), (0, 10)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


def test_ffns_inside_of_other_modules():
    model = nn.Sequential(PreNorm(), nn.Tanh(), tiny_models.Gated(), tiny_models.mlp(10, 24, 12))
    plain = tiny_models.randomize(model)
    fused = fused_copy(plain)
    found = slimkern.fused_blocks(fused)
    assert [(b.name, b.kind) for b in found] == [("0", "ffn"), ("2", "ffn")]
    assert [r.name for r in found.refused] == ["3"]
    assert "from 10 to 12 features" in found.refused[0].reason
    x = torch.randn(4, 10)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)
    assert "0      ffn   fp32" in str(found).replace("bf16x6", "fp32")
    assert "refused  3: an FFN" in str(found)


def test_what_is_known_in_part_is_fused_in_part():
    plain = tiny("bert", "dense", hidden_act="mish", num_hidden_layers=1)
    fused, given = fused_copy(plain), inputs()
    found = slimkern.fused_blocks(fused)
    assert [(b.name, b.kind) for b in found] == [("encoder.layer.0.attention", "attention_block")]
    assert [r.name for r in found.refused] == ["encoder.layer.0"]
    assert "computes something else" in found.refused[0].reason
    assert_as_exact(fused, plain, given, "fp32")
    assert isinstance(fused.encoder, FusedModule)  # it hands masks to fused attention


@pytest.mark.parametrize("family", ["distilbert", "mpnet"])
def test_attention_alone_of_the_other_families(family):
    field = "activation" if family == "distilbert" else "hidden_act"
    plain = tiny(family, "dense", **{field: "mish"})
    fused = fused_copy(plain)
    assert {b.kind for b in slimkern.fused_blocks(fused)} == {"attention_block"}
    assert_as_exact(fused, plain, inputs(), "fp32")


@pytest.mark.parametrize("family", ["llama", "t5", "vit"])
def test_what_else_there_is_is_told(family):
    fused = slimkern.fuse_(tiny_models.OTHERS[family]())
    found = slimkern.fused_blocks(fused)
    assert {b.kind for b in found} == {"ffn"}
    assert all("it is not known how the attention of" in r.reason for r in found.refused)
    assert found.refused


def test_memory_is_the_weights_and_about_as_much():
    plain = tiny_models.FAMILIES["bert"](
        hidden_size=256, num_attention_heads=8, intermediate_size=512, num_hidden_layers=1
    )
    weights = sum(p.numel() * p.element_size() for p in layer_of(plain).parameters())
    for dtype, precision in ((torch.float32, "highest"), (torch.bfloat16, None)):
        fused = fused_copy(plain.to(dtype), precision)
        (block,) = slimkern.fused_blocks(fused)
        own = weights * dtype.itemsize / 4
        parts = 3 if block.math == "bf16x6" else 1
        assert block.nbytes <= 1.2 * own * (parts * 2 / dtype.itemsize if parts > 1 else 1)


def test_a_slimmed_sentence_model(minilm_dir):
    from transformers import AutoModel, AutoTokenizer

    plain = AutoModel.from_pretrained(minilm_dir).eval()
    groups = [g for g in slimkern.discover(plain) if not g.is_head]
    scores = slimkern.importance(plain, groups)
    slimkern.slim_(plain, slimkern.make_plan(groups, scores, ffn_sparsity=0.8, mha_sparsity=0.6))
    sentences = [
        "A man plays the guitar.",
        "Someone is making music on an instrument.",
        "The stock fell by three percent on Tuesday, after the board had resigned.",
    ]
    given = AutoTokenizer.from_pretrained(minilm_dir)(sentences, padding=True, return_tensors="pt")

    def embedding(model: nn.Module) -> torch.Tensor:
        mask = given["attention_mask"][..., None]
        with torch.no_grad():
            y = model(**given)[0]
        return nn.functional.normalize((y * mask).sum(1) / mask.sum(1), dim=-1)

    exact = copy.deepcopy(plain).double()
    want = embedding(exact)
    for dtype, kind in KINDS.items():
        fused = fused_copy(copy.deepcopy(plain).to(dtype))
        assert len(slimkern.fused_blocks(fused)) == 6
        bound = accuracy.rounding_bound(lambda: embedding(exact), want, kind)
        got = embedding(fused).double()
        assert accuracy.relative_error(got, want) <= bound
        assert (got * want).sum(-1).min() >= 1 - bound**2 - (1e-2 if kind == "bf16" else 1e-6)
