"""A GPU that is not there: launches reach it, are compiled for it, and end there.

The launchers of an op run as they are, on tensors without memory. Triton's own launcher specializes
their arguments for the target, so what is compiled is what a launch on that GPU would compile.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.compile.targets import Target


@dataclass
class Launch:
    """One kernel that was asked for, and what the compiler made of it.

    Attributes:
        kernel: its name.
        constants: its compile-time constants.
        indices: bytes of an element of its integer tensors: indices, bits, lists.
        itemsize: bytes of an element of its narrowest floating tensor.
        compiled: Triton's.
    """

    kernel: str
    constants: dict[str, Any]
    indices: list[int]
    itemsize: int
    compiled: Any


class Driver:
    """What Triton asks of a device before it compiles for it."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def _properties(target: Target) -> SimpleNamespace:
    major, minor = target.capability
    return SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=target.processors,
        shared_memory_per_block_optin=target.shared_block,
        shared_memory_per_block=min(target.shared_block, 48 << 10),
        warp_size=target.warp,
        gcnArchName=str(target.arch),
    )


def pretend(target: Target) -> None:
    """Makes this process one that has ``target``, for good. Before ``slimkern`` is imported."""
    import torch
    from triton.runtime import driver

    torch.version.hip = "6.3" if target.backend == "hip" else None  # type: ignore[misc]
    torch.cuda.get_device_capability = lambda device=None: target.capability
    torch.cuda.get_device_properties = lambda device=None: _properties(target)  # type: ignore
    torch.cuda.current_device = lambda: 0
    # Tensors without memory are on device "meta"; launchers ask for more.
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment, misc]
    torch.Tensor.get_device = lambda tensor: 0  # type: ignore[method-assign]
    torch.cuda.device_of = torch.cuda.device = lambda of: nullcontext()  # type: ignore[misc]
    # What may be captured in a graph asks nothing of values, which are not there.
    torch.cuda.is_current_stream_capturing = lambda: True
    driver.set_active(Driver(target))  # type: ignore[arg-type]


def modules() -> dict[str, ModuleType]:
    """Every module of ``slimkern.ops`` that holds a kernel, imported: ``ffn.triton`` -> module."""
    from triton import JITFunction

    import slimkern.ops

    found = {}
    for info in pkgutil.walk_packages(slimkern.ops.__path__, "slimkern.ops."):
        if info.ispkg or info.name.endswith(".cpu"):
            continue
        module = importlib.import_module(info.name)
        if any(isinstance(_jit(value), JITFunction) for value in vars(module).values()):
            found[info.name.removeprefix("slimkern.ops.")] = module
    return found


def _jit(value: Any) -> Any:
    """The function below an autotuner and heuristics."""
    while hasattr(value, "fn") and hasattr(value, "run") and not hasattr(value, "params"):
        value = value.fn
    return value


def kernels() -> set[str]:
    """The names of all functions ``*_kernel`` that can be launched."""
    from triton import JITFunction

    return {
        value.__name__
        for module in modules().values()
        for value in map(_jit, vars(module).values())
        if isinstance(value, JITFunction) and value.__name__.endswith("_kernel")
    }


@dataclass
class Tape:
    """Launches in their order. ``seen`` holds what was compiled before: once is enough."""

    launches: list[Launch] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)


class Forgetful(dict):
    """Remembers no launch, so that each goes through Triton's launcher."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


@contextmanager
def recorded(tape: Tape) -> Iterator[None]:
    """Within, every launch of a kernel is compiled and put on the tape; none runs."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    if launcher := sys.modules.get("slimkern.ops._launch"):
        vars(launcher)["_found"] = Forgetful()
    launch, tune = JITFunction.run, Autotuner.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        bound = dict(zip((param.name for param in self.params), args)) | kwargs
        _check_grid(grid, bound)
        if compiled.hash not in tape.seen:
            tape.seen.add(compiled.hash)
            tape.launches.append(_launch(self, bound, compiled))
        return compiled

    def every_config(self: Any, *args: Any, **kwargs: Any) -> None:
        for config in self.configs:
            self.fn.run(*args, **{**kwargs, **config.all_kwargs()})

    JITFunction.run, Autotuner.run = compile_only, every_config
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = launch, tune


def _check_grid(grid: Any, bound: dict[str, Any]) -> None:
    sizes = grid(bound) if callable(grid) else grid
    assert 0 < sizes[0] < 2**31, sizes
    assert all(0 < size < 2**16 for size in sizes[1:]), sizes


def _launch(kernel: Any, bound: dict[str, Any], compiled: Any) -> Launch:
    import torch

    constant = {param.name for param in kernel.params if param.is_constexpr}
    constants = {name: value for name, value in bound.items() if name in constant}
    flat = [v for value in bound.values() for v in (value if isinstance(value, tuple) else [value])]
    tensors = [getattr(value, "base", value) for value in flat]  # of a descriptor
    tensors = [value for value in tensors if isinstance(value, torch.Tensor)]
    sizes = [value.element_size() for value in tensors if value.is_floating_point()]
    others = {value.element_size() for value in tensors if not value.is_floating_point()}
    return Launch(kernel.__name__, constants, sorted(others), min(sizes, default=4), compiled)


def forget() -> None:
    """Clears what launchers of ``slimkern.ops`` remember from call to call."""
    for name, module in list(sys.modules.items()):
        if name.startswith("slimkern.ops"):
            for value in vars(module).values():
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


@contextmanager
def tile_number(position: int | None, counts: list[int], double: bool = False) -> Iterator[None]:
    """Within, the tile at ``position`` of its table is chosen, or the last where it is shorter.

    Args:
        position: 0 is the largest tile; None leaves the choice to the launcher.
        counts: receives the length of every table that is asked.
        double: whether to take the tile twice as large on both sides.
    """
    from slimkern.ops import _tile

    original = _tile.choose_tile

    @functools.wraps(original)
    def choose(tiles: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(len(tiles))
        if position is None:
            tile = original(tiles, *args, **kwargs)
        else:
            tile = tiles[min(position, len(tiles) - 1)]
        return tile._replace(a=2 * tile.a, b=2 * tile.b) if double else tile

    with _replaced(original, choose):
        yield


@contextmanager
def _replaced(original: Callable[..., Any], by: Callable[..., Any]) -> Iterator[None]:
    """``original`` replaced under every name that a module of the ops knows it by."""
    places = [
        (module, name)
        for key, module in list(sys.modules.items())
        if key.startswith("slimkern.ops")
        for name, value in list(vars(module).items())
        if value is original
    ]
    forget()
    for module, name in places:
        setattr(module, name, by)
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, original)
        forget()
