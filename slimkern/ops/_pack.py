"""Packing: a block's weights in the form that the kernels read, in one tensor of bytes.

A pack for the C++ kernels belongs to the instruction set that was in use when it was made; an op
refuses one of another. It holds no addresses: copies of its tensor are as good as the original, as
long as their memory begins at a multiple of 64 bytes, as torch's own allocations do. Packs for GPUs
are made by `slimkern.ops._device_pack`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slimkern.ops import _native
from slimkern.ops._device_pack import DevicePacker
from slimkern.ops._math import choose_math
from slimkern.ops._packed import PACKED_BACKENDS, Packed
from slimkern.ops._weights import (
    AttentionWeights,
    EncoderLayerWeights,
    FfnWeights,
    LinearWeights,
    NormWeights,
)


def pack_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    math: str | None = None,
    backend: str | None = None,
) -> Packed:
    """Packs ``y = x @ weightᵀ + bias``.

    Args:
        weight: [N, K], float32 or bfloat16, on a GPU also float16; any strides.
        bias: [N] of the same dtype, or None.
        math: None: what `slimkern.ops.choose_math` says.
        backend: for which the pack is, ``cpu`` or ``triton``; None: that of the weight's device.

    Raises:
        ValueError: a shape or a device does not fit, or ``math`` has no kernels here.
        TypeError: a dtype does not fit.
    """
    linear = LinearWeights(weight, bias)
    _check_matrix("weight", weight)
    N, K = weight.shape
    packer = _packer("linear", linear, math, backend, {"linear_in": K, "linear_out": N})
    packer.linear("linear", linear)
    return packer.done(K, N)


def pack_ffn(weights: FfnWeights, *, math: str | None = None, backend: str | None = None) -> Packed:
    """Packs an FFN with its norms; arguments and errors as for `pack_linear`."""
    _check_matrix("fc1", weights.fc1.weight)
    hidden = weights.fc1.weight.shape[1]
    fields = {"hidden": hidden, **_ffn_fields(weights)}
    packer = _packer("ffn", weights.fc1, math, backend, fields)
    _put_ffn(packer, weights)
    return packer.done(hidden, hidden)


def pack_attention_block(
    weights: AttentionWeights, *, math: str | None = None, backend: str | None = None
) -> Packed:
    """Packs attention, its projections and norms; arguments and errors as for `pack_linear`."""
    _check_matrix("query", weights.query.weight)
    hidden = weights.query.weight.shape[1]
    fields = {"hidden": hidden, **_attention_fields(weights)}
    packer = _packer("attention_block", weights.query, math, backend, fields)
    _put_attention(packer, weights)
    return packer.done(hidden, hidden)


def pack_encoder_layer(
    weights: EncoderLayerWeights, *, math: str | None = None, backend: str | None = None
) -> Packed:
    """Packs attention and the FFN behind it; arguments and errors as for `pack_linear`."""
    _check_matrix("query", weights.attention.query.weight)
    hidden = weights.attention.query.weight.shape[1]
    fields = {"hidden": hidden, **_attention_fields(weights.attention), **_ffn_fields(weights.ffn)}
    packer = _packer("encoder_layer", weights.attention.query, math, backend, fields)
    _put_attention(packer, weights.attention)
    _put_ffn(packer, weights.ffn)
    return packer.done(hidden, hidden)


_NORM_SLOTS = tuple(_native.NORM_SLOTS)
_INTS = (
    "linear_in", "linear_out", "hidden", "heads", "kv_heads", "head_dim", "causal",
    "attention_residual", "channels", "gated", "activation", "ffn_residual", *_NORM_SLOTS,
)  # fmt: skip
_NUMBERS = {**_native.ACTIVATIONS, **_native.NORMS}
_FLOATS = (*(f"{slot}_eps" for slot in _NORM_SLOTS), "scale")


def _packer(
    kind: str,
    like: LinearWeights,
    math: str | None,
    backend: str | None,
    fields: Mapping[str, Any],
) -> _Packer | DevicePacker:
    """What packs for a backend, that of the weights' device unless one is asked for."""
    device = like.weight.device
    if device.type not in PACKED_BACKENDS.default:
        accepted = ", ".join(PACKED_BACKENDS.default)
        raise ValueError(f"{kind} is on {device}; accepted: {accepted}")
    chosen = PACKED_BACKENDS.choose(backend, device)
    if chosen == "triton":
        return DevicePacker(kind, like.weight, math, fields)
    return _Packer(kind, like, math, fields)


class _Packer:
    """A pack for the C++ kernels in the making: its memory, and what is written to it."""

    def __init__(
        self, kind: str, like: LinearWeights, math: str | None, fields: Mapping[str, Any]
    ) -> None:
        self.kind = kind
        self.dtype = like.weight.dtype
        chosen = choose_math(self.dtype)
        self.math = chosen if math is None else math
        if self.math not in _native.maths():
            accepted = ", ".join(_native.maths())
            raise ValueError(f"math is {math!r}; accepted on {_native.isa()}: None, {accepted}")
        self.isa = _native.isa()
        fields = {
            name: _NUMBERS[value] if isinstance(value, str) else value
            for name, value in fields.items()
        }
        ints = [int(fields.get(name, 0)) for name in _INTS]
        spec = [_native.PACKS[kind], _native.MATHS[self.math], *ints]
        floats = [float(fields.get(name, 0.0)) for name in _FLOATS]
        self.data = torch.empty(_native.pack_bytes(spec, floats), dtype=torch.uint8)
        self.memory = (self.data.data_ptr(), self.data.numel())
        _native.pack_begin(spec, floats, *self.memory)

    def done(self, in_features: int, out_features: int) -> Packed:
        return Packed(self.data, self.kind, self.isa, self.math, in_features, out_features)

    def linear(self, slot: str, linear: LinearWeights) -> None:
        weight, bias = linear.weight.detach(), linear.bias
        _check_matrix(slot, weight)
        self._check(slot, weight)
        vector = _native.NO_VECTOR
        if bias is not None:
            bias = bias.detach()
            self._check(slot, bias)
            if bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"{slot} has a bias of shape {tuple(bias.shape)}; accepted: "
                    f"[{weight.shape[0]}], one per weight row"
                )
            vector = _native.vec(bias)
        code = _native.DTYPES[self.dtype]
        mat = _native.mat(weight)
        _native.pack_linear(*self.memory, _native.SLOTS[slot], code, mat, vector)

    def norm(self, slot: str, norm: NormWeights | None) -> None:
        if norm is None:
            return
        given = [None if v is None else v.detach() for v in (norm.weight, norm.bias)]
        sizes = {v.shape for v in given if v is not None}
        for vector in given:
            if vector is not None:
                self._check(slot, vector)
        if not sizes:
            return
        if len(sizes) > 1 or len(next(iter(sizes))) != 1:
            raise ValueError(f"{slot} has shapes {[tuple(s) for s in sizes]}; accepted: [hidden]")
        vectors = [_native.NO_VECTOR if v is None else _native.vec(v) for v in given]
        code, size = _native.DTYPES[self.dtype], next(iter(sizes))[0]
        _native.pack_norm(*self.memory, _native.NORM_SLOTS[slot], code, *vectors, size)

    def _check(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype != self.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; accepted: {self.dtype}, that of the block"
            )
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; accepted: cpu")


def _put_attention(packer: _Packer | DevicePacker, weights: AttentionWeights) -> None:
    three = (weights.query, weights.key, weights.value)
    for name, linear in zip(("query", "key", "value"), three):
        _check_matrix(name, linear.weight)
    packer.linear("qkv", _stacked(three))
    packer.linear("projection", weights.output)
    packer.norm("attention_pre", weights.pre)
    packer.norm("attention_post", weights.post)


def _put_ffn(packer: _Packer | DevicePacker, weights: FfnWeights) -> None:
    packer.linear("gate", weights.fc1)
    if weights.up is not None:
        packer.linear("up", weights.up)
    packer.linear("down", weights.fc2)
    packer.norm("ffn_pre", weights.pre)
    packer.norm("ffn_post", weights.post)


def _stacked(linears: tuple[LinearWeights, ...]) -> LinearWeights:
    """One linear with the rows of several; a missing bias is zero."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    if all(linear.bias is None for linear in linears):
        return LinearWeights(weight)
    biases = [
        linear.weight.new_zeros(linear.weight.shape[0]) if linear.bias is None else linear.bias
        for linear in linears
    ]
    return LinearWeights(weight, torch.cat([bias.detach() for bias in biases]))


def _check_matrix(name: str, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"{name} has a weight of shape {tuple(weight.shape)}; accepted: [N, K]")


def _known(name: str, value: str, numbers: dict[str, int]) -> str:
    if value not in numbers:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(numbers)}")
    return value


def _norm_fields(slot: str, norm: NormWeights | None) -> dict[str, Any]:
    if norm is None:
        return {}
    return {slot: _known(f"{slot}'s kind", norm.kind, _native.NORMS), f"{slot}_eps": norm.eps}


def _ffn_fields(weights: FfnWeights) -> dict[str, Any]:
    return {
        "channels": weights.fc1.weight.shape[0],
        "gated": weights.up is not None,
        "activation": _known("activation", weights.activation, _native.ACTIVATIONS),
        "ffn_residual": weights.residual,
        **_norm_fields("ffn_pre", weights.pre),
        **_norm_fields("ffn_post", weights.post),
    }


def _attention_fields(weights: AttentionWeights) -> dict[str, Any]:
    d = weights.head_dim
    rows = {name: getattr(weights, name).weight.shape[0] for name in ("query", "key", "value")}
    if d < 1 or any(n % d for n in rows.values()) or rows["key"] != rows["value"]:
        raise ValueError(
            f"query, key and value have {', '.join(map(str, rows.values()))} rows; accepted: "
            f"multiples of head_dim, {d}, the same for key and value"
        )
    return {
        "heads": rows["query"] // d,
        "kv_heads": rows["key"] // d,
        "head_dim": d,
        "causal": weights.causal,
        "attention_residual": weights.residual,
        "scale": d**-0.5 if weights.scale is None else weights.scale,
        **_norm_fields("attention_pre", weights.pre),
        **_norm_fields("attention_post", weights.post),
    }
