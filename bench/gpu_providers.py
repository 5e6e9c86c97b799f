"""Who does the GPU's work: torch as a user writes it, cut beforehand, compiled; slimkern's kernels.

``torch eager`` of a masked linear gathers the kept part of the weight and hands it to cuBLAS, or
multiplies by the mask; ``torch, sliced before`` has the kept part already.
"""

from __future__ import annotations

import copy
import importlib
import signal
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import slimkern
from bench.providers._common import MATMUL, forward_call, placed, placed_inputs, torch_call
from bench.providers.base import Call, Provider, ProviderError
from bench.providers.eager import Eager
from bench.providers.training import AlreadySlim, DenseEager, MaskMultiply, SlimkernMasked
from bench.work import Outputs, Setting, Work
from slimkern.ops._registry import prefer_backend
from slimkern.report.speed_schema import PRECISIONS


def gpu_providers(compile_seconds: float) -> list[Provider]:
    """Providers of operations, layers and models, the measuring stick first."""
    own = (Triton(), Tuned(compile_seconds))
    return [Eager(), Sliced(), Multiplied(), CompiledInTime(compile_seconds), *own]


def step_providers() -> list[Provider]:
    """Providers of training steps, the measuring stick first."""
    return [MaskMultiply(), DenseEager(), AlreadySlim(), MaskedOnTriton()]


def by_triton(prepare: Callable[[], Call], setting: Setting) -> Call:
    """What ``prepare`` returns, on Triton's kernels: a GPU's default, on a CPU the interpreter."""
    if setting.device == "cuda":
        return prepare()
    with prefer_backend("triton"):
        call = prepare()

    def interpreted() -> Outputs:
        with prefer_backend("triton"):
            return call()

    return interpreted


class MaskedOnTriton(SlimkernMasked):
    """Masked training steps, always on Triton's kernels."""

    def prepare(self, work: Work, setting: Setting) -> Call:
        return by_triton(lambda: super(MaskedOnTriton, self).prepare(work, setting), setting)


def on_device(work: Work, device: str) -> Work:
    """The work with modules, inputs and reference that are made once, and stay on ``device``."""
    reference = work.reference and partial(work.reference, device=device)
    key = (work.level, work.name.removesuffix(" fwd+bwd"))
    return replace(
        work,
        build=partial(_copied, _Key((*key, device), work.build)),
        inputs=partial(_placed, _Key((work.case, device), work.inputs)),
        reference=reference,
    )


class _Key:
    """A maker of something, which is known by its name."""

    def __init__(self, name: tuple[str, ...], make: Callable[[], Any]) -> None:
        self.name, self.make = name, make

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.name == other.name


@lru_cache(maxsize=3)
def _module(key: _Key) -> nn.Module:
    with torch.inference_mode(False):
        return key.make().to(key.name[-1])


def _copied(key: _Key) -> nn.Module:
    with torch.inference_mode(False):
        return copy.deepcopy(_module(key))


@lru_cache(maxsize=2)
def _placed(key: _Key) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return tuple(tensor.to(key.name[-1]) for tensor in key.make())


class Sliced(Provider):
    """Plain torch on weights that were cut beforehand: what a masked one can reach at best."""

    name = "torch, sliced before"
    precisions = PRECISIONS

    def refuses(self, work: Work, setting: Setting) -> str | None:
        return None if {"part", "masked ffn"} & work.tags else "nothing is masked by index here"

    def prepare(self, work: Work, setting: Setting) -> Call:
        module = placed(work.build().sliced(), setting)
        return torch_call(work, module, module, setting)

    def expected(self, work: Work, reference: Outputs) -> Outputs:
        """What of the reference it has."""
        return work.build().kept(reference)


class Multiplied(Provider):
    """Plain torch on all channels, multiplied by zero or one."""

    name = "torch, mask multiplied"
    precisions = PRECISIONS

    def refuses(self, work: Work, setting: Setting) -> str | None:
        return None if "masked ffn" in work.tags else "what is multiplied by masks is torch eager"

    def prepare(self, work: Work, setting: Setting) -> Call:
        module: Any = placed(work.build(), setting)
        return torch_call(work, module, module.multiplied, setting)


class CompiledInTime(Provider):
    """``torch.compile``, given up after some seconds; forwards on the short list only.

    Operations and layers with ``max-autotune``; whole models with the default, as each of their
    products would be tuned. CUDA graphs are left to the harness, which captures everyone's calls.
    """

    name = "torch.compile"
    precisions = PRECISIONS

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def refuses(self, work: Work, setting: Setting) -> str | None:
        if not work.compiled or work.backward or setting.device != "cuda":
            return "not on the compile list: each shape takes a compile"
        return None

    def prepare(self, work: Work, setting: Setting) -> Call:
        module = placed(work.build(), setting)

        def run(*inputs: Tensor) -> Tensor:
            return module(*inputs)

        # What has been compiled hangs on a code object: each work gets its own.
        own = types.FunctionType(run.__code__.replace(), globals(), "run", None, run.__closure__)
        mode = None if work.level == "model" else "max-autotune-no-cudagraphs"
        call = forward_call(
            torch.compile(own, mode=mode, dynamic=False, fullgraph=True),
            placed_inputs(work, setting),
            setting,
        )
        try:
            with at_most(self.seconds, "compiling"):
                call()
        except ProviderError:
            torch._dynamo.reset()  # nothing half-made is left
            raise
        return call


class TakesTooLong(BaseException):
    """The time is up."""


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Ends what is inside after a number of seconds; in the main thread only.

    Raises:
        ProviderError: it took longer.
    """

    def ring(number: int, frame: object) -> None:
        raise TakesTooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TakesTooLong:
        raise ProviderError(f"{what} took more than {seconds:.0f} s and was given up") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


class Triton(Provider):
    """slimkern's kernels: the ops on masked weights; FFNs, layers and models fused."""

    name = "slimkern triton"
    precisions = PRECISIONS

    def refuses(self, work: Work, setting: Setting) -> str | None:
        op = next((op for tag, op in _OPS.items() if tag in work.tags), None)
        if op is not None and find_spec(f"slimkern.ops.{op}.triton") is None:
            return f"no kernel for {op} yet"
        if "slim" not in work.tags and not {"part", "blocks", "masked ffn"} & work.tags:
            return "nothing was cut here"
        return None

    def prepare(self, work: Work, setting: Setting) -> Call:
        module: Any = placed(work.build(), setting)
        makers = {"part": _linear_part, "blocks": _blocks, "masked ffn": _masked_ffn}
        make = next((make for tag, make in makers.items() if tag in work.tags), None)
        if make is not None:
            return torch_call(work, module, make(module), setting)

        def fused() -> Call:
            slimkern.fuse_(module, precision=MATMUL[setting.precision])
            return torch_call(work, module, module, setting)

        return by_triton(fused, setting)


class Tuned(Triton):
    """The same kernels on tiles chosen by measurement; on a short list, and given up in time."""

    name = "slimkern triton, tuned"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def refuses(self, work: Work, setting: Setting) -> str | None:
        if "tuned" not in work.tags or setting.device != "cuda":
            return "not on the tuning list: each product takes a compile per tile"
        if find_spec("slimkern.ops._tune") is None:
            return "tiles are chosen by sizes alone"
        return super().refuses(work, setting)

    def prepare(self, work: Work, setting: Setting) -> Call:
        tuning = importlib.import_module("slimkern.ops._tune").tuning

        def tuned() -> Outputs:
            with tuning():
                return call()

        with at_most(self.seconds, "tuning"), tuning():
            call = super().prepare(work, setting)
            with torch.inference_mode():
                call()
        return tuned


_OPS = {"part": "indexed_linear", "blocks": "block_masked_linear"}


def _linear_part(module: Any) -> Callable[..., Tensor]:
    rows, cols = module.rows, module.cols
    weight, bias = module.weight, module.bias
    ops: Any = torch.ops.slimkern
    if module.part == "fwd":
        return lambda x: slimkern.ops.indexed_linear(x, weight, bias, rows, cols, backend="triton")
    if module.part == "dx":
        return lambda gy: ops.indexed_linear_dx(gy, weight, rows, cols, "triton")
    return lambda gy, x: ops.indexed_linear_dw(gy, x, rows, cols, *weight.shape, "triton")


def _blocks(module: Any) -> Callable[..., Tensor]:
    from slimkern.ops import BlockMask, block_masked_linear

    (bn, bk), shape = module.block, tuple(module.weight.shape)
    mask = BlockMask.from_blocks(module.mask[::bn, ::bk].bool(), (bn, bk), shape)
    return lambda x: block_masked_linear(x, module.weight, module.bias, mask, backend="triton")


def _masked_ffn(module: Any) -> Callable[..., Tensor]:
    from slimkern.ops._weights import FfnWeights, LinearWeights, NormWeights
    from slimkern.ops.masked_ffn import masked_ffn

    norm = module.LayerNorm
    weights = FfnWeights(
        LinearWeights(module.fc1.weight, module.fc1.bias),
        LinearWeights(module.fc2.weight, module.fc2.bias),
        post=NormWeights(norm.weight, norm.bias, norm.eps),
    )
    return lambda x: masked_ffn(x, weights, module.keep, backend="triton")
