"""Calls of the fused C++ blocks: sizes checked, result and scratch allocated, addresses passed.

Everything that C++ takes on trust (addresses, strides, dtypes, the shapes of masks) is checked here
on each call; everything that it can check itself (the pack, sizes against it, scratch, lengths) it
checks before it reads or writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops import _native

_ROW_DTYPES = {torch.float32: _native.DTYPES[torch.float32],
               torch.bfloat16: _native.DTYPES[torch.bfloat16]}  # fmt: skip
_NO_MASK = (_native.MASKS["none"], 0, 0, 0)
_NO_BIAS = (0, 0, 0, 0)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x with unit last stride, and its dtype's number."""
    code = _ROW_DTYPES.get(x.dtype)
    if code is None:
        raise TypeError(f"x has dtype {x.dtype}; accepted: torch.float32, torch.bfloat16")
    if not x.is_cpu:
        raise ValueError(f"x is on {x.device}; accepted: cpu")
    return (x if x.stride(-1) == 1 else x.contiguous()), code


def _pack(packed: Tensor) -> tuple[int, int]:
    """Where a pack lies."""
    if not packed.is_cpu:
        raise ValueError(f"packed is on {packed.device}; accepted: cpu")
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise TypeError("packed is no vector of bytes; accepted: what the pack functions return")
    return packed.data_ptr(), packed.numel()


def _scratch(like: Tensor, size: int) -> tuple[Tensor, tuple[int, int]]:
    made = like.new_empty(size)  # bytes, as a pack is; half the time of torch.empty
    return made, (made.data_ptr(), size)


def flat(x: Tensor, packed: Tensor, N: int | None) -> Tensor:
    """A linear (N outputs) or an FFN (N is None) on x [M, K] -> [M, N or K].

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or the pack is not for it.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: [M, K]")
    x, code = _rows(x)
    pack = _pack(packed)
    M, K = x.shape
    out = x.new_empty(M, K if N is None else N)
    threads = _native.threads()
    rows = (code, x.data_ptr(), 0, x.stride(0), 1, M, K, out.data_ptr())
    if N is None:
        memory, scratch = _scratch(packed, _native.ffn_scratch(pack, M, threads))
        _native.ffn(pack, rows, threads, scratch)
    else:
        memory, scratch = _scratch(packed, _native.packed_linear_scratch(pack, M, threads))
        _native.packed_linear(pack, rows, N, threads, scratch)
    del memory
    return out


def layer(x: Tensor, packed: Tensor, mask: Tensor | None, head_bias: Tensor | None) -> Tensor:
    """An attention block or an encoder layer on x [B, T, hidden] -> the same shape.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or the pack is not for it.
    """
    return layers(x, [packed], mask, head_bias)


def layers(
    x: Tensor, packed: list[Tensor], mask: Tensor | None, head_bias: Tensor | None
) -> Tensor:
    """Several of them, one after the other, in one call of C++.

    Raises:
        ValueError, TypeError: as `layer`.
    """
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: [B, T, hidden]")
    x, code = _rows(x)
    packs = [_pack(p) for p in packed]
    B, T, hidden = x.shape
    keys, kept_mask = _NO_MASK, mask
    if mask is not None:
        kept_mask, keys = _mask(mask, B, T)
    bias, kept_bias = _NO_BIAS, head_bias
    if head_bias is not None:
        kept_bias, bias = _bias(head_bias, T)
    out = x.new_empty(B, T, hidden)
    threads = _native.threads()
    rows = (code, x.data_ptr(), x.stride(0), x.stride(1), B, T, hidden, out.data_ptr())
    memory, scratch = _scratch(packed[0], _native.layers_scratch(packs, rows, threads))
    _native.layers(packs, rows, keys, bias, threads, scratch)
    del memory, kept_mask, kept_bias
    return out


def _mask(mask: Tensor, B: int, T: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The mask as C++ reads it, and what keeps that memory alive."""
    if not mask.is_cpu:
        raise ValueError(f"mask is on {mask.device}; accepted: cpu")
    if mask.dtype == torch.int64:
        if mask.shape != (B,):
            raise ValueError(
                f"mask has dtype torch.int64 and shape {tuple(mask.shape)}; accepted: lengths [{B}]"
            )
        return mask, (_native.MASKS["lengths"], mask.data_ptr(), mask.stride(0), 0)
    if mask.shape != (B, T):
        raise ValueError(f"mask has shape {tuple(mask.shape)}; accepted: [{B}, {T}]")
    if mask.dtype == torch.bool:
        kind = "keep"
    elif mask.is_floating_point():
        mask, kind = mask.float(), "added"
    else:
        raise TypeError(
            f"mask has dtype {mask.dtype}; accepted: torch.int64 (lengths), torch.bool, floating"
        )
    return mask, (_native.MASKS[kind], mask.data_ptr(), mask.stride(0), mask.stride(1))


def _bias(bias: Tensor, T: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The heads' bias as C++ reads it, and what keeps that memory alive."""
    if not bias.is_cpu or not bias.is_floating_point():
        raise TypeError(
            f"head_bias has dtype {bias.dtype} on {bias.device}; accepted: floating, on cpu"
        )
    if bias.dim() != 3 or bias.shape[1:] != (T, T):
        raise ValueError(f"head_bias has shape {tuple(bias.shape)}; accepted: [heads, {T}, {T}]")
    bias = bias.float()
    if bias.stride(2) != 1:
        bias = bias.contiguous()
    return bias, (bias.data_ptr(), bias.stride(0), bias.stride(1), bias.shape[0])
