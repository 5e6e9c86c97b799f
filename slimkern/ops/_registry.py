"""The only calls of ``torch.library``: an op's schema, its fake, and its table of implementations.

An op's last argument is always the name of the backend that computes it. A backend is a module
beside the op's ``api.py``, imported when it is first used: nothing imports triton before then.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

_LIBRARY = torch.library.Library("slimkern", "DEF")
_DEVICES = {"reference": ("cpu", "cuda", "meta"), "cpu": ("cpu",), "triton": ("cuda",)}
Pass = Literal["forward", "backward"]
_GRADIENTS = ("_grad", "_dx", "_dw", "_db")  # how the names of ops of a backward end
# What Triton's kernels compute in; the products of the first two are exact in float32.
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_preferred: str | None = None


@contextmanager
def prefer_backend(name: str) -> Iterator[None]:
    """For the time of a ``with``: ops that are not told their backend take this one, if they have
    it and it computes in their dtype.

    For checks: with Triton's interpreter (``TRITON_INTERPRET=1`` before the first import of a
    kernel), ``triton`` runs a whole model on the CPU as it runs on a GPU. Of all threads, one at a
    time may hold a preference.

    Raises:
        ValueError: no backend of that name; in an op, one that does not run on its device.
    """
    global _preferred
    if name not in _DEVICES:
        raise ValueError(f"backend is {name!r}; accepted: {', '.join(_DEVICES)}")
    before, _preferred = _preferred, name
    try:
        yield
    finally:
        _preferred = before


@dataclass(frozen=True)
class Backends:
    """Which modules compute an op, and which of them by default.

    Attributes:
        package: the op's package; backend ``cpu`` is its module ``cpu``.
        default: device type -> name of the backend used where none is asked for.
        fast: (device type, dtype) -> name of one that is preferred to it.
        units: what backend ``cpu`` computes with: no kernel of its own (``none``), vectors, or
            matrix products too, for which some CPUs have tiles.
        dtypes: name -> what it computes in; for others ``reference`` is the default.
    """

    package: str
    default: dict[str, str]
    fast: dict[tuple[str, torch.dtype], str] = field(default_factory=dict)
    units: Literal["none", "vectors", "products"] = "vectors"
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(default_factory=dict)

    def choose(
        self, backend: str | None, device: torch.device, dtype: torch.dtype | None = None
    ) -> str:
        """The backend for tensors of ``dtype`` on ``device``.

        Raises:
            ValueError: an unknown backend, or one that does not run on that device.
        """
        if backend is None and _preferred in self.default.values() and self._takes(dtype):
            backend = _preferred
        if backend is None:
            if device.type not in self.default:
                raise ValueError(
                    f"x is on device {device.type!r}; accepted: {', '.join(self.default)}"
                )
            name = self.default[device.type]
            if dtype is None:
                return name
            name = self.fast.get((device.type, dtype), name)
            return name if dtype in self.dtypes.get(name, (dtype,)) else "reference"
        if backend not in _DEVICES:
            raise ValueError(f"backend is {backend!r}; accepted: None, {', '.join(_DEVICES)}")
        if device.type not in _DEVICES[backend] and not (backend == "triton" and _interpreted()):
            raise ValueError(
                f"backend {backend!r} runs on {', '.join(_DEVICES[backend])}; "
                f"x is on {device.type!r}"
            )
        return backend

    def _takes(self, dtype: torch.dtype | None) -> bool:
        return dtype is None or dtype in self.dtypes.get(str(_preferred), (dtype,))


@dataclass(frozen=True)
class Op:
    """A registered op: its name, its table, and in which passes of training it is called."""

    name: str
    backends: Backends
    passes: tuple[Pass, ...]

    def has(self, backend: str) -> bool:
        """Whether that backend's module has the op; read from its text, as it may import triton."""
        spec = importlib.util.find_spec(self.backends.package)
        places = spec.submodule_search_locations if spec is not None else None
        path = Path((places or [""])[0], f"{backend}.py")
        return path.exists() and self.name in _defined(path.read_text(encoding="utf-8"))


def _defined(text: str) -> set[str]:
    """The names of functions and imports at the top of a module."""
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


OPS: dict[str, Op] = {}
COMPOSED: dict[str, tuple[str, ...]] = {}  # function -> packages of the ops it is made of


def compose(name: str, parts: tuple[str, ...]) -> None:
    """Notes that ``slimkern.ops.name`` is made of the registered ops of the packages ``parts``."""
    COMPOSED[name] = parts


def _interpreted() -> bool:
    """Triton's interpreter runs its kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _implementation(package: str, backend: str, name: str) -> Callable[..., Any]:
    try:
        return getattr(importlib.import_module(f"{package}.{backend}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise RuntimeError(
            f"{name} on a GPU is computed by Triton, and the package triton is not installed: "
            "pip install triton (on Linux; PyTorch's wheels for GPUs bring it along)"
        ) from error


def define_op(
    name: str,
    arguments: str,
    fake: Callable[..., Any],
    backends: Backends,
    returns: str = "Tensor",
    passes: tuple[Pass, ...] | None = None,
) -> Callable[..., Any]:
    """Registers ``slimkern::name`` for CPU and CUDA and returns its overload.

    Args:
        name: the op's, and the function's in each backend's module.
        arguments: the schema's argument list without the backend.
        fake: shapes and dtypes of the result, from the arguments without the backend.
        backends: the op's table.
        returns: the schema's results.
        passes: in which passes of training it is called; None: as the end of its name says.
    """
    package = backends.package
    usual: Pass = "backward" if name.endswith(_GRADIENTS) else "forward"
    OPS[name] = Op(name, backends, passes or (usual,))

    def compute(*args: Any) -> Any:
        # What autocast asks for was done above; inside, a product keeps the dtypes it was given.
        with torch._C._DisableAutocast():
            return _implementation(package, args[-1], name)(*args[:-1])

    def fake_with_backend(*args: Any) -> Any:
        return fake(*args[:-1])

    _LIBRARY.define(f"{name}({arguments}, str backend) -> {returns}")
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, compute, key)
    torch.library.register_fake(f"slimkern::{name}", fake_with_backend, lib=_LIBRARY)
    return getattr(torch.ops.slimkern, name).default
