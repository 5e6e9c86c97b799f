"""The products that the ops' Triton kernels are made of, each against the equation in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from triton_cases import (
    DEVICES,
    DTYPE_IDS,
    DTYPES,
    GPU,
    INTERPRETED,
    assert_sum_of_products,
    skip_interpreted_bf16,
)

from slimkern.ops import _gemm, _gemm_configs, _gemm_product, _gemm_weights, _tune
from slimkern.ops.activation.api import ACTIVATIONS
from slimkern.ops.activation.reference import activation_fwd

pytestmark = pytest.mark.usefixtures("poisoned", "route")
SIZES = [(1, 1, 1), (17, 63, 130), (130, 17, 63), (64, 130, 64), (5, 9, 0), (3, 0, 7), (0, 4, 5)]
devices = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)


@pytest.fixture(params=["pointers", "descriptors"])
def route(request, monkeypatch):
    """Every product by both kernels; the second with fewer programs than tiles."""
    wanted = request.param == "descriptors"
    if wanted:
        for module in (_gemm, _gemm_product, _gemm_weights):
            monkeypatch.setattr(module, "processors", lambda tensor: 2)
    capability = 90 if wanted else 0
    if wanted and GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need a GPU of compute capability 9.0")
    monkeypatch.setattr(_gemm_configs, "capability", lambda tensor: capability)
    return request.param


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    """Normal numbers rounded to ``dtype``; rows start on 16-byte boundaries, NaN between them."""
    g = torch.Generator().manual_seed(seed + sum(shape))
    made = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device)
    wide = F.pad(made, (0, 8 - shape[-1] % 8), value=float("nan"))
    return wide[..., : shape[-1]]


def keep(size, kept, device):
    """``kept`` sorted indices of ``size``."""
    g = torch.Generator().manual_seed(size)
    return torch.randperm(size, generator=g)[:kept].sort().values.to(device)


def equation(x, w, bias, activation, residual):
    """In the dtype of its arguments: ``(y, h)``."""
    h = F.linear(x, w, bias)
    y = activation_fwd(h, activation)
    return (y if residual is None else y + residual), h


@devices
@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_product_with_its_epilogue(size, activation, dtype, device):
    skip_interpreted_bf16(dtype, device)
    M, N, K = size
    x, w = normal(M, K, dtype=dtype, device=device), normal(2 * N + 1, K, dtype=dtype)
    w, rows = w.to(device), keep(2 * N + 1, N, device)
    bias = normal(2 * N + 1, dtype=dtype, device=device)
    residual = normal(M, N, dtype=dtype, device=device, seed=3)
    out = _gemm.empty_padded(M, N, x)
    y, h = _gemm.product(
        x, w, bias, rows, activation=activation, keep_input=True, residual=residual, out=out
    )
    assert y is out
    parts = [x, w[rows], bias[rows]]
    want, want_h = equation(*(p.double() for p in parts), activation, residual.double())
    eager, eager_h = equation(*parts, activation, residual)
    large = F.linear(*(p.double().abs() for p in parts))
    assert_sum_of_products(h, want_h, eager_h, large, K + 1)
    # No activation here is steeper than 1.2; two roundings of the sum follow it.
    assert_sum_of_products(y, want, eager, 1.2 * large + residual.abs(), K + 3)


@devices
@pytest.mark.parametrize("number", range(5))
def test_every_configuration(number, route, device, monkeypatch):
    """Several tiles each way, also of the widest, which is finished in two halves."""
    halves = (_gemm_configs.DESCRIPTOR_TILES, _gemm_configs.HALF_TILES)[route == "pointers"]
    monkeypatch.setattr(_gemm_product, "choose_tile", lambda tiles, a, b: halves[number])
    x, w, bias, residual = (
        normal(*shape, dtype=torch.float16, device=device)
        for shape in ((140, 70), (300, 70), (300,), (140, 300))
    )
    out = _gemm.empty_padded(140, 300, x)
    y, h = _gemm.product(x, w, bias, keep_input=True, residual=residual, out=out)
    parts = (x, w, bias)
    want, large = (F.linear(*(f(p.double()) for p in parts)) for f in (torch.clone, torch.abs))
    eager = F.linear(*parts)
    assert_sum_of_products(h, want, eager, large, 71)
    assert_sum_of_products(
        y, want + residual.double(), eager + residual, large + residual.abs(), 73
    )


@devices
@pytest.mark.parametrize("many", [False, True])
def test_a_packed_weight_and_its_whole_bias(many, device):
    """Many tokens in full float32 precision take a transposed copy of the weight."""
    M, R, K = (270 if many else 17), 9, 21
    x, w, bias = (normal(*shape, device=device) for shape in ((M, K), (30, 50), (30,)))
    rows, cols = keep(30, R, device), keep(50, K, device)
    for given, packed in ((_gemm.gathered(w, rows, cols), True), (w[:, :K], False)):
        parts = (x, w[rows][:, cols] if packed else w[rows, :K], bias[rows])
        want, large = (F.linear(*(f(p.double()) for p in parts)) for f in (torch.clone, torch.abs))
        got = _gemm.product(x, given, bias, rows, packed=packed)
        assert_sum_of_products(got, want, F.linear(*parts), large, K + 1)


@devices
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_both_epilogues(activation, device):
    M, N, K = 17, 21, 35
    x = normal(M, K, device=device)
    gate, up = (normal(N, K, device=device, seed=i) / 6 for i in (1, 2))
    b1, b2 = (normal(N, device=device, seed=i) for i in (3, 4))

    def gated(x, gate, up, b1, b2):
        return activation_fwd(F.linear(x, gate, b1), activation) * F.linear(x, up, b2)

    want, eager = gated(*(p.double() for p in (x, gate, up, b1, b2))), gated(x, gate, up, b1, b2)
    size = F.linear(x.abs(), gate.abs(), b1.abs()), F.linear(x.abs(), up.abs(), b2.abs())
    steep = 2.0 * size[0].max() if activation == "squared_relu" else 1.2
    got = _gemm.gated_product(x, gate, up, b1, b2, activation=activation)
    assert_sum_of_products(got, want, eager, 2 * steep * size[0] * size[1], K + 3)
    want, eager = (
        equation(x.to(t), gate.to(t), b1.to(t), activation, None)[0]
        for t in (torch.float64, torch.float32)
    )
    got = _gemm.product(x, gate, b1, activation=activation)
    assert_sum_of_products(got, want, eager, steep * size[0], K + 3)


@devices
@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_product(size, bias, dtype, device):
    skip_interpreted_bf16(dtype, device)
    M, N, K = size
    parts = [normal(M, K, dtype=dtype, device=device)]
    parts += [normal(N, K, dtype=dtype, device=device, seed=i) for i in (1, 2)]
    parts += [normal(N, dtype=dtype, device=device, seed=i) for i in (3, 4)] if bias else [None] * 2

    def gated(x, gate, up, b1, b2):
        return F.linear(x, gate, b1).relu() * F.linear(x, up, b2)

    def each(f):
        return [None if p is None else f(p) for p in parts]

    x, gate, up, b1, b2 = each(lambda p: p.double().abs())
    large = 2 * F.linear(x, gate, b1) * F.linear(x, up, b2)
    got = _gemm.gated_product(*parts, activation="relu")
    want = gated(*each(torch.Tensor.double))
    assert_sum_of_products(got, want, gated(*parts), large, K + 2)


@devices
@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient_of_the_input(size, dtype, device):
    skip_interpreted_bf16(dtype, device)
    M, R, K = size
    gy = normal(M, R, dtype=dtype, device=device)
    w, rows = normal(R + 3, K, dtype=dtype, device=device), keep(R + 3, R, device)
    got = _gemm.product_dx(gy, w, rows)
    want, large = gy.double() @ w[rows].double(), gy.double().abs() @ w[rows].double().abs()
    assert_sum_of_products(got, want, gy @ w[rows], large, R)


@devices
@dtypes
@pytest.mark.parametrize("kept", ["all", "rows", "cols", "both"])
@pytest.mark.parametrize("size", [*SIZES, (1030, 20, 9)], ids=str)
def test_gradient_of_the_weight(size, kept, dtype, device):
    skip_interpreted_bf16(dtype, device)
    M, R, C = size
    N, K = R + 70 * (kept in ("rows", "both")), C + 150 * (kept in ("cols", "both"))
    gy = normal(M, R, dtype=dtype, device=device)
    x = normal(M, C, dtype=dtype, device=device, seed=1)
    rows = keep(N, R, device) if N > R else None
    cols = keep(K, C, device) if K > C else None
    got = _gemm.product_dw(gy, x, rows=rows, cols=cols, shape=(N, K))
    assert got.shape == (N, K)
    r = torch.arange(N, device=device) if rows is None else rows
    c = torch.arange(K, device=device) if cols is None else cols
    inside = torch.zeros(N, K, dtype=torch.bool, device=device)
    inside[r[:, None], c] = True
    assert (got[~inside] == 0).all()
    large = gy.double().abs().t() @ x.double().abs()
    assert_sum_of_products(
        got[r[:, None], c], gy.double().t() @ x.double(), gy.t() @ x, large, max(M, 1)
    )


@devices
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [None, 0, 17, 70])
@pytest.mark.parametrize("cols", [None, 0, 5, 133])
def test_compact_copy(rows, cols, transposed, device):
    w = normal(140, 70, device=device).t()
    r = None if rows is None else keep(70, rows, device)
    c = None if cols is None else keep(140, cols, device)
    part = w if r is None else w[r]
    part = part if c is None else part[:, c]
    want = F.pad(part, (0, -part.shape[1] % 64, 0, -part.shape[0] % 64))
    got = _gemm.gathered(w, r, c, transposed=transposed)
    assert got.is_contiguous()
    assert torch.equal(got, want.t() if transposed else want)


@devices
def test_products_of_differing_widths(device):
    sizes = [(17, 5, 33), (17, 63, 130), (1, 130, 64), (40, 1, 7), (0, 3, 5)] + [(9, 80, 16)] * 9
    xs = [normal(m, k, device=device) for m, _, k in sizes]
    ws = [normal(n, k, device=device, seed=1) for _, n, k in sizes]
    biases = [normal(n, device=device) if n % 5 else None for _, n, _ in sizes]
    for got, x, w, bias in zip(_gemm.grouped_products(xs, ws, biases), xs, ws, biases, strict=True):
        want, large = (
            F.linear(*(None if p is None else f(p.double()) for p in (x, w, bias)))
            for f in (torch.clone, torch.abs)
        )
        assert_sum_of_products(got, want, F.linear(x, w, bias), large, x.shape[1] + 1)


def test_problems_of_several_dtypes_are_refused():
    x, w, b = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)
    for xs, ws, biases, name in (
        ([x, x.half()], [w, w], [b, b], "x"),
        ([x, x], [w.half(), w], [b, b], "w"),
        ([x, x], [w, w], [None, b.half()], "bias"),
    ):
        with pytest.raises(TypeError, match=f"{name} has dtype torch.float16 beside x of"):
            _gemm.grouped_products(xs, ws, biases)


def test_neighbours_are_a_view():
    w = normal(64, 64)
    a_run, other = torch.arange(8, 24), torch.tensor([0, 2, 3])
    for rows, cols, want in (
        (a_run, None, w[8:24]),
        (None, a_run, w[:, 8:24]),
        (a_run, a_run, w[8:24, 8:24]),
        (None, None, w),
    ):
        got = _gemm.kept_part(w, rows, cols)
        assert got.data_ptr() == want.data_ptr()
        assert torch.equal(got, want)
    for rows, cols in ((other, None), (None, other), (a_run, other), (None, a_run + 1)):
        got = _gemm.kept_part(w, rows, cols)  # the last: no row starts on a 16-byte boundary
        assert got.untyped_storage().data_ptr() != w.untyped_storage().data_ptr()
        part = w if rows is None else w[rows]
        assert torch.equal(got, part if cols is None else part[:, cols])
    a_run += 16  # in place: what was read of it before holds no longer
    assert torch.equal(_gemm.kept_part(w, a_run, None), w[24:40])
    a_run[3] += 30
    assert torch.equal(_gemm.kept_part(w, a_run.sort().values, None), w[a_run.sort().values])


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_the_weight_into_rows_of_any_distance(device):
    gy, x = (torch.randn(40, 32, device=device) for _ in range(2))
    wide = torch.full((32, 37), 7.0, device=device)
    _gemm.product_dw(gy, x, out=wide[:, :32])
    torch.testing.assert_close(wide[:, :32], gy.t() @ x)
    assert (wide[:, 32:] == 7).all(), "written behind a row's end"


@pytest.mark.parametrize(
    ("capability", "found"), [(0, False), (89, False), (90, True), (103, True), (120, False)]
)
def test_gpus_with_too_little_memory_take_no_descriptors(capability, found, monkeypatch):
    monkeypatch.setattr(_gemm_configs, "capability", lambda tensor: capability)
    assert _gemm_configs.has_descriptors(torch.zeros(8, 8, dtype=torch.bfloat16)) == found


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not set")
def test_tiles_of_a_float32_residual_fit_in_shared_memory(monkeypatch):
    # Compiled for sm_90 they take these bytes: the stages of the operands, and in the epilogue the
    # residual and the result, of halves of a tile where it is wide.
    monkeypatch.setattr(_gemm_configs, "capability", lambda tensor: 90)
    offered = []
    monkeypatch.setattr(_gemm_product, "fastest", lambda *a, **k: offered.extend(a[3]) or a[4])
    x, w = (torch.randn(16, 64).half() for _ in range(2))
    residual, y = torch.randn(16, 16), torch.empty(16, 16)
    _gemm.product(x, w, residual=residual, out=y)
    torch.testing.assert_close(y, x.float() @ w.float().t() + residual)
    for tile in offered:
        stages = (tile.a + tile.b) * tile.k * 2 * tile.stages
        assert stages + 2 * tile.a * min(tile.b, 128) * 4 < 227 << 10, tile


def test_configurations_that_a_gpu_cannot_hold_are_not_tried():
    large = _gemm_configs.DESCRIPTOR_TILES[0]
    assert _tune.holds(large, 2, 227 << 10)
    assert not _tune.holds(large, 2, 99 << 10)
    assert not _tune.holds(large, 2, 227 << 10, accumulators=2)
    for table in ("HALF", "NARROW", "FLOAT", "DESCRIPTOR"):
        tiles = getattr(_gemm_configs, f"{table}_TILES")
        assert len(tiles) <= 8
        shared = 227 << 10 if table == "DESCRIPTOR" else 99 << 10
        assert all(_tune.holds(tile, 4 if table == "FLOAT" else 2, shared) for tile in tiles)


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not set")
@pytest.mark.parametrize("capability", [0, 90])
def test_what_follows_the_sums_tells_problems_apart(capability, monkeypatch):
    """Epilogues take registers and time: the best configuration for one is not that for another."""
    monkeypatch.setattr(_gemm_configs, "capability", lambda tensor: capability)
    found = []
    for module in (_gemm, _gemm_product, _gemm_weights):
        noted = lambda *a, **k: found.append(a[:2]) or a[4]  # noqa: E731
        monkeypatch.setattr(module, "fastest", noted)
    x, w, b = torch.randn(16, 64).half(), torch.randn(16, 64).half(), torch.randn(16).half()
    sums, rows = torch.randn(16, 16), torch.arange(16)
    for more in (
        {},
        {"bias": b},
        {"rows": rows},
        {"rows": rows, "packed": True},
        {"activation": "relu"},
        {"activation": "gelu"},
        {"keep_input": True},
        {"residual": sums},
        {"residual": sums.half()},
        {"out": torch.empty_like(sums)},
    ):
        _gemm.product(x, w, **more)
    for more in ({"activation": "relu"}, {"activation": "silu"}, {"out": torch.empty_like(sums)}):
        _gemm.gated_product(x, w, w, None, None, **{"activation": "none", **more})
    _gemm.gated_product(x, w, w, b, b, activation="relu")
    for more in ({}, {"rows": rows}, {"cols": torch.arange(64)}, {"out": torch.empty(16, 64)}):
        _gemm.product_dw(sums.half(), x, **more)
    assert len(found) == 18
    assert len(set(found)) == 18, found


def test_nothing_is_tuned_where_nothing_can_be_measured():
    tiles = _gemm_configs.HALF_TILES
    launched = []
    with _tune.tuning():
        got = _tune.fastest("x", (1,), normal(2, 2), tiles, tiles[2], launched.append)
    assert got is tiles[2]
    assert not launched
