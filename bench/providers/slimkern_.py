"""slimkern, once per set of kernels: the equation, each instruction set, Triton.

``indexed_linear`` is called for works tagged ``indexed``, ``block_masked_linear`` for ``blocks``,
``packed_linear`` for linears alone; FFNs, attention, layers and models are fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import slimkern
from bench.providers._common import (
    MATMUL,
    backward_call,
    forward_call,
    placed,
    placed_inputs,
    wrong_device,
)
from bench.providers.base import Call, Provider
from bench.work import Outputs, Setting, Work
from slimkern.ops import choose_math, pack_linear, packed_linear
from slimkern.report.speed_schema import PRECISIONS

SCALAR_FLOPS = 1e9
_BF16 = ("avx512_bf16", "amx")  # instruction sets that multiply bfloat16


def slimkern_providers() -> list[Provider]:
    """The reference, the instruction sets of this machine in rising order, Triton."""
    kernels: list[Provider] = [Slimkern("reference", "reference")]
    kernels += [Slimkern(isa, "cpu", isa) for isa in slimkern.cpu.available_isas()]
    return [*kernels, Slimkern("triton", "triton")]


class Slimkern(Provider):
    """One set of kernels.

    Attributes:
        backend: the ops' ``backend``.
        isa: the instruction set that is used during a call; None leaves it.
    """

    precisions = PRECISIONS

    def __init__(self, label: str, backend: str, isa: str | None = None) -> None:
        self.name = f"slimkern {label}"
        self.backend, self.isa = backend, isa

    def refuses(self, work: Work, setting: Setting) -> str | None:
        device = {"cpu": "cpu", "triton": "cuda"}.get(self.backend, setting.device)
        if device != setting.device:
            return "runs on a GPU only" if device == "cuda" else "runs on the CPU only"
        if self.isa == "scalar" and work.flops > SCALAR_FLOPS:
            return f"scalar code, and {work.flops:.1e} operations: over {SCALAR_FLOPS:.0e}"
        if not {"indexed", "blocks"} & work.tags:
            if self.backend == "reference" or (self.backend == "triton" and "linear" in work.tags):
                return "no kernel for this work yet"
            if work.backward:
                return "fused modules are for inference"
            if self.isa is None:
                return wrong_device(setting)
        elif self.isa is None:
            if setting.precision in ("fp32-high", "fp32-medium"):
                return "no kernel for this precision yet: the same as fp32"
            return wrong_device(setting)
        return self._as_another(work, setting)

    def _as_another(self, work: Work, setting: Setting) -> str | None:
        """Why an instruction set's figure would say nothing beside those of the others."""
        assert self.isa is not None
        better = [isa for isa in _BF16 if isa in slimkern.cpu.available_isas()]
        if self.isa not in _BF16 and better and not work.smoke:  # which keeps each of them alive
            if setting.precision not in ("fp32", "fp32-high"):
                return f"rounds to bfloat16 in software: {better[0]} has instructions for it"
            if self.isa == "avx512":
                return f"as {better[0]}: in float32 it has the same kernels"
        with _isa(self.isa):
            wanted = {p: choose_math(torch.float32, MATMUL[p]) for p in ("fp32", "fp32-high")}
        if setting.precision == "fp32-high" and wanted["fp32-high"] == wanted["fp32"]:
            return "as fp32: no products between float32 and bfloat16 without AMX"
        return None

    def prepare(self, work: Work, setting: Setting) -> Call:
        module = placed(work.build(), setting)
        inputs = placed_inputs(work, setting)
        with self._in_use():
            run = self._run(module, work, setting)
        if work.backward:
            call = backward_call(work, run, list(module.parameters()), inputs, setting)
        else:
            call = forward_call(run, inputs, setting)

        def with_isa() -> Outputs:
            with self._in_use():
                return call()

        return with_isa

    def _in_use(self) -> Any:
        return nullcontext() if self.isa is None else _isa(self.isa)

    def _run(self, module: Any, work: Work, setting: Setting) -> Callable[..., Tensor]:
        if "indexed" in work.tags:
            return self._indexed(module)
        return self._blocks(module) if "blocks" in work.tags else _fused(module, setting)

    def _blocks(self, module: Any) -> Callable[[Tensor], Tensor]:
        from slimkern.ops import BlockMask, block_masked_linear

        bn, bk = module.block
        N, K = module.weight.shape
        mask = BlockMask.from_blocks(module.mask[::bn, ::bk].bool(), (bn, bk), (N, K))

        def run(x: Tensor) -> Tensor:
            return block_masked_linear(x, module.weight, module.bias, mask, backend=self.backend)

        return run

    def _indexed(self, module: Any) -> Callable[[Tensor], Tensor]:
        from slimkern.ops import indexed_linear

        def run(x: Tensor) -> Tensor:
            return indexed_linear(
                x, module.weight, module.bias, module.rows, module.cols, backend=self.backend
            )

        return run


def _fused(module: nn.Module, setting: Setting) -> Callable[..., Tensor]:
    """The module on fused kernels in the setting's precision; a linear alone on its own."""
    precision = MATMUL[setting.precision]
    if not isinstance(module, nn.Linear):
        return slimkern.fuse_(module, precision=precision)
    math = choose_math(module.weight.dtype, precision)
    packed = pack_linear(module.weight, module.bias, math=math)

    def run(x: Tensor) -> Tensor:
        return packed_linear(x, packed)

    return run


@contextmanager
def _isa(name: str) -> Iterator[None]:
    """Kernels of instruction set ``name`` for the time of a ``with``."""
    before = slimkern.cpu.isa()
    slimkern.cpu.set_isa(name)
    try:
        yield
    finally:
        slimkern.cpu.set_isa(before)
