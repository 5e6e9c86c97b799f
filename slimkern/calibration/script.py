"""What one forward does: the calls of its modules, and who uses what they return.

From this follows where a forward can be resumed: after a given module, everything that was returned
before is either put back from storage or, where nothing outside of finished modules looks at it,
stood in for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from slimkern.calibration.batches import Batch

_SAMPLE = 16  # rows of an input that are kept for comparison


@dataclass
class Call:
    """One call of a module: the ``nth`` of the module ``name``, from ``start`` to ``end``."""

    name: str
    nth: int
    start: int
    parent: int
    end: int = -1


@dataclass(frozen=True)
class Op:
    """An operation of torch at ``time``, and the tensors (by number) that it took."""

    time: int
    takes: tuple[int, ...]
    in_place: bool


@dataclass(frozen=True)
class Frontier:
    """What is done when a module has returned.

    Attributes:
        done: the outermost calls that have ended, ``(module, nth call) -> index``.
        needed: what they returned and is still looked at: ``index -> leaves``.
        changed: ``(index, leaf)`` that an operation changes in place: it gets a copy.
    """

    done: dict[tuple[str, int], int] = field(default_factory=dict)
    needed: dict[int, frozenset[int]] = field(default_factory=dict)
    changed: frozenset[tuple[int, int]] = frozenset()


@dataclass
class Script:
    """The record of one forward.

    Attributes:
        calls: in order of their start.
        ops: in order of time.
        made_by: per tensor the operation that made it; -1: it was there before.
        returned_by: per tensor the calls that returned it, with its place among their outputs.
        samples: watched module -> some rows of its first input.
    """

    calls: list[Call] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    made_by: list[int] = field(default_factory=list)
    returned_by: list[list[tuple[int, int]]] = field(default_factory=list)
    samples: dict[str, list[Tensor]] = field(default_factory=dict)

    def times(self, name: str) -> int:
        """How often the module ``name`` was called."""
        return sum(call.name == name for call in self.calls)

    def position(self, name: str) -> int:
        """When the module ``name`` was first called."""
        return next(call.start for call in self.calls if call.name == name)

    def after(self, name: str) -> Frontier:
        """What is done when the module ``name``, called once, has returned.

        Raises:
            ValueError: the rest of the forward looks at something that a finished module made and
                did not return.
        """
        now = next(call.end for call in self.calls if call.name == name)
        done = {
            i: call
            for i, call in enumerate(self.calls)
            if call.end <= now and (call.parent < 0 or self.calls[call.parent].end > now)
        }
        needed: dict[int, set[int]] = {}
        changed: set[tuple[int, int]] = set()
        waiting = [op for op in self.ops if op.time > now]
        visited = {op.time for op in waiting}
        while waiting:
            op = waiting.pop()
            for place, tensor in enumerate(op.takes):
                stored = next((r for r in self.returned_by[tensor] if r[0] in done), None)
                if stored is not None:
                    needed.setdefault(stored[0], set()).add(stored[1])
                    changed |= {stored} if op.in_place and not place else set()
                elif self.made_by[tensor] >= 0:
                    maker = self.ops[self.made_by[tensor]]
                    self._check_open(maker, done, name)
                    if maker.time not in visited:
                        visited.add(maker.time)
                        waiting.append(maker)
        return Frontier(
            {(call.name, call.nth): i for i, call in done.items()},
            {i: frozenset(leaves) for i, leaves in needed.items()},
            frozenset(changed),
        )

    def _check_open(self, op: Op, done: dict[int, Call], name: str) -> None:
        for call in done.values():
            if call.start < op.time < call.end:
                raise ValueError(
                    f"the forward can't be resumed after {name!r}: {call.name!r} makes a tensor "
                    f"that is used later, and does not return it (a change in place, or an object "
                    f"that hides it)"
                )


class _Watch(TorchFunctionMode):
    """Notes every operation, what it took and what it made."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.time = 0
        self.paused = False
        self.numbers: dict[int, int] = {}  # id of a tensor -> its number
        self.alive: list[Any] = []  # so that no id is given twice

    def tick(self) -> int:
        self.time += 1
        return self.time

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or asks_for_shape(func):
            return func(*args, **kwargs)
        takes = tuple(self._number(v) for v in _tensors((args, kwargs)))
        writes = changes_in_place(func)
        self.script.ops.append(Op(self.tick(), takes, writes))
        result = func(*args, **kwargs)
        made = _tensors(result)
        if writes:
            made += _tensors(args[:1])
        for tensor in made:
            if writes or id(tensor) not in self.numbers:  # dropout that is off returns its input
                self._number(tensor, len(self.script.ops) - 1)
        return result

    def _number(self, tensor: Tensor, maker: int | None = None) -> int:
        """The number of a tensor; a new one where it is new, or has just been made."""
        if maker is not None or id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.script.made_by)
            self.script.made_by.append(-1 if maker is None else maker)
            self.script.returned_by.append([])
            self.alive.append(tensor)
        return self.numbers[id(tensor)]

    def returned(self, index: int, output: Any) -> None:
        self.alive.append(output)
        for leaf, value in enumerate(pytree.tree_leaves(output)):
            if isinstance(value, Tensor):
                self.script.returned_by[self._number(value)].append((index, leaf))


def _tensors(data: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(data) if isinstance(v, Tensor)]


def asks_for_shape(func: Any) -> bool:
    """Whether a function of torch tells of a tensor's form only, whatever its values are."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func.__self__, "__name__", "") in _FORM
    return getattr(func, "__name__", "") in _FORM


def changes_in_place(func: Any) -> bool:
    """Whether a function of torch, by its name, writes into its first argument."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in _WRITERS
    return name.endswith("_") and not name.startswith("_")


_FORM = {
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn"),
    *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_sparse", "is_nested", "is_quantized"),
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "__len__"),
    *("is_floating_point", "is_complex", "is_contiguous", "get_device", "type", "storage_offset"),
}
_WRITERS = {
    *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "and", "or", "xor", "pow")),
    "__setitem__",
}


def record(model: nn.Module, batch: Batch, watched: set[str]) -> Script:
    """Run ``model`` once on ``batch`` and write down what happens.

    The model should be in evaluation mode; it is left as it was.

    Args:
        model: the model.
        batch: what it is run on.
        watched: modules of which some input rows are kept.
    """
    script = Script()
    watch = _Watch(script)
    open_calls: list[int] = [-1]
    counts: dict[str, int] = {}

    def wrap(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if name in watched and args:
                watch.paused = True
                script.samples.setdefault(name, []).append(sample(args[0]))
                watch.paused = False
            index = len(script.calls)
            nth = counts.get(name, 0)
            counts[name] = nth + 1
            script.calls.append(Call(name, nth, watch.tick(), open_calls[-1]))
            open_calls.append(index)
            output = run(*args, **kwargs)
            open_calls.pop()
            script.calls[index].end = watch.tick()
            watch.returned(index, output)
            return output

        return forward

    changes = {name: wrap(name, m.forward) for name, m in model.named_modules() if name}
    with replaced_forwards(model, changes), torch.no_grad(), watch:
        batch.call(model)
    return script


def sample(activations: Tensor) -> Tensor:
    """A few rows, evenly spread."""
    rows = activations.detach().flatten(0, -2)
    return rows[:: max(1, len(rows) // _SAMPLE)][:_SAMPLE].clone()


@contextmanager
def replaced_forwards(
    model: nn.Module, changes: dict[str, Callable[..., Any]]
) -> Iterator[nn.Module]:
    """For the time of a ``with``: modules by name run another forward. Put back whatever happens.

    torch's fused path of its own encoder layer is off meanwhile: it calls no modules.
    """
    modules = {name: model.get_submodule(name) for name in changes}
    before = {name: m.__dict__.get("forward") for name, m in modules.items()}
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for name, module in modules.items():
            module.__dict__["forward"] = changes[name]
        yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for name, module in modules.items():
            module.__dict__.pop("forward", None)
            if before[name] is not None:
                module.__dict__["forward"] = before[name]
