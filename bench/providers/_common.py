"""What the providers share: modules and inputs in a precision, gradients, what is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bench.check import output_gradient
from bench.providers.base import Call
from bench.work import Outputs, Setting, Work

INSTALL = "not installed: pip install 'slimkern[bench]'"
MATMUL = {"fp32": "highest", "fp32-high": "high", "fp32-medium": "medium", "bf16": "highest"}
"""Precision -> what ``torch.set_float32_matmul_precision`` is set to during a call."""


def missing(*packages: str) -> str | None:
    """Why a provider of these packages can't run, or None; imports nothing."""
    absent = [package for package in packages if find_spec(package) is None]
    return f"{INSTALL} ({', '.join(absent)})" if absent else None


def wrong_device(setting: Setting) -> str | None:
    """Why this device can't be used: there is none; or None."""
    if setting.device == "cuda" and not torch.cuda.is_available():
        return "no GPU that torch can use"
    return None


def dtype_of(setting: Setting) -> torch.dtype:
    """The dtype that weights and activations are held in."""
    return torch.bfloat16 if setting.precision == "bf16" else torch.float32


def placed(module: nn.Module, setting: Setting) -> nn.Module:
    """The module, in the dtype and on the device of ``setting``."""
    return module.to(setting.device, dtype_of(setting)).eval()


def placed_inputs(work: Work, setting: Setting) -> tuple[Tensor, ...]:
    """The inputs; floating ones in the dtype of ``setting``."""
    dtype = dtype_of(setting)
    return tuple(
        x.to(setting.device, dtype) if x.is_floating_point() else x.to(setting.device)
        for x in work.inputs()
    )


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """``torch.set_float32_matmul_precision(name)`` for the time of a ``with``."""
    restore = _matmul_restorer()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        restore()


def _matmul_restorer() -> Callable[[], None]:
    """What brings back the setting of now. Torch's getter raises where the newer
    ``torch.backends.*.fp32_precision`` say something that it has no name for."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        knobs: list[Any] = [getattr(torch.backends, part).matmul for part in ("cuda", "mkldnn")]
        values = [knob.fp32_precision for knob in knobs]

        def restore() -> None:
            for knob, value in zip(knobs, values):
                knob.fp32_precision = value

        return restore
    return lambda: torch.set_float32_matmul_precision(before)


def forward_call(
    module: Callable[..., Tensor], inputs: tuple[Tensor, ...], setting: Setting
) -> Call:
    """One forward under ``torch.inference_mode`` and the setting's matmul precision."""
    name = MATMUL[setting.precision]

    def call() -> Outputs:
        with matmul_precision(name), torch.inference_mode():
            return (module(*inputs),)

    return call


def backward_call(
    work: Work,
    module: Callable[..., Tensor],
    parameters: list[nn.Parameter],
    inputs: tuple[Tensor, ...],
    setting: Setting,
) -> Call:
    """One forward and the backward of ``sum(y * g)``: y, dx, then the parameters' gradients.

    Args:
        work: whose g it is.
        module: called with ``inputs``.
        parameters: whose gradients are returned.
        inputs: floating ones get a gradient, in their order; integers get none.
        setting: its matmul precision is active during the call.
    """
    name = MATMUL[setting.precision]
    inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
    sought = [x for x in inputs if x.requires_grad] + parameters
    with torch.no_grad():
        g = output_gradient(work, module(*inputs))

    def call() -> Outputs:
        with torch.inference_mode(False), torch.enable_grad(), matmul_precision(name):
            y = module(*inputs)
            grads = torch.autograd.grad(y, sought, g)
        return (y.detach(), *grads)

    return call


def torch_call(work: Work, module: nn.Module, run: Callable[..., Tensor], setting: Setting) -> Call:
    """A call of ``run`` (the module itself, or compiled), backward where the work asks for it."""
    inputs = placed_inputs(work, setting)
    if work.backward:
        return backward_call(work, run, list(module.parameters()), inputs, setting)
    return forward_call(run, inputs, setting)
