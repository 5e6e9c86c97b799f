"""Packing for GPUs: a block's weights in one allocation, laid out for aligned loads.

Kept channels and heads have any number; their rows are filled up with zeros to multiples of 64, so
that products and what lies between them run on whole tiles. A channel of zeros stays zero through
every activation, and the columns of the second weight that meet it are zeros too. Rows of a weight
begin at multiples of 16 bytes, weights at multiples of 256.

Weights of full-precision float32 products, which NVIDIA GPUs have no matrix unit for, lie
transposed: threads read their tiles output by output. On an H100 a product took 3.7 times cuBLAS's
time with a weight as `torch.nn.Linear` keeps it, and 1.1 times with neighbours along the outputs
(bench/results/h100-2026-11-22-indexed-linear.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from slimkern.ops import _native
from slimkern.ops._math import choose_math
from slimkern.ops._packed import Packed
from slimkern.ops._weights import LinearWeights, NormWeights

MULTIPLE = 64  # of kept rows: what a tile of the products is a multiple of, or divides
_ROW_BYTES, _PART_BYTES = 16, 256
# How products are computed -> in which type weights and what is multiplied by them are stored.
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Slots whose outputs are kept units, and those whose inputs are.
_KEPT_ROWS, _KEPT_COLUMNS = ("qkv", "gate", "up"), ("projection", "down")


@dataclass(frozen=True)
class Spec:
    """What the tensors of a pack are, and how a block is put together.

    Attributes:
        math: how products are computed.
        names: of the tensors, in their order: a slot and ``weight`` or ``bias``.
        hidden: width of the rows.
        heads, kv_heads, head_dim, scale, causal, attention_residual: as in `AttentionWeights`.
        channels, gated, activation, ffn_residual: as in `FfnWeights`.
        norms: slot -> kind and eps, of the norms that there are.
    """

    math: str
    names: tuple[str, ...]
    hidden: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    scale: float = 1.0
    causal: bool = False
    attention_residual: bool = False
    channels: int = 0
    gated: bool = False
    activation: str = "none"
    ffn_residual: bool = False
    norms: Mapping[str, tuple[str, float]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of what is multiplied."""
        return DTYPES[self.math]


@lru_cache(maxsize=1024)
def read_spec(text: str) -> Spec:
    """The specification that a pack carries as text."""
    return Spec(**json.loads(text))


class DevicePacker:
    """A pack for GPUs in the making."""

    def __init__(
        self, kind: str, like: Tensor, math: str | None, fields: Mapping[str, Any]
    ) -> None:
        chosen = choose_math(like.dtype, None, "cuda")  # refuses what is computed nowhere
        accepted = ("fp32", "tf32", "bf16") if like.dtype == torch.float32 else (chosen,)
        self.math = chosen if math is None else math
        if self.math not in accepted:
            names = ", ".join(accepted)
            raise ValueError(f"math is {math!r}; accepted for {like.dtype}: None, {names}")
        self.kind, self.like = kind, like
        self.shapes = _shapes(fields)
        self.fields = {name: value for name, value in fields.items() if name in _SPEC_FIELDS}
        self.norms: dict[str, tuple[str, float]] = {}
        for slot in _native.NORM_SLOTS:
            if slot in fields:
                self.norms[slot] = (fields[slot], float(fields[f"{slot}_eps"]))
        self.hidden = int(fields.get("hidden", 0))
        self.parts: dict[str, Tensor] = {}

    def linear(self, slot: str, linear: LinearWeights) -> None:
        """Puts a linear into its slot, its kept units filled up with zeros."""
        weight, bias = linear.weight.detach(), linear.bias
        self._check(slot, weight)
        if weight.shape != self.shapes[slot]:
            raise ValueError(
                f"{slot} has a weight of shape {tuple(weight.shape)}; accepted: "
                f"{list(self.shapes[slot])}"
            )
        N, K = weight.shape
        rows = _filled(N) if slot in _KEPT_ROWS else N
        columns = _filled(K) if slot == "down" or K == 0 else K
        dtype = DTYPES[self.math]
        if self.math == "fp32":
            self.parts[f"{slot}.weight"] = _padded(weight.t(), columns, rows).t()
        else:
            self.parts[f"{slot}.weight"] = _padded(weight.to(dtype), rows, columns)
        if bias is None:
            return
        bias = bias.detach()
        self._check(slot, bias)
        if bias.shape != (N,):
            raise ValueError(
                f"{slot} has a bias of shape {tuple(bias.shape)}; accepted: [{N}], one per weight "
                "row"
            )
        self.parts[f"{slot}.bias"] = _padded(bias, rows)

    def norm(self, slot: str, norm: NormWeights | None) -> None:
        """Puts the vectors of a norm into its slot."""
        for name in ("weight", "bias"):
            vector = None if norm is None else getattr(norm, name)
            if vector is None:
                continue
            vector = vector.detach()
            self._check(slot, vector)
            if vector.shape != (self.hidden,):
                raise ValueError(
                    f"{slot} has a {name} of shape {tuple(vector.shape)}; accepted: [{self.hidden}]"
                )
            self.parts[f"{slot}.{name}"] = vector

    def done(self, in_features: int, out_features: int) -> Packed:
        """The pack: everything in one allocation."""
        biases = [self.parts.get(f"{slot}.bias") for slot in ("gate", "up")]
        if self.fields.get("gated") and (biases[0] is None) != (biases[1] is None):
            for slot, other in zip(("gate", "up"), biases[::-1]):
                if other is not None:
                    self.parts[f"{slot}.bias"] = torch.zeros_like(other)
        places, size = [], 0
        for part in self.parts.values():
            places.append(size)
            size += -(-_extent(part) // _PART_BYTES) * _PART_BYTES
        data = torch.zeros(size, dtype=torch.uint8, device=self.like.device)
        held = tuple(_placed(data, at, part) for at, part in zip(places, self.parts.values()))
        fields = {**self.fields, "norms": self.norms, "math": self.math, "names": list(self.parts)}
        return Packed(
            data, self.kind, _native.isa(), self.math, in_features, out_features,
            "triton", held, json.dumps(fields),
        )  # fmt: skip

    def _check(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype != self.like.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; accepted: {self.like.dtype}, that of the block"
            )
        if tensor.device != self.like.device:
            raise ValueError(
                f"{name} is on {tensor.device}; accepted: {self.like.device}, that of the block"
            )


_SPEC_FIELDS = frozenset(Spec.__dataclass_fields__) - {"math", "names", "norms"}


def _shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The shape that the weight of each slot has."""
    hidden, channels = fields.get("hidden", 0), fields.get("channels", 0)
    d, heads, kv_heads = (fields.get(name, 0) for name in ("head_dim", "heads", "kv_heads"))
    if heads % max(kv_heads, 1) or (heads and not kv_heads):
        raise ValueError(f"heads is {heads}; accepted: a multiple of kv_heads, {kv_heads}")
    return {
        "linear": (fields.get("linear_out", 0), fields.get("linear_in", 0)),
        "qkv": ((heads + 2 * kv_heads) * d, hidden),
        "projection": (hidden, heads * d),
        "gate": (channels, hidden),
        "up": (channels, hidden),
        "down": (hidden, channels),
    }


def _filled(size: int) -> int:
    """The least positive multiple at or above a number of kept units."""
    return -(-max(size, 1) // MULTIPLE) * MULTIPLE


def _padded(tensor: Tensor, *sizes: int) -> Tensor:
    """Zeros of these sizes, with the tensor in their first corner; rows begin aligned."""
    stored = list(sizes)
    if len(sizes) == 2:
        step = _ROW_BYTES // tensor.element_size()
        stored[1] = -(-sizes[1] // step) * step
    made = tensor.new_zeros(stored)
    made[tuple(slice(n) for n in tensor.shape)] = tensor
    return made[tuple(slice(n) for n in sizes)]


def _extent(part: Tensor) -> int:
    """Bytes of the rows of a part, with what fills them up."""
    if part.dim() == 1:
        return part.element_size() * part.shape[0]
    rows, step = max(zip(part.stride(), part.shape))[::-1]
    return part.element_size() * rows * step


def _placed(data: Tensor, at: int, part: Tensor) -> Tensor:
    """A copy of the part in the pack's memory, with the same strides."""
    place = data[at : at + _extent(part)].view(part.dtype)
    return place.as_strided(part.shape, part.stride(), place.storage_offset()).copy_(part)
