"""What each op launches. A module of this folder is found by its being here.

A module has ``cases(meta)``, which yields :class:`Case`, and ``KERNELS``, what its kernels promise:

    KERNELS = {"_double_kernel": Promise(matrix=False)}

    def cases(meta: Meta) -> Iterator[Case]:
        from slimkern.ops.double import triton as ops

        for dtype, full in meta.dtypes():
            x = meta(8192, 768, dtype=dtype)
            yield Case(f"double {dtype}", dtype, partial(ops.double, x), full)

A kernel that no case launches, and a launched kernel that promises nothing, are errors.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tests.compile.targets import Target


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        name: what is special about it.
        dtype: of the operands; ``tf32`` is float32 under that precision.
        call: launches.
        full: whether only the full matrix has it.
        narrow: why its loads may be narrower than 16 bytes; empty where they may not.
    """

    name: str
    dtype: str
    call: Callable[[], object]
    full: bool = False
    narrow: str = ""


@dataclass(frozen=True)
class Promise:
    """What is intended of a kernel, in every configuration.

    Attributes:
        matrix: whether its products are for the matrix units (float32 at full precision has none
            on NVIDIA GPUs, and must not use them).
        blocks: resident blocks per multiprocessor, at least.
        warps: resident warps per multiprocessor, at least: by ``blocks`` or more.
        narrow: why its loads may be narrower than 16 bytes; empty where they may not.
    """

    matrix: bool = True
    blocks: int = 1
    warps: int = 8
    narrow: str = ""


class Meta:
    """Makes tensors without memory, for launches on a target."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __call__(self, *shape: int, dtype: str = "fp16") -> Any:
        """A tensor of ``shape`` and of a dtype's short name."""
        import torch

        types = {"fp16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64}
        types |= {"i32": torch.int32, "u8": torch.uint8, "bool": torch.bool}
        return torch.empty(shape, dtype=types.get(dtype, torch.float32), device="meta")

    def index(self, size: int) -> Any:
        return self(size, dtype="i64")

    def dtypes(self) -> Iterator[tuple[str, bool]]:
        """(dtype, whether only the full matrix has it); AMD GPUs have no tf32."""
        yield "fp16", False
        yield "fp32", False
        yield "bf16", True
        if self.target.backend == "cuda":
            yield "tf32", True


def _listed() -> Iterator[ModuleType]:
    for info in pkgutil.iter_modules(__path__):
        yield importlib.import_module(f"{__name__}.{info.name}")


def collect(meta: Meta) -> dict[str, list[Case]]:
    """The cases of every op."""
    return {module.__name__.split(".")[-1]: list(module.cases(meta)) for module in _listed()}


def promises() -> dict[str, Promise]:
    """What every kernel promises."""
    return {name: promise for module in _listed() for name, promise in module.KERNELS.items()}
