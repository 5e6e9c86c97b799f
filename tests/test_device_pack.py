"""Packs for GPUs: how they are laid out, what is refused, and how products are computed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from fused_cases import Shape, cast, make_weights, make_x

from slimkern import ops

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from triton_cases import DEVICES, moved

from slimkern.ops import _device_pack, _gemm_product, _packed


@pytest.mark.parametrize("device", DEVICES)
def test_a_pack_is_laid_out_for_wide_loads(device):
    shape = Shape(1, 2, channels=70, head_dim=9)
    weights = moved(make_weights("encoder_layer", shape), device)
    packed = ops.pack_encoder_layer(cast(weights, torch.float16), backend="triton")
    assert (packed.backend, packed.math, packed.kind) == ("triton", "fp16", "encoder_layer")
    assert packed.nbytes == packed.data.numel()
    spec = _device_pack.read_spec(packed.spec)
    parts = dict(zip(spec.names, packed.parts))
    assert parts["gate.weight"].shape == (128, 63)
    assert parts["down.weight"].shape == (63, 128)
    assert parts["qkv.weight"].shape == (128, 63)
    assert not parts["gate.weight"][70:].any()
    assert not parts["down.weight"][:, 70:].any()
    assert not parts["gate.bias"][70:].any()
    for part in packed.parts:
        assert (part.data_ptr() - packed.data.data_ptr()) % 256 == 0
        assert part.dim() == 1 or part.stride(0) * part.element_size() % 16 == 0
    exact = ops.pack_ffn(cast(weights.ffn, torch.float32), math="fp32", backend="triton")
    gate = exact.parts[0]
    assert gate.shape == (128, 63)
    assert gate.stride(0) == 1
    assert gate.stride(1) * 4 % 16 == 0
    assert torch.equal(gate[:70], weights.ffn.fc1.weight.float())
    other = copy.deepcopy(packed)
    x = make_x(shape, torch.float16).to(device)
    assert torch.equal(ops.encoder_layer(x, packed), ops.encoder_layer(x, other))


@pytest.mark.parametrize("device", DEVICES)
def test_a_pack_holds_the_transposed_copy_that_exact_products_need(device, monkeypatch):
    """However many tokens there are, nothing is copied when a packed block is called."""
    shape, copies = Shape(2, 5, gated=True, activation="silu"), []
    monkeypatch.setattr(_gemm_product, "_MANY", 1)
    gathered = _gemm_product.gathered
    noted = lambda *args, **given: copies.append(given) or gathered(*args, **given)  # noqa: E731
    monkeypatch.setattr(_gemm_product, "gathered", noted)
    x = make_x(shape, torch.float32).to(device)
    for gated in (True, False):
        weights = make_weights("encoder_layer", replace(shape, gated=gated))
        weights = moved(cast(weights, torch.float32), device)
        packed = ops.pack_encoder_layer(weights, math="fp32", backend="triton")
        ops.encoder_layer(x, packed)
    assert not copies
    w = weights.ffn.fc1.weight
    _gemm_product.run(_gemm_product.Product(x[0], w, x.new_empty(5, w.shape[0]), "ieee"))
    assert len(copies) == 1, "a weight that is not packed is copied"


def test_what_does_not_fit_is_refused():
    shape = Shape(2, 5, hidden=9, head_dim=4, channels=6)
    weights = cast(make_weights("encoder_layer", shape), torch.float32)
    x = make_x(shape, torch.float32)
    packed = ops.pack_encoder_layer(weights, backend="triton")
    for mask, error, message in (
        (torch.ones(2, 4).bool(), ValueError, r"accepted: \[2, 5\]"),
        (torch.ones(3, dtype=torch.int64), ValueError, r"accepted: \[2\]"),
        (torch.ones(2, 5).int(), TypeError, "accepted: torch.int64"),
    ):
        with pytest.raises(error, match=message):
            ops.encoder_layer(x, packed, mask)
    for bias, error, message in (
        (torch.ones(3, 5, 4), ValueError, "head_bias has shape"),
        (torch.ones(2, 5, 5), ValueError, "head_bias is of 2 heads; accepted: 3"),
        (torch.ones(3, 5, 5).long(), TypeError, "head_bias has dtype"),
    ):
        with pytest.raises(error, match=message):
            ops.encoder_layer(x, packed, None, bias)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        ops.encoder_layer(x.double(), packed)
    with pytest.raises(ValueError, match="packed is for the CPU"):
        ops.encoder_layer(x, replace(packed, spec=""))
    with pytest.raises(ValueError, match=r"math is 'bf16x3'; accepted for torch\.float32"):
        ops.pack_encoder_layer(weights, backend="triton", math="bf16x3")
    with pytest.raises(TypeError, match=r"weights have dtype torch\.float64; accepted"):
        ops.pack_ffn(cast(weights.ffn, torch.float64), backend="triton")
    fc2 = replace(weights.ffn.fc2, weight=torch.zeros(9, 7))
    with pytest.raises(
        ValueError, match=r"down has a weight of shape \(9, 7\); accepted: \[9, 6\]"
    ):
        ops.pack_ffn(replace(weights.ffn, fc2=fc2), backend="triton")


def test_backends_of_packs():
    assert _packed.PACKED_BACKENDS.choose(None, torch.device("cuda")) == "triton"
    with pytest.raises(ValueError, match="linear is on meta; accepted: cpu, cuda"):
        ops.pack_linear(torch.zeros(3, 4, device="meta"))


def test_precision_on_gpus_is_torchs_own():
    before = torch.get_float32_matmul_precision()
    rocm = torch.version.hip is not None
    wanted = {"highest": "fp32", "high": "fp32" if rocm else "tf32", "medium": "bf16"}
    try:
        for name, math in wanted.items():
            torch.set_float32_matmul_precision(name)
            assert ops.current_precision("cuda") == name
            assert ops.choose_math(torch.float32, None, "cuda") == math
            assert ops.choose_math(torch.float16, None, "cuda") == "fp16"
            assert ops.choose_math(torch.bfloat16, None, "cuda") == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    for name, math in wanted.items():
        assert ops.choose_math(torch.float32, name, "cuda") == math
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        old = matmul.fp32_precision
        try:
            matmul.fp32_precision = "tf32"
            assert ops.current_precision("cuda") == "high"
            assert ops.current_precision() == before
        finally:
            matmul.fp32_precision = old
