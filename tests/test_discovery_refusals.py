"""What discovery must refuse, with which reason, and what it must not disturb."""

from __future__ import annotations

import copy
import math

import pytest
import tiny_models as tm
import torch
import torch.nn.functional as F
from exactness import assert_deletion_is_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimkern.discovery import discover

X = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WIDTH = 24


def between(middle, **children):
    """A model ``second(middle(first(x)))`` in fp64 with random weights."""
    return tm.randomize(tm.Between(middle, **children).double())


def scale(*shape):
    return nn.Parameter(torch.ones(*shape))


def assert_exact(model, x=X):
    found = discover(model, x)
    assert [g.name for g in found] == ["second"], str(found)
    with torch.no_grad():
        assert_deletion_is_exact(model, found, lambda m: m(x))
    return found


EXACT = {
    "gelu": (lambda s, h, x: F.gelu(h), {}),
    "tanh gelu": (lambda s, h, x: F.gelu(h, approximate="tanh"), {}),
    "spelled-out gelu": (
        lambda s, h, x: (
            0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3))))
        ),
        {},
    ),
    "relu6": (lambda s, h, x: F.relu6(h), {}),
    "leaky relu": (lambda s, h, x: F.leaky_relu(h, 0.2), {}),
    "elu": (lambda s, h, x: F.elu(h), {}),
    "celu": (lambda s, h, x: F.celu(h), {}),
    "mish": (lambda s, h, x: F.mish(h), {}),
    "softplus": (lambda s, h, x: F.softplus(h), {}),
    "hardswish": (lambda s, h, x: F.hardswish(h), {}),
    "log sigmoid": (lambda s, h, x: F.logsigmoid(h), {}),
    "softsign": (lambda s, h, x: F.softsign(h), {}),
    "squared": (lambda s, h, x: h * h, {}),
    "in place": (lambda s, h, x: h.mul_(2).relu_(), {}),
    "where": (lambda s, h, x: torch.where(h > 0, h, h.exp() - 1), {}),
    "masked fill": (lambda s, h, x: h.masked_fill(h < 0, 0.1), {}),
    "dropout": (lambda s, h, x: s.d(h), {"d": nn.Dropout(0.5)}),
    "shared prelu": (lambda s, h, x: s.p(h), {"p": nn.PReLU()}),
    "over other dimensions": (lambda s, h, x: h.softmax(1) + h.mean(1, keepdim=True), {}),
    "there and back": (
        lambda s, h, x: h.permute(2, 0, 1).unsqueeze(1).tanh().squeeze(1).movedim(0, -1),
        {},
    ),
    "flattened batch": (lambda s, h, x: h.reshape(15, -1).tanh().reshape(3, 5, -1), {}),
    "padded tokens": (lambda s, h, x: F.pad(h, (0, 0, 1, 2))[:, 1:6], {}),
    "repeated batch": (lambda s, h, x: h.repeat(2, 1, 1)[:3], {}),
    "masked tokens": (lambda s, h, x: h[x.sum(-1) > -99].view(3, 5, -1), {}),
    "chosen tokens": (lambda s, h, x: h[torch.arange(3)], {}),
    "top tokens": (lambda s, h, x: h.topk(5, dim=1).values, {}),
    "one scale for all": (lambda s, h, x: h * s.g, {"g": scale(1)}),
    "scale per token": (lambda s, h, x: h * x.mean(-1, keepdim=True), {}),
    "other dtype": (lambda s, h, x: h.float().tanh().double(), {}),
    "scale per channel": (lambda s, h, x: h * s.g + s.b, {"g": scale(WIDTH), "b": scale(WIDTH)}),
    "second branch": (lambda s, h, x: h + s.k(x), {"k": nn.Linear(10, WIDTH)}),
    "gate": (lambda s, h, x: F.silu(h) * s.k(x), {"k": nn.Linear(10, WIDTH, bias=False)}),
    "gate per block": (lambda s, h, x: h * s.k(x)[:, :1], {"k": nn.Linear(10, WIDTH)}),
    "embedded scale": (
        lambda s, h, x: h * s.e(torch.arange(5)),
        {"e": nn.Embedding(7, WIDTH)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_entry_by_entry_operations_are_exact(name):
    middle, children = EXACT[name]
    assert_exact(between(middle, **children))


def test_per_channel_parameters_are_cut():
    found = assert_exact(between(*EXACT["scale per channel"][:1], **EXACT["scale per channel"][1]))
    assert {(b.name, b.dim, b.unit_size) for b in found["second"].between} == {
        ("g", 0, 1),
        ("b", 0, 1),
    }


def test_prelu_per_channel():
    model = between(lambda s, h, x: s.p(h), p=nn.PReLU(WIDTH))
    x = X[:, 0]
    found = assert_exact(model, x)
    assert [b.name for b in found["second"].between] == ["p.weight"]


MIXED = {
    "layer norm": (lambda s, h, x: s.n(h), {"n": nn.LayerNorm(WIDTH)}, "'layer_norm' in 'n'"),
    "batch norm": (
        lambda s, h, x: s.n(h.mT).mT, {"n": nn.BatchNorm1d(WIDTH)}, "'batch_norm' in 'n'",
    ),
    "softmax": (lambda s, h, x: h.softmax(-1), {}, "'softmax'"),
    "sum": (lambda s, h, x: h + h.sum(-1, keepdim=True), {}, "'sum'"),
    "norm": (lambda s, h, x: F.normalize(h, dim=-1), {}, "norm"),
    "cumsum": (lambda s, h, x: h.cumsum(-1), {}, "'cumsum'"),
    "sort": (lambda s, h, x: h.sort(-1).values, {}, "'sort'"),
    "flip": (lambda s, h, x: h.flip(-1), {}, "'flip'"),
    "roll": (lambda s, h, x: h.roll(1, -1), {}, "'roll'"),
    "triu": (lambda s, h, x: torch.triu(h), {}, "'triu'"),
    "cat": (lambda s, h, x: torch.cat([h, h], -1), {"second": 48}, "'cat'"),
    "chunks": (
        lambda s, h, x: h.chunk(2, -1)[0] * h.chunk(2, -1)[1], {"second": 12}, "takes a part",
    ),
    "glu": (lambda s, h, x: F.glu(h), {"second": 12}, "'glu'"),
    "part": (lambda s, h, x: h[..., :12], {"second": 12}, "takes a part"),
    "permuted": (
        lambda s, h, x: h.unflatten(-1, (4, 6)).mT.flatten(-2), {}, "not in the same order",
    ),
    "padded": (lambda s, h, x: F.pad(h, (1, -1)), {}, "'constant_pad_nd'"),
    "repeated": (lambda s, h, x: h.repeat(1, 1, 2), {"second": 48}, "'repeat'"),
    "largest": (lambda s, h, x: h.topk(24, -1).values, {}, "'topk'"),
    "masked": (lambda s, h, x: h[h.abs() > -1].view(3, 5, -1), {}, "'index'"),
    "indexed": (lambda s, h, x: h[..., torch.arange(WIDTH)], {}, "'index'"),
    "convolution": (lambda s, h, x: s.c(h.mT).mT, {"c": nn.Conv1d(24, 24, 1)}, "'convolution'"),
    "recurrent": (lambda s, h, x: s.c(h)[0], {"c": nn.LSTM(24, 24, batch_first=True)}, "(LSTM)"),
    "buffer": (lambda s, h, x: h * s.g, {"g": torch.ones(WIDTH)}, "'g', which can't be cut"),
    "constant": (lambda s, h, x: h * torch.arange(24.0), {}, "a constant, which can't be cut"),
    "misused scale": (lambda s, h, x: h * s.g + s.g.sum(), {"g": scale(24)}, "'sum'"),
    "flipped scale": (lambda s, h, x: h * s.g.flip(0), {"g": scale(24)}, "'flip'"),
    "random": (lambda s, h, x: h * torch.rand_like(h), {}, "'rand_like'"),
    "written into": (
        lambda s, h, x: torch.zeros(3, 5, 48, dtype=h.dtype).index_copy(2, torch.arange(24), h),
        {"second": 48},
        "'index_copy'",
    ),
    "written in place": (lambda s, h, x: (h[..., :3].zero_(), h)[1], {}, "takes a part"),
    "branch on data": (lambda s, h, x: h if h.sum() > 0 else h + 1, {}, "'sum'"),
    "channel as number": (lambda s, h, x: h * h.amax((0, 1))[0].item(), {}, "takes a part"),
    "matrix": (lambda s, h, x: h @ s.m, {"m": scale(24, 24)}, "'m' multiplies them"),
    "one head": (lambda s, h, x: (x @ x.mT).softmax(-1) @ h, {}, "a single head"),
    "residual": (lambda s, h, x: F.relu(h + s.r(x)), {"r": nn.Conv1d(5, 5, 15)}, "residual"),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in MIXED if n != "residual"])
def test_what_cannot_be_cut_is_refused_with_the_place(name):
    middle, children, reason = MIXED[name]
    model = between(middle, **children)
    found = discover(model, X)
    assert not found.groups
    assert reason in {r.name: r.reason for r in found.refused}["second"]


def test_the_operation_depends_on_the_width():
    for middle in (
        lambda s, h, x: h / h.shape[-1],
        lambda s, h, x: h / math.sqrt(h.shape[-1]),
        lambda s, h, x: h + torch.full((), h.shape[-1], dtype=h.dtype),
        lambda s, h, x: h * torch.tensor(1.0 / h.shape[-1]),
        lambda s, h, x: h.view(3, 5, WIDTH),
        lambda s, h, x: h.view(3, 5, 4, -1).tanh().flatten(2),
        lambda s, h, x: h if h.shape[-1] == WIDTH else h + 1,
    ):
        found = discover(between(middle), X)
        assert not found.groups
        assert [r.name for r in found.refused] == ["second"]
        assert "units" in found.refused[0].reason


def test_residual_into_the_middle():
    model = between(lambda s, h, x: F.relu(h + x), hidden=WIDTH)
    found = discover(model, torch.zeros(3, 5, WIDTH))
    assert not found.groups
    assert "a residual is added" in found.refused[0].reason


def test_gated_residual_is_not_taken_for_a_stream():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.first, self.second = (nn.Linear(8, 8) for _ in range(3))
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            x = self.norm(x + self.inner(x))
            return x + self.second(torch.sigmoid(self.first(x)) * x)

    found = discover(Block(), torch.zeros(2, 3, 8))
    assert not found.groups
    assert [r.name for r in found.refused] == ["second"]


def test_second_consumers():
    model = between(lambda s, h, x: h * s.k(h).mean(), k=nn.Linear(WIDTH, 3))
    found = discover(model, X)
    reasons = {r.name: r.reason for r in found.refused}
    assert not found.groups
    assert set(reasons) == {"second", "k"}
    assert all("consumed by 'k', 'second'" in r for r in reasons.values())


def test_an_output_of_the_model():
    class Shows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            h = self.a(x).relu()
            return {"y": self.b(h), "extra": [h]}

    found = discover(Shows(), torch.zeros(2, 4))
    assert not found.groups
    assert "an output of the model" in found.refused[0].reason


def test_linears_that_are_not_plain():
    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    model = between(lambda s, h, x: s.o(F.relu(h)), o=Own(WIDTH, WIDTH))
    reasons = {r.name: r.reason for r in discover(model, X).refused}
    assert "Own is not supported" in reasons["o"]
    assert "second" in reasons or not discover(model, X).groups

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    model = between(lambda s, h, x: s.o(F.relu(h)), o=normed)
    found = discover(model, X)
    assert not found.groups
    assert "parametrization" in {r.name: r.reason for r in found.refused}["o"]


def test_tied_functional_repeated_and_idle_linears():
    tied = between(lambda s, h, x: F.relu(h) + 0 * s.t(x).sum(), t=nn.Linear(10, WIDTH))
    tied.t.weight = tied.first.weight
    found = discover(tied, X)
    assert "tied to 't.weight'" in {r.name: r.reason for r in found.refused}["second"]

    used = between(lambda s, h, x: F.relu(h) + F.linear(x, s.first.weight))
    found = discover(used, X)
    reasons = {r.name: r.reason for r in found.refused}
    assert "used outside it" in reasons["first"]
    assert "second" in reasons

    twice = between(lambda s, h, x: F.relu(h) + s.first(x))
    reasons = {r.name: r.reason for r in discover(twice, X).refused}
    assert "several times" in reasons["first"]
    assert "several times" in reasons["second"]

    idle = between(lambda s, h, x: F.relu(h), i=nn.Linear(3, 4))
    found = discover(idle, X)
    assert [g.name for g in found] == ["second"]
    assert {r.name: r.reason for r in found.refused} == {"i": "not called by the example inputs"}


def test_conv1d_of_gpt2_is_refused_by_name():
    found = discover(tm.OTHERS["gpt2"]("LMHeadModel"))
    assert not found.groups
    assert len(found.refused) == 4 * tm.LAYERS
    assert all("Conv1D is not supported" in r.reason for r in found.refused)


def test_shared_layers_of_albert_are_refused():
    found = discover(tm.OTHERS["albert"]("ForSequenceClassification"))
    assert [g.name for g in found if not g.is_head] == []
    assert len([r for r in found.refused if "several times" in r.reason]) == 6


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


def test_a_matrix_that_is_no_linear_still_ends_the_head():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.tail = tm.mlp(4, 6, 5), nn.Parameter(torch.ones(5, 3))

        def forward(self, x):
            return self.body(x) @ self.tail

    (group,) = discover(Tail(), torch.zeros(2, 4)).groups
    assert (group.name, group.is_head) == ("body.2", False)


def test_keyword_calls_complex_constants_and_scripted_parts():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
            self.script = torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.ReLU()))

        def forward(self, x):
            h = self.a(input=x) * torch.tensor(1j) * 2j
            return self.b(input=h.abs()), self.script(x)

    found = discover(Odd(), torch.zeros(2, 4))
    assert [g.name for g in found] == ["b"]
    assert "script.0" in {r.name for r in found.refused}


def test_torch_encoder_is_read_as_far_as_it_goes():
    layer = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True)
    found = discover(nn.TransformerEncoder(layer, 2), torch.zeros(2, 3, 8))
    assert [g.name for g in found] == ["layers.0.linear2", "layers.1.linear2"]
    refused = {r.name for r in found.refused}
    assert {"layers.0.self_attn", "layers.0.self_attn.out_proj"} <= refused


def test_consumer_that_is_producer_of_the_next():
    found = discover(tm.mlp(5, 6, 7, 8), torch.zeros(2, 5))
    assert [(g.name, g.producers[0].name, g.num_units, g.is_head) for g in found] == [
        ("2", "0", 6, False),
        ("4", "2", 7, True),
    ]


# ----------------------------------------------------------- any chain of operations is handled

POOL = {
    "relu": lambda s, h, x: h.relu(),
    "tanh": lambda s, h, x: h.tanh(),
    "square": lambda s, h, x: h * h,
    "scale": lambda s, h, x: h * s.g,
    "gate": lambda s, h, x: h * s.k(x).sigmoid(),
    "token": lambda s, h, x: h + x.mean(-1, keepdim=True),
    "blocks": lambda s, h, x: h.unflatten(-1, (-1, 6)).tanh().flatten(-2),
    "block softmax": lambda s, h, x: h.unflatten(-1, (-1, 6)).softmax(-1).flatten(-2),
    "block mix": lambda s, h, x: h.unflatten(-1, (-1, 6)).softmax(-2).flatten(-2),
    "over tokens": lambda s, h, x: h.softmax(1) + h.mean(1, keepdim=True),
    "swap": lambda s, h, x: h.transpose(0, 1).flip(0).transpose(0, 1),
    "in place": lambda s, h, x: h.clone().mul_(0.5).add_(h),
    "split": lambda s, h, x: torch.cat(h.split(12, -1)[::-1], -1),
    "stack": lambda s, h, x: torch.stack([h, h.exp().log()], 0).sum(0),
    "norm": lambda s, h, x: F.layer_norm(h, h.shape[-1:]),
    "shift": lambda s, h, x: h.roll(2, -1),
    "max": lambda s, h, x: h - h.amax(-1, keepdim=True),
    "constant": lambda s, h, x: h * torch.linspace(0, 1, h.shape[-1], dtype=h.dtype),
    "transpose": lambda s, h, x: h.unflatten(-1, (-1, 6)).mT.flatten(-2),
    "expand": lambda s, h, x: h.unsqueeze(0).expand(2, -1, -1, -1).sum(0),
    "attend": lambda s, h, x: (x @ x.mT).softmax(-1) @ h,
    "gram": lambda s, h, x: (h @ h.mT).softmax(-1) @ h,
    "outer": lambda s, h, x: (h.unsqueeze(-1) * h.unsqueeze(-2)).sum(-1),
    "diagonal": lambda s, h, x: torch.diag_embed(h).diagonal(dim1=-2, dim2=-1),
    "width": lambda s, h, x: h * h.shape[-1] ** -0.5,
}  # fmt: skip
KEEPS = ["relu", "tanh", "square", "scale", "gate", "token", "over tokens", "swap", "in place"]


def chain(names):
    def middle(s, h, x):
        for name in names:
            h = POOL[name](s, h, x)
        return h

    return between(middle, g=scale(WIDTH), k=nn.Linear(10, WIDTH)), names


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(POOL)), min_size=1, max_size=4, unique=True))
def test_any_chain_is_found_exact_or_refused(names):
    model, _ = chain(names)
    found = discover(model, X)
    if found.groups:
        assert_exact(model)
    else:
        assert "second" in {r.name for r in found.refused}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(KEEPS), min_size=1, max_size=5, unique=True))
def test_chains_that_keep_channels_apart_are_found(names):
    assert_exact(chain(names)[0])


# ----------------------------------------------------------------- inputs, and leaving no trace


def test_inputs_in_every_form():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x, y=None):
            return self.b(self.a(x).relu())

    x, model = torch.zeros(2, 4), Two()
    expected = discover(model, x)
    for given_inputs in ((x,), [x], {"x": x}, (x, x), (x, x, torch.zeros(2)), {"x": x.double()}):
        assert discover(model, given_inputs) == expected
    with pytest.raises(ValueError, match=r"example_inputs.*int"):
        discover(model, 3)
    with pytest.raises(ValueError, match="example_inputs: needed for Two"):
        discover(model)


def test_a_batch_with_labels_for_a_hugging_face_model():
    model = tm.FAMILIES["bert"]("ForSequenceClassification")
    before = model.config.to_dict()
    batch = {**tm.text_inputs(), "labels": torch.tensor([0, 1, 0])}
    assert discover(model, batch) == discover(model)
    assert model.config.to_dict() == before


def test_a_branch_on_data_is_followed_on_real_tensors():
    model = between(lambda s, h, x: F.relu(h) if x.sum() > -1e9 else h.flip(-1))
    assert [g.name for g in discover(model, X)] == ["second"]
    model = between(lambda s, h, x: F.relu(h) if x.sum() < -1e9 else h.flip(-1))
    assert not discover(model, X).groups


class Busy(nn.Module):
    """Counts its calls, keeps what it saw, writes into a buffer and registers another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(4, 6), nn.Linear(6, 4), 0
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        self.cache = x
        self.seen += x.sum(0)
        self.register_buffer("late", x.clone())
        assert not self.training
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = Busy().train()
    model.b.eval()
    events = []
    model.a.register_forward_hook(lambda *_: events.append(1))
    keys = {m: list(m.__dict__) for m in model.modules()}
    weights = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    identities = {n: id(p) for n, p in model.named_parameters()}
    if fails:
        with pytest.raises(RuntimeError):
            discover(model, torch.zeros(2, 5))
    else:
        assert len(discover(model, torch.ones(2, 4)).groups) == 1
    assert {m: list(m.__dict__) for m in model.modules()} == keys
    assert model.calls == 0
    assert [m.training for m in (model, model.a, model.b)] == [True, True, False]
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert model.a(torch.zeros(2, 4)).shape == (2, 6)


def test_hooks_that_change_the_computation_are_seen():
    model = between(lambda s, h, x: F.relu(h))
    assert len(discover(model, X).groups) == 1
    model.first.register_forward_hook(lambda m, i, out: out.flip(-1))
    found = discover(model, X)
    assert not found.groups
    assert "'flip'" in found.refused[0].reason
