"""Launches of Triton kernels at the price of a dictionary look-up.

Triton looks at each argument of each launch to find out which of a kernel's compiled variants fits.
What it looks at are types, sizes and the alignment of addresses. Launches repeat for every step and
layer of a model, so the variant found is kept here under those same properties: of a number whether
it is one, a multiple of 16 or neither, so that sizes which change with each batch are found too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton import JITFunction

from slimkern.ops._tile import ON_AMD

# Before Triton 3.3 a compiled kernel took the arguments that were not constants to it, and no
# others: which those are is left to Triton there.
_REMEMBERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
_MOST = 1024  # launches remembered; a program with more variants than that starts over
_found: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def _kind(argument: Any) -> Any:
    """What Triton may specialize a kernel for."""
    if isinstance(argument, Tensor):
        # On AMD GPUs there are variants for tensors whose offsets fit in 32 bits.
        small = not ON_AMD or argument.untyped_storage().nbytes() < 1 << 31
        return argument.dtype, argument.data_ptr() % 16 == 0, small
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    if argument is None or isinstance(argument, bool):
        return argument
    if isinstance(argument, int):
        if -(1 << 31) <= argument < 1 << 31:
            return 1 if argument == 1 else 16 * (argument % 16 == 0)
        return int, argument % 16 == 0, argument >= 1 << 63
    if isinstance(argument, float):
        return float  # any value: float32 in every variant
    return argument.base.dtype, *argument.block_shape  # a tensor descriptor


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor) -> Callable[..., None]:
    """``kernel[grid]`` on the GPU of ``on``: call it with the kernel's arguments.

    Tensors, descriptors, numbers, None and tuples of them go by position; compile-time constants
    and Triton's own options by name.

    Args:
        kernel: a function under ``triton.jit``; whatever else stands in its place is called as is.
        grid: how many programs, in one to three dimensions.
        on: a tensor on the device in question.
    """
    return partial(_launch, kernel, grid, on)


def _launch(
    kernel: Any, grid: tuple[int, ...], on: Tensor, *arguments: Any, **constants: Any
) -> None:
    if not isinstance(kernel, JITFunction):
        kernel[grid](*arguments, **constants)
        return
    device = on.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, on, *arguments, **constants)
        return
    key = (kernel, device, tuple(map(_kind, arguments)), *constants.values())
    known = _found.get(key)
    if known is not None:
        compiled, rest = known
        compiled[(*grid, 1, 1)[:3]](*arguments, *rest)
        return
    compiled = kernel[grid](*arguments, **constants)
    if not _REMEMBERS:
        return
    rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    if len(_found) >= _MOST:
        _found.clear()
    _found[key] = compiled, rest
