"""Whole blocks on GPUs, of packed weights: what the ops' ``triton.py`` are made of.

Bias, activation, gate and residual are in the products' epilogues, norms and masks in one pass over
rows; attention itself is `scaled_dot_product_attention`. What lies between has rows of a multiple
of 64 elements. Nothing waits for the device or depends on values, so that CUDA graphs capture all.

``x`` is stored in its own type; what is multiplied, in the pack's (bfloat16 for ``medium``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkern.ops._device_pack import Spec, read_spec
from slimkern.ops._gemm import gated_product, product
from slimkern.ops._row_norm import removed, row_norm
from slimkern.ops._tile import check_dtype

_PRECISION = {"fp32": "ieee", "tf32": "tf32", "bf16": "ieee", "fp16": "ieee"}


class Block:
    """The tensors of a pack by their names, and how they are put together."""

    def __init__(self, tensors: list[Tensor], spec: str, x: Tensor) -> None:
        if not spec:
            raise ValueError("packed is for the CPU; accepted: a pack for GPUs, backend 'triton'")
        check_dtype("x", x)
        self.spec: Spec = read_spec(spec)
        self.get = dict(zip(self.spec.names, tensors)).get
        self.precision = _PRECISION[self.spec.math]

    def linear(
        self, slot: str, x: Tensor, out: Tensor, residual: Tensor | None = None, a: str = "none"
    ) -> Tensor:
        """``out = a(x @ Wᵀ + b) + residual``."""
        w, b = self.get(f"{slot}.weight"), self.get(f"{slot}.bias")
        assert w is not None
        product(x, w, b, activation=a, residual=residual, out=out, input_precision=self.precision)
        return out

    def norm(
        self,
        slot: str,
        x: Tensor,
        y: Tensor | None,
        low: Tensor | None,
        mask: Tensor | None = None,
        tokens: int = 1,
    ) -> None:
        """The norm in a slot, or none, of x [M, H] into ``y``, into ``low``, or both."""
        kind, eps = (self.spec.norms or {}).get(slot, ("none", 0.0))
        weight, bias = self.get(f"{slot}.weight"), self.get(f"{slot}.bias")
        row_norm(x, weight, bias, eps, kind, mask=mask, tokens=tokens, y=y, low=low)

    def has_norm(self, slot: str) -> bool:
        """Whether there is a norm in a slot."""
        return slot in (self.spec.norms or {})

    def operand(self, x: Tensor, slot: str = "") -> Tensor:
        """x, normed if there is a norm in the slot, in the type that is multiplied."""
        dtype = self.spec.dtype
        if not self.has_norm(slot):
            return x if x.dtype == dtype else x.to(dtype)
        made = torch.empty(x.shape, dtype=dtype, device=x.device)
        self.norm(slot, x, None, made)
        return made

    def like(self, x: Tensor) -> Tensor:
        """Memory for rows like those of x."""
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def rows(x: Tensor) -> Tensor:
    """x as [M, hidden] of unit last stride."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def linear(x: Tensor, tensors: list[Tensor], spec: str, N: int) -> Tensor:
    """x [M, K] -> [M, N]."""
    block = Block(tensors, spec, x)
    out = torch.empty((x.shape[0], N), dtype=x.dtype, device=x.device)
    return block.linear("linear", block.operand(rows(x)), out)


def ffn(
    block: Block,
    x: Tensor,
    low: Tensor | None = None,
    mask: Tensor | None = None,
    tokens: int = 1,
) -> Tensor:
    """``post(x + fc2(a(fc1(pre(x)))))`` of x [M, hidden] -> the same shape.

    Args:
        block: weights.
        x: of unit last stride.
        low: x in the type that is multiplied, where it is at hand.
        mask, tokens: rows that are zeros in the result, as `row_norm` takes them.
    """
    spec = block.spec
    inner = low if low is not None and not block.has_norm("ffn_pre") else None
    inner = block.operand(x, "ffn_pre") if inner is None else inner
    gate, up = block.get("gate.weight"), block.get("up.weight")
    assert gate is not None
    mid = torch.empty((x.shape[0], gate.shape[0]), dtype=spec.dtype, device=x.device)
    if up is None:
        block.linear("gate", inner, mid, a=spec.activation)
    else:
        gated_product(
            inner, gate, up, block.get("gate.bias"), block.get("up.bias"),
            activation=spec.activation, out=mid, input_precision=block.precision,
        )  # fmt: skip
    y = block.linear("down", mid, block.like(x), x if spec.ffn_residual else None)
    if not block.has_norm("ffn_post") and mask is None:
        return y
    block.norm("ffn_post", y, y, None, mask, tokens)
    return y


def attention(
    block: Block, x: Tensor, mask: Tensor | None, head_bias: Tensor | None, *, last: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention with its projections and norms, x [B, T, hidden] -> y [B * T, hidden].

    Args:
        block: weights.
        x: any strides.
        mask, head_bias: as in `slimkern.ops.attention_block`.
        last: whether rows behind the last key are zeros in y; else they are any numbers.

    Returns:
        y, and y in the type that is multiplied where that is another.
    """
    B, T, hidden = x.shape
    _check_masks(mask, head_bias, B, T)
    flat = rows(x)
    spec, M = block.spec, B * T
    out_columns = block.get("projection.weight")
    assert out_columns is not None
    if spec.heads == 0:
        context = flat.new_zeros(M, out_columns.shape[1], dtype=spec.dtype)
    else:
        context = _context(block, block.operand(flat, "attention_pre"), mask, head_bias, B, T)
    residual = flat if spec.attention_residual else None
    y = block.linear("projection", context, block.like(flat), residual)
    low = None
    if not last and spec.dtype != x.dtype and not block.has_norm("ffn_pre"):
        low = torch.empty((M, hidden), dtype=spec.dtype, device=x.device)
    shown = mask if last else None
    if block.has_norm("attention_post") or low is not None or shown is not None:
        block.norm("attention_post", y, y, low, shown, T)
    return y, low


def _check_masks(mask: Tensor | None, head_bias: Tensor | None, B: int, T: int) -> None:
    if mask is not None:
        lengths = mask.dtype == torch.int64
        if not lengths and mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(
                f"mask has dtype {mask.dtype}; accepted: torch.int64 (lengths), torch.bool, "
                "floating"
            )
        accepted = (B,) if lengths else (B, T)
        if mask.shape != accepted:
            raise ValueError(
                f"mask has dtype {mask.dtype} and shape {tuple(mask.shape)}; accepted: "
                f"{list(accepted)}"
            )
    if head_bias is None:
        return
    if not head_bias.is_floating_point():
        raise TypeError(f"head_bias has dtype {head_bias.dtype}; accepted: floating")
    if head_bias.dim() != 3 or head_bias.shape[1:] != (T, T):
        raise ValueError(
            f"head_bias has shape {tuple(head_bias.shape)}; accepted: [heads, {T}, {T}]"
        )


def _context(
    block: Block, x: Tensor, mask: Tensor | None, head_bias: Tensor | None, B: int, T: int
) -> Tensor:
    """``softmax(scale q kᵀ + masks) v`` of the kept heads, [M, heads * head_dim]."""
    spec = block.spec
    weight = block.get("qkv.weight")
    assert weight is not None
    d, heads, kv_heads = spec.head_dim, spec.heads, spec.kv_heads
    bias = block.get("qkv.bias")
    if _by_torch(x, weight, bias):
        qkv = F.linear(x, weight, bias)
    else:
        qkv = torch.empty((B * T, weight.shape[0]), dtype=spec.dtype, device=x.device)
        block.linear("qkv", x, qkv)
    strides = (T * qkv.stride(0), d, qkv.stride(0), 1)
    q, k, v = (
        qkv.as_strided((B, n, T, d), strides, first * d)
        for n, first in ((heads, 0), (kv_heads, heads), (kv_heads, heads + kv_heads))
    )
    added, unseen = _scores_mask(spec, mask, head_bias, qkv, T)
    context = F.scaled_dot_product_attention(
        q, k, v, added, is_causal=spec.causal and added is None, scale=spec.scale,
        enable_gqa=heads != kv_heads,
    )  # fmt: skip
    if unseen is not None:
        context = context.masked_fill(unseen, 0.0)
    return context.transpose(1, 2).reshape(B * T, heads * d)


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product that nothing but a bias follows is left to PyTorch's library.

    On an H100, 4096 x 768 -> 640 in bfloat16 took cuBLAS 13.0 us and a Triton kernel 18.7 us
    (bench/results/h100-2026-11-22-indexed-linear.md); the packs' widths are multiples of 64, at
    which it does not lose what it loses at odd ones. Not float32, whose precision the library takes
    from a setting of now and a pack from its own.
    """
    halves = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return halves and x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)


def _scores_mask(
    spec: Spec, mask: Tensor | None, head_bias: Tensor | None, like: Tensor, T: int
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, in the dtype of ``like`` and broadcast to [B, heads, T, T]; and
    which queries see no key, where others of their sequence do."""
    added = None
    if mask is not None:
        bools = head_bias is None and not spec.causal
        added = _keys(mask, like, T, bools=bools)[:, None, None, :]
    if head_bias is not None:
        wide = head_bias.to(like.dtype)
        if wide.shape[0] != spec.heads:
            raise ValueError(f"head_bias is of {wide.shape[0]} heads; accepted: {spec.heads}")
        added = wide[None] if added is None else added + wide
    if not spec.causal or added is None:
        return added, None
    later = torch.ones(T, T, dtype=torch.bool, device=like.device).triu(1)
    added = added.masked_fill(later, float("-inf"))
    unseen = (added <= removed(like.dtype)).all(-1, keepdim=True)
    return added, unseen


def _keys(mask: Tensor, like: Tensor, T: int, *, bools: bool) -> Tensor:
    """What a mask adds to the scores, [B, T] in the dtype of ``like``; or, where ``bools`` will do,
    which keys it keeps."""
    if mask.is_floating_point():
        if mask.dtype == like.dtype:
            return mask
        return mask.to(like.dtype).masked_fill(mask <= removed(mask.dtype), float("-inf"))
    keep = mask
    if mask.dtype == torch.int64:
        keep = torch.arange(T, device=mask.device) < mask[:, None]
    if bools:
        return keep
    return like.new_zeros(keep.shape).masked_fill(keep.logical_not(), float("-inf"))
