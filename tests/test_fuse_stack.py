"""Layers of a fused model in one call: when they are, when not, always with the same result."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from fuse_cases import BERT_LIKE, FAMILIES, fused_copy, inputs, layer_of, tiny

import slimkern
from slimkern.nn import FusedModule, fused_text

pytest.importorskip("transformers")


@pytest.fixture
def counted(monkeypatch):
    """How many layers each call of a whole stack has computed."""
    calls, real = [], fused_text.encoder_stack

    def count(x, packs, *extra):
        calls.append(len(packs))
        return real(x, packs, *extra)

    monkeypatch.setattr(fused_text, "encoder_stack", count)
    return calls


def hidden(model, given):
    with torch.inference_mode():
        return model(**given)[0]


@contextmanager
def one_by_one(model):
    """Within it, every layer is looked at, and so called by itself."""
    layers = [m for m in model.modules() if isinstance(m, FusedModule) and "packs" in vars(m)]
    handles = [layer.register_forward_hook(lambda *_: None) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", ["dense", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_one_call_of_the_same_result(family, cut, dtype, counted):
    fused = fused_copy(tiny(family, cut, dtype))
    holed = inputs()
    holed["attention_mask"][:, 1] = 0
    for given in (inputs(), inputs(False), holed, {"input_ids": inputs()["input_ids"]}):
        counted.clear()
        at_once = hidden(fused, given)
        assert counted == [2]
        with one_by_one(fused):
            assert torch.equal(hidden(fused, given), at_once)
        assert counted == [2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForMaskedLM"])
def test_models_with_a_head(family, task, counted):
    fused, given = fused_copy(tiny(family, task=task)), inputs()
    at_once = hidden(fused, given)
    assert counted == [2]
    with one_by_one(fused):
        assert torch.equal(hidden(fused, given), at_once)
    assert counted == [2]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_something_looks_at_are_called(family, counted):
    fused, given, seen = fused_copy(tiny(family)), inputs(), []
    want, layer = hidden(fused, given), layer_of(fused, 1)
    counted.clear()
    forward = type(layer).forward

    def own(*args, **kwargs):
        seen.append("forward")
        return forward(layer, *args, **kwargs)

    def everywhere(module, *_):
        if module is layer:
            seen.append("everywhere")

    for hook in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = hook(lambda *_: seen.append("hook"))
        assert torch.equal(hidden(fused, given), want)
        handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(everywhere)
    try:
        assert torch.equal(hidden(fused, given), want)
    finally:
        handle.remove()
    layer.forward = own
    assert torch.equal(hidden(fused, given), want)
    del layer.forward
    assert seen == ["hook", "hook", "everywhere", "forward"]
    assert counted == []
    assert torch.equal(hidden(fused, given), want)
    assert counted == [2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_on_the_stack_is_called(family, counted):
    fused, given, seen = fused_copy(tiny(family)), inputs(), []
    stack = next(m for m in fused.modules() if isinstance(m, fused_text._Stack))
    want = hidden(fused, given)
    stack.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    assert torch.equal(hidden(fused, given), want)
    assert len(seen) == 1
    assert torch.equal(seen[0], want)
    assert counted == [2, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_else_is_asked_for(family, counted):
    plain, given = tiny(family), inputs()
    fused = fused_copy(plain)
    want = hidden(fused, given)
    counted.clear()
    with torch.inference_mode():
        assert torch.equal(fused(**given, return_dict=False)[0], want)
        states = fused(**given, output_hidden_states=True).hidden_states
        # MPNet asked for no ModelOutput gets a tuple from its stack, too.
        assert counted == ([] if family == "mpnet" else [2])
        assert len(states) == 3
        assert torch.equal(states[-1], want)
        fused.config.output_hidden_states = True
        assert len(fused(**given).hidden_states) == 3
        embedded = fused.get_input_embeddings()(given["input_ids"])
        rest = {name: value for name, value in given.items() if name != "input_ids"}
        fused.config.output_hidden_states = False
        counted.clear()
        torch.testing.assert_close(fused(inputs_embeds=embedded, **rest)[0], want)
        # The hooks by which transformers records hidden states stay on the layers; MPNet has none.
        assert counted == ([2] if family == "mpnet" else [])


@pytest.mark.parametrize("family", BERT_LIKE)
def test_the_models_own_call_returns_what_the_plain_one_does(family, counted):
    plain, given = tiny(family), inputs()
    fused = fused_copy(plain)
    T = given["input_ids"].shape[1]
    places = {"position_ids": torch.arange(T).flip(0)[None] + 2}
    kinds = {"token_type_ids": torch.zeros_like(given["input_ids"])}
    with torch.inference_mode():
        for more in ({}, places, kinds, {"return_dict": True}, {"output_attentions": False}):
            want, got = plain(**given, **more), fused(**given, **more)
            assert type(got) is type(want)
            assert list(got) == list(want)
            torch.testing.assert_close(got[0][0], want[0][0])
        assert counted == [2] * 5
        positional = fused(given["input_ids"], given["attention_mask"])
        assert torch.equal(positional[0], fused(**given)[0])
        with pytest.raises(ValueError, match="input_ids"):
            fused(attention_mask=given["attention_mask"])
        with pytest.raises(RuntimeError, match="unfuse_"):
            fused(**given, output_attentions=True)


def test_a_model_of_which_only_some_layers_are_fused(counted):
    plain, given = tiny("bert"), inputs()
    layer_of(plain, 1).attention.self.register_forward_hook(lambda *_: None)  # is not fused
    fused = fused_copy(plain)
    assert len(slimkern.fused_blocks(fused).blocks) == 1
    kept = given["attention_mask"].bool()
    want, got = hidden(plain, given), hidden(fused, given)
    torch.testing.assert_close(got[kept], want[kept])
    assert counted == []


def test_a_layer_in_training_mode_is_an_error(counted):
    fused = fused_copy(tiny("bert"))
    layer_of(fused, 1).train()
    with pytest.raises(RuntimeError, match="unfuse_"):
        hidden(fused, inputs())
    assert counted == []


def test_changed_weights_are_noticed(counted):
    fused, given = fused_copy(tiny("bert")), inputs()
    before = hidden(fused, given)
    with torch.no_grad():
        layer_of(fused, 1).output.dense.bias.add_(1.0)
    after = hidden(fused, given)
    assert not torch.equal(before, after)
    assert torch.equal(after, hidden(copy.deepcopy(fused), given))
    assert counted == [2, 2, 2]


def test_a_compiled_model_has_no_break(counted):
    torch._dynamo.reset()
    fused, given = fused_copy(tiny("bert")), inputs()
    want = hidden(fused, given)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(**given)[0], want)
    assert counted == [2]  # the call before


@pytest.mark.parametrize("tokens", [1, 2, 17, 200])
def test_position_biases_are_those_of_the_plain_model(tokens):
    plain = tiny("mpnet")
    stack, own = fused_copy(plain).encoder, plain.encoder
    x = torch.randn(3, tokens, 4)
    for _ in range(2):  # made, and kept
        with torch.no_grad():
            got, want = stack.compute_position_bias(x), own.compute_position_bias(x)
        assert torch.equal(got.expand_as(want), want)
    with torch.inference_mode():
        stack.compute_position_bias(x[:, :1])
    with torch.no_grad():
        own.relative_attention_bias.weight.mul_(2)
        stack.relative_attention_bias.weight.mul_(2)
        assert torch.equal(stack.compute_position_bias(x)[0], own.compute_position_bias(x)[0])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mpnet"])
def test_tensors_that_layers_do_not_know_are_passed_over(family, counted):
    plain, given = tiny(family), inputs()
    fused, kept = fused_copy(plain), given["attention_mask"].bool()
    want = hidden(plain, given)
    for name in ("labels", "special_tokens_mask"):  # a batch of a dataset, passed on whole
        got = hidden(fused, {**given, name: given["input_ids"]})
        torch.testing.assert_close(got[kept], want[kept])
    assert counted == []
    with pytest.raises(RuntimeError, match=r"no cu_seq_lens_q .*unfuse_"):
        hidden(fused, {**given, "cu_seq_lens_q": torch.tensor([0, 9])})
    # The stack is given it by transformers 5.0; it numbers what a cache would hold.
    stack = next(m for m in fused.modules() if isinstance(m, fused_text._Stack))
    x = torch.randn(2, 5, fused.config.hidden_size)
    with torch.inference_mode():
        at_once = stack(x, cache_position=torch.arange(5)).last_hidden_state
        assert torch.equal(at_once, stack(x).last_hidden_state)
    assert counted == [2, 2]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_holds_the_layers_and_the_mask(family, counted):
    plain = tiny(family)
    plain.config.return_dict = False
    fused, given, whole = fused_copy(plain), inputs(), inputs(False)
    assert not given["attention_mask"].all()
    with torch.inference_mode():
        traced = torch.jit.trace(fused, tuple(whole.values()), strict=False, check_trace=False)
        got, want = traced(*given.values())[0], plain(**given)[0]
    kept = given["attention_mask"].bool()
    torch.testing.assert_close(got[kept], want[kept])
    assert counted == []


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForMaskedLM"])
def test_a_model_with_a_pooler_or_without_leaves_out_what_surrounds_layers(
    family, task, counted, monkeypatch
):
    fused, given, made = fused_copy(tiny(family, task=task)), inputs(), []
    masks = fused_text.BertModel._create_attention_masks

    def count(self, *args, **kwargs):
        made.append(self)
        return masks(self, *args, **kwargs)

    monkeypatch.setattr(fused_text.BertModel, "_create_attention_masks", count)
    at_once = hidden(fused, given)
    assert made == []
    with one_by_one(fused):
        assert torch.equal(hidden(fused, given), at_once)
    assert made == [fused.base_model]
    assert counted == [2]


def test_embeddings_are_called_as_by_the_plain_model(counted):
    plain, given = tiny("bert"), inputs()
    seen = []
    for model in (plain, fused_copy(plain)):
        model.embeddings.register_forward_pre_hook(
            lambda module, args, named: seen.append((args, named)), with_kwargs=True
        )
        hidden(model, given)
    (args, named), (fused_args, fused_named) = seen
    assert args == fused_args == ()
    assert list(named) == list(fused_named)
    assert all(named[name] is fused_named[name] for name in named)
    assert counted == [2]


def test_a_stack_in_training_mode_is_an_error(counted):
    fused = fused_copy(tiny("bert"))
    fused.encoder.training = True
    with pytest.raises(RuntimeError, match="unfuse_"):
        hidden(fused, inputs())
    assert counted == []
