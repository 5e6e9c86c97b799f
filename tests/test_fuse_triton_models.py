"""``fuse_`` on Triton kernels: whole models on a GPU; interpreted, one tiny model of each kind."""

from __future__ import annotations

import copy
import importlib

import pytest
import tiny_models
import torch
from fuse_cases import FAMILIES, inputs, layer_of, tiny
from fused_cases import Shape, make_weights
from torch import nn

import slimkern
from slimkern import accuracy
from slimkern.nn import FusedModule
from slimkern.nn.fused_text import added_to_scores

pytest.importorskip("transformers")
pytest.importorskip("triton", reason="Triton is not installed on this platform")

from triton_cases import DEVICES, GPU, INTERPRETED, moved

from slimkern.ops import _registry
from slimkern.ops._packed import PACKED_BACKENDS
from slimkern.ops.embeddings.api import BACKENDS as EMBEDDINGS

KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
on_gpu = pytest.mark.skipif(not GPU or INTERPRETED, reason="no GPU, or interpreted")


@pytest.fixture
def device(request, monkeypatch):
    """The device, on which everything that is fused runs on Triton."""
    if request.param == "cpu":
        for backends in (PACKED_BACKENDS, EMBEDDINGS):
            monkeypatch.setitem(backends.default, "cpu", "triton")
    return request.param


everywhere = pytest.mark.parametrize("device", DEVICES, indirect=True)


def at(given, device):
    return {name: value.to(device) for name, value in given.items()}


def run(model, given):
    """The first output where it is attended to, on the CPU."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        y = model(**at(given, device))[0].cpu()
    return y[given["attention_mask"].bool()].clone()


def assert_as_exact(fused, plain, given, kind):
    """The fused model's error against float64 is within what plain PyTorch's may be."""
    exact = copy.deepcopy(plain).to("cpu", torch.float64)

    def call():
        with torch.no_grad():
            return exact(**given)[0][given["attention_mask"].bool()]

    want = call()
    got = run(fused, given)
    assert got.dtype == next(plain.parameters()).dtype
    assert accuracy.relative_error(got, want) <= accuracy.rounding_bound(call, want, kind) < 0.2


def fused_copy(model, device, precision="highest"):
    return slimkern.fuse_(copy.deepcopy(model).to(device), precision=precision)


@everywhere
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_fused_model_computes_what_the_plain_one_does(family, device):
    plain = tiny(family, "uneven")
    fused = fused_copy(plain, device)
    found = slimkern.fused_blocks(fused)
    assert [b.kind for b in found] == ["encoder_layer"] * 2
    assert found.refused == ()
    assert layer_of(fused).packs.packed.backend == "triton"
    for padded in (False, True):
        given = inputs(padded)
        assert_as_exact(fused, plain, given, "fp32")
    with torch.inference_mode():
        y = fused(**at(given, device))[0].cpu()
    kept = given["attention_mask"].bool()
    assert not y[~kept].any()
    assert y[kept].all()


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layers_take_the_mask_that_a_stack_makes_on_a_gpu(dtype, device):
    """A bool mask and what is added to the scores instead are the same to a layer."""
    keep = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool().to(device)
    x = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    added = added_to_scores(keep[:, None, None, :], x)
    assert added.shape == (3, 1, 1, 5)
    assert added.dtype == dtype
    assert added.stride(0) * added.element_size() % 16 == 0
    weights = make_weights("encoder_layer", Shape(3, 5, hidden=9, head_dim=4, channels=6))
    packed = slimkern.ops.pack_encoder_layer(moved(weights, device, dtype), backend="triton")
    want = slimkern.ops.encoder_layer(x, packed, keep)
    got = slimkern.ops.encoder_layer(x, packed, added[:, 0, 0])
    assert torch.equal(got, want)
    assert got[0, :4].all()
    assert not got[0, 4:].any()
    assert not got[2].any()


class GatedFfn(nn.Module):
    def __init__(self, hidden=33, channels=70):
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate = nn.Linear(hidden, channels, bias=False)
        self.up = nn.Linear(hidden, channels, bias=False)
        self.down = nn.Linear(channels, hidden, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


@everywhere
def test_a_gated_ffn(device):
    plain = nn.Sequential(tiny_models.randomize(GatedFfn()), nn.Tanh())
    fused = fused_copy(plain, device)
    assert [b.kind for b in slimkern.fused_blocks(fused)] == ["ffn"]
    x = torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        want, got = exact(x.double()), fused(x.to(device)).cpu()
    bound = accuracy.rounding_bound(lambda: exact(x.double()), want, "fp32")
    assert accuracy.relative_error(got, want) <= bound
    slimkern.unfuse_(fused)
    assert not any(isinstance(m, FusedModule) for m in fused.modules())


@everywhere
def test_a_changed_parameter_is_packed_again(device):
    plain = nn.Sequential(tiny_models.randomize(GatedFfn()), nn.Tanh())
    fused, x = fused_copy(plain, device), torch.randn(3, 33, device=device)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        first = fused(x)
        assert torch.equal(other(x), first)  # a copy packs on its first call
        fused[0].down.weight.mul_(1.5)
        fused[0].norm.weight.mul_(0.5)
        changed = fused(x)
        assert not torch.equal(changed, first)
        assert torch.equal(changed, slimkern.fuse_(copy.deepcopy(fused))(x))
        state = {name: value.clone() for name, value in other.state_dict().items()}
        fused.load_state_dict(state)
        assert torch.equal(fused(x), first)


@everywhere
def test_an_index_that_is_no_row_gives_nan(device):
    words, places = torch.randn(7, 9, device=device), torch.randn(5, 9, device=device)
    norm = slimkern.ops.NormWeights(torch.ones(9, device=device), torch.zeros(9, device=device))
    ids = torch.tensor([[0, 7, 6, -1]], device=device)
    y = slimkern.ops.embeddings(ids, words, places, norm, backend="triton").cpu()
    assert y.isnan().all(-1).tolist() == [[False, True, False, True]]
    assert not y[0, ::2].isnan().any()


@everywhere
@pytest.mark.parametrize("hidden", [1, 17, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_embeddings_are_the_references(hidden, dtype, device):
    g = torch.Generator().manual_seed(hidden)
    words, places, types = (torch.randn(n, hidden, generator=g).to(dtype) for n in (50, 40, 3))
    norm = [torch.randn(hidden, generator=g).to(dtype) for _ in range(2)]
    ids = torch.randint(50, (3, 17), generator=g)
    kinds, positions = torch.randint(3, (1, 17), generator=g), torch.randint(40, (17, 3)).T
    for index in ({}, {"type_ids": kinds}, {"type_ids": kinds, "position_ids": positions}):
        given = {name: t.to(device) for name, t in {"types": types, **index}.items()}
        weights = slimkern.ops.NormWeights(*(t.to(device) for t in norm), 1e-12)
        tables = (ids.to(device), words.to(device), places.to(device), weights)
        y = slimkern.ops.embeddings(*tables, **given, backend="triton").cpu()
        wide = slimkern.ops.NormWeights(*(t.double() for t in norm), 1e-12)
        total = words.double()[ids] + types.double()[index.get("type_ids", kinds * 0)]
        total += places.double()[index.get("position_ids", torch.arange(17)[None])]
        want = torch.layer_norm(total, (hidden,), wide.weight, wide.bias, 1e-12)
        assert y.dtype == dtype
        # Sums of 2 hidden numbers in float32, and the result rounded once.
        bound = 2 * hidden * 2.0**-24 + torch.finfo(dtype).eps
        if hidden > 1:  # the norm of one number is its bias, whatever it is
            assert accuracy.relative_error(y, want) <= bound


def test_a_missing_triton_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(importlib, "import_module", missing)
    _registry._implementation.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"package triton is not installed: pip install"):
            _registry._implementation("slimkern.ops.ffn", "triton", "ffn")
    finally:
        _registry._implementation.cache_clear()


def test_other_devices_are_refused():
    with pytest.raises(slimkern.FuseError, match="its weights are on meta; accepted: cpu, cuda"):
        slimkern.fuse_(tiny("bert").to("meta"))


# ---- on a GPU alone ----------------------------------------------------------------------------


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [*KINDS])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_dtypes_on_a_gpu(family, dtype):
    plain = tiny(family, "uneven", dtype)
    fused = fused_copy(plain, "cuda")
    assert [b.kind for b in slimkern.fused_blocks(fused)] == ["encoder_layer"] * 2
    for padded in (False, True):
        given = inputs(padded)
        assert_as_exact(fused, plain, given, KINDS[dtype])
        left = {**given, "attention_mask": given["attention_mask"].flip(1)}
        assert_as_exact(fused, plain, left, KINDS[dtype])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precisions_on_a_gpu(precision):
    plain, given = tiny("bert"), inputs()
    fused = fused_copy(plain, "cuda", precision)
    math = {"highest": "fp32", "high": "tf32", "medium": "bf16"}[precision]
    if torch.version.hip and math == "tf32":
        math = "fp32"
    assert {b.math for b in slimkern.fused_blocks(fused)} == {math}
    kind = {"fp32": "fp32", "tf32": "fp32-high", "bf16": "fp32-medium"}[math]
    assert_as_exact(fused, plain, given, kind)


@pytest.mark.gpu
@on_gpu
def test_moving_copying_and_taking_out():
    plain, given = tiny("bert"), inputs()
    fused = slimkern.fuse_(copy.deepcopy(plain), precision="highest")
    first = run(fused, given)
    there = run(fused.to("cuda"), given)
    torch.testing.assert_close(there, first, rtol=1e-4, atol=1e-4)
    assert layer_of(fused).packs.packed.backend == "triton"
    assert torch.equal(run(copy.deepcopy(fused), given), there)
    assert torch.equal(run(fused.to("cpu"), given), first)
    state = fused.cuda().state_dict()
    assert list(state) == list(plain.state_dict())
    slimkern.unfuse_(fused)
    assert torch.equal(run(fused.to("cpu"), given), run(plain, given))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_a_cuda_graph_of_a_whole_model(family):
    fused = fused_copy(tiny(family, "uneven", torch.float16), "cuda")
    given = at(inputs(), "cuda")
    with torch.inference_mode():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                fused(**given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fused(**given)[0]
        for seed in (1, 2):
            ids = torch.randint(2, 90, given["input_ids"].shape, generator=_seeded(seed))
            given["input_ids"].copy_(ids)
            given["attention_mask"].copy_(given["attention_mask"].flip(0))
            graph.replay()
            want = fused(**given)[0]
            torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.gpu
@on_gpu
def test_torch_compile_on_a_gpu():
    fused = fused_copy(tiny("bert", "uneven"), "cuda")
    given = at(inputs(), "cuda")
    with torch.inference_mode():
        want = fused(**given)[0]
        got = torch.compile(fused, fullgraph=True)(**given)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
