"""Embeddings in one pass: the op, and the modules that ``fuse_`` puts in place."""

from __future__ import annotations

import copy
import json

import pytest
import tiny_models
import torch
from fuse_cases import FAMILIES, assert_as_exact, inputs, layer_of, tiny

import slimkern
from slimkern.accuracy import relative_error
from slimkern.nn.fused import FusedModule
from slimkern.ops import NormWeights, embeddings

TEXT = [family for family in FAMILIES if family != "gpt2"]


@pytest.fixture(params=slimkern.cpu.available_isas())
def isa(request):
    before = slimkern.cpu.isa()
    slimkern.cpu.set_isa(request.param)
    yield request.param
    slimkern.cpu.set_isa(before)


def tables(hidden, dtype=torch.float32, vocabulary=50, places=140):
    random = torch.Generator().manual_seed(hidden)
    draw = [torch.randn(n, hidden, generator=random) for n in (vocabulary, places, 3)]
    words, positions, types = (t.to(dtype) for t in draw)
    weight, bias = (torch.randn(hidden, generator=random) for _ in range(2))
    return words, positions, types, NormWeights(weight.to(dtype), bias.to(dtype), 1e-12)


def wide(t):
    return None if t is None else t.double()


def exact(ids, words, positions, norm, types=None, **index):
    wide_norm = NormWeights(wide(norm.weight), wide(norm.bias), norm.eps)
    words, positions, types = words.double(), positions.double(), wide(types)
    total = words[ids]
    if types is not None:
        kinds = index.get("type_ids")
        total = total + (types[0] if kinds is None else types[kinds])
    places = index.get("position_ids")
    total = total + positions[torch.arange(ids.shape[1]) if places is None else places]
    size = (total.shape[-1],)
    return torch.layer_norm(total, size, wide_norm.weight, wide_norm.bias, norm.eps)


@pytest.mark.parametrize("hidden", [1, 17, 63, 130, 384])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 17), (2, 63), (1, 130)])
def test_every_isa_size_and_dtype(isa, hidden, B, T):
    ids = torch.randint(50, (B, T), generator=torch.Generator().manual_seed(T))
    for dtype in (torch.float32, torch.bfloat16):
        words, positions, types, norm = tables(hidden, dtype)
        y = embeddings(ids, words, positions, norm, types=types)
        assert y.dtype == dtype
        assert y.shape == (B, T, hidden)
        # Sums of 2 hidden numbers in float32, and the result rounded once.
        bound = 2 * hidden * 2.0**-24 + torch.finfo(dtype).eps
        want = exact(ids, words, positions, norm, types)
        if hidden > 1:  # the norm of one number is its bias, whatever it is
            assert relative_error(y, want) <= bound


def test_every_index_that_is_given_is_used():
    words, positions, types, norm = tables(39)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (3, 9), generator=random)
    for shape in ((3, 9), (1, 9)):
        kinds = torch.randint(3, shape, generator=random)
        places = torch.randint(140, (9, shape[0]), generator=random).T  # any strides
        index = {"type_ids": kinds, "position_ids": places}
        for given in (None, types):
            own = index if given is not None else {"position_ids": places}
            y = embeddings(ids, words, positions, norm, types=given, **own)
            assert relative_error(y, exact(ids, words, positions, norm, given, **own)) <= 1e-5
            again = embeddings(ids, words, positions, norm, types=given, **own, backend="reference")
            torch.testing.assert_close(y, again)
    assert embeddings(ids[:0], words, positions, norm).shape == (0, 9, 39)
    assert embeddings(ids[:, :0], words, positions, norm).shape == (3, 0, 39)


def test_rows_of_a_larger_table_and_any_number_of_threads():
    big = torch.randn(100, 80)
    _, positions, _, norm = tables(39)
    words, ids = big[::2, :39], torch.arange(50).repeat(3, 2)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(embeddings(ids, words, positions, norm))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(found[0], embeddings(ids, words.contiguous(), positions, norm))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.tensor([[0, 50]])}, IndexError, "index 50 at token 1 of sequence 0"),
        ({"ids": torch.tensor([[-1]])}, IndexError, "index -1"),
        ({"ids": torch.zeros(1, 141, dtype=torch.int64)}, IndexError, "index 140 at token 140"),
        ({"type_ids": torch.tensor([[3, 0]])}, IndexError, "table 1, which has 3"),
        ({"position_ids": torch.tensor([[0, 140]])}, IndexError, "table 2, which has 140"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"ids has shape \(3,\)"),
        ({"ids": torch.zeros(1, 2)}, TypeError, "ids has dtype torch.float32"),
        ({"type_ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "type_ids has shape"),
        ({"types": torch.zeros(3, 8)}, ValueError, "types has shape"),
        ({"positions": torch.zeros(140, 39).double()}, TypeError, "positions has dtype"),
        ({"words": torch.zeros(39, 50).T}, ValueError, "words has shape"),
        ({"types": torch.zeros(3, 39, device="meta")}, ValueError, "on several devices"),
        ({"norm": NormWeights(torch.ones(39))}, ValueError, "norm is no LayerNorm"),
        ({"norm": NormWeights(torch.ones(8), torch.ones(8))}, ValueError, "norm.weight has"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    words, positions, types, norm = tables(39)
    given = {"ids": torch.zeros(1, 2, dtype=torch.int64), "words": words, "norm": norm}
    given |= {"positions": positions, "types": types}
    with pytest.raises(error, match=message):
        embeddings(**{**given, **change})


def test_a_gradient_names_unfuse():
    words, positions, _, norm = tables(39)
    with pytest.raises(RuntimeError, match=r"slimkern\.unfuse_"):
        embeddings(torch.zeros(1, 2, dtype=torch.int64), words.requires_grad_(), positions, norm)


def test_opcheck():
    words, positions, types, norm = tables(17)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    arguments = (ids, words, types, None, positions, None, norm.weight, norm.bias, 1e-5, "cpu")
    torch.library.opcheck(torch.ops.slimkern.embeddings, arguments)


def plain_and_fused(family, dtype=torch.float32):
    plain = tiny(family, "dense", dtype).eval()
    return plain, slimkern.fuse_(copy.deepcopy(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TEXT)
@torch.no_grad()
def test_embeddings_of_every_family(family, dtype):
    plain, fused = plain_and_fused(family, dtype)
    assert isinstance(fused.embeddings, FusedModule)
    given = inputs()
    want = plain.embeddings(given["input_ids"])
    hidden = want.shape[-1]
    units = 2 * hidden + 6 if dtype == torch.float32 else 8
    off = relative_error(fused.embeddings(given["input_ids"]), want.double())
    assert off <= units * torch.finfo(dtype).eps
    states = fused(**given, output_hidden_states=True).hidden_states
    if not hasattr(fused, "embeddings_project"):
        assert torch.equal(states[0], fused.embeddings(given["input_ids"]))
    ready = plain.embeddings.word_embeddings(given["input_ids"])
    by_vectors = fused(inputs_embeds=ready, attention_mask=given["attention_mask"])[0]
    assert by_vectors.shape == fused(**given)[0].shape
    slimkern.unfuse_(fused)
    assert torch.equal(fused.embeddings(given["input_ids"]), want)


@pytest.mark.parametrize("family", ["bert", "electra", "roberta", "xlm-roberta"])
@torch.no_grad()
def test_the_mask_of_tokens_goes_straight_to_fused_layers(family):
    plain, fused = plain_and_fused(family)
    for given in (inputs(), inputs(padded=False)):
        assert_as_exact(fused, plain, given, "fp32")
    ids = inputs()["input_ids"]
    everything = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(fused(ids)[0], fused(**everything)[0])
    slimkern.unfuse_(layer_of(fused))  # a plain layer needs the mask of four dimensions
    assert_as_exact(fused, plain, inputs(), "fp32")


def test_the_name_of_the_class_in_a_configuration_is_the_plain_one(tmp_path):
    _, fused = plain_and_fused("bert")
    fused.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertModel"]
    assert type(copy.deepcopy(fused)) is type(fused)


def spoil_max_norm(model):
    model.embeddings.word_embeddings.max_norm = 1.0


def spoil_types(model):
    model.embeddings.token_type_ids.fill_(1)


def spoil_parts(model):
    model.embeddings.further = torch.nn.Linear(2, 2)


def spoil_hook(model):
    model.embeddings.LayerNorm.register_forward_hook(lambda *a: None)


def spoil_forward(model):
    model.embeddings.forward = model.embeddings.forward


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_max_norm, "max_norm"),
        (spoil_types, "token_type_ids are not zeros"),
        (spoil_parts, "parts that are not known"),
        (spoil_hook, "LayerNorm has a forward hook"),
        (spoil_forward, "was replaced on the object"),
    ],
)
def test_embeddings_that_are_not_as_expected_stay(spoil, reason):
    model = tiny_models.FAMILIES["bert"]().eval()
    spoil(model)
    slimkern.fuse_(model)
    assert not isinstance(model.embeddings, FusedModule)
    told = [r.reason for r in slimkern.fused_blocks(model).refused if r.name == "embeddings"]
    assert len(told) == 1
    assert reason in told[0]


def test_embeddings_that_compute_something_else_stay(monkeypatch):
    model = tiny_models.FAMILIES["bert"]().eval()
    plain = type(model.embeddings).forward
    monkeypatch.setattr(type(model.embeddings), "forward", lambda self, ids: 1.1 * plain(self, ids))
    slimkern.fuse_(model)
    assert not isinstance(model.embeddings, FusedModule)
    assert "differs by" in str(slimkern.fused_blocks(model))


def test_training_mode_names_unfuse():
    model = slimkern.fuse_(tiny_models.FAMILIES["bert"]().eval()).train()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"slimkern\.unfuse_"):
        model.embeddings(torch.zeros(1, 2, dtype=torch.int64))
