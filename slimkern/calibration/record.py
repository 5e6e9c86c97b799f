"""Writing down what one forward does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from slimkern.calibration.batches import Batch
from slimkern.calibration.script import Call, Op, Script

_SAMPLE = 16  # rows of an input that are kept for comparison


class _Watch(TorchFunctionMode):
    """Notes every operation, what it took and what it made."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.time = 0
        self.paused = False
        self.numbers: dict[int, int] = {}  # id of a tensor -> its number
        self.sharing: dict[int, list[Tensor]] = {}  # by memory; they live, so no id comes twice

    def tick(self) -> int:
        self.time += 1
        return self.time

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or asks_for_shape(func):
            return func(*args, **kwargs)
        given = _tensors((args, kwargs))
        takes = [self._number(tensor) for tensor in given]
        versions = [_version(tensor) for tensor in given]
        time = self.tick()
        result = func(*args, **kwargs)
        written = [t for t, version in zip(given, versions) if _version(t) != version]
        alike = [t for memory in {_memory(t) for t in written} for t in self.sharing[memory]]
        changes = tuple(self._number(tensor) for tensor in alike)
        made = _tensors(result)
        self.script.ops.append(Op(time, (*takes, *changes), changes, not made))
        for tensor in alike:
            self._number(tensor, len(self.script.ops) - 1)
        for tensor in made:
            if id(tensor) not in self.numbers:  # dropout that is off returns its input
                self._number(tensor, len(self.script.ops) - 1)
        return result

    def _number(self, tensor: Tensor, maker: int | None = None) -> int:
        """The number of a tensor; a new one where it is new, or has just been made."""
        if id(tensor) not in self.numbers:
            self.sharing.setdefault(_memory(tensor), []).append(tensor)
        if maker is not None or id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = len(self.script.made_by)
            self.script.made_by.append(-1 if maker is None else maker)
            self.script.returned_by.append([])
        return self.numbers[id(tensor)]

    def returned(self, index: int, output: Any) -> None:
        for leaf, value in enumerate(pytree.tree_leaves(output)):
            if isinstance(value, Tensor):
                self.script.returned_by[self._number(value)].append((index, leaf))


def _tensors(data: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(data) if isinstance(v, Tensor)]


def _version(tensor: Tensor) -> int:
    """How often a tensor, or what shares its memory, has been changed."""
    return 0 if tensor.is_inference() else tensor._version  # such ones can't be changed here


def _memory(tensor: Tensor) -> int:
    """The same number for tensors that lie in the same memory: views, and what they are of."""
    strided = tensor.layout == torch.strided
    return tensor.untyped_storage()._cdata if strided else id(tensor)


def asks_for_shape(func: Any) -> bool:
    """Whether a function of torch tells of a tensor's form only, whatever its values are."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func.__self__, "__name__", "") in _FORM
    return getattr(func, "__name__", "") in _FORM


_FORM = {
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn"),
    *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_sparse", "is_nested", "is_quantized"),
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "__len__"),
    *("is_floating_point", "is_complex", "is_contiguous", "get_device", "type", "storage_offset"),
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
            if name in watched:
                watch.paused = True
                script.samples.setdefault(name, []).append(sample(first_input(args, kwargs)))
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


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a linear is called with."""
    tensor: Tensor = args[0] if args else kwargs["input"]
    return tensor


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
