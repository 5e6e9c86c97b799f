"""Symbolic axes carried through every operation of one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from slimkern.discovery import rules
from slimkern.discovery.axes import Axis, Dim, mix
from slimkern.discovery.inputs import tensors_in
from slimkern.discovery.record import Call, Step, Trace, Value


class Recorder(TorchDispatchMode):
    """Writes down the operations of a forward, each with its place.

    Attributes:
        steps: the operations so far.
        stack: names of the modules whose forward is running, outermost first.
        quiet: set while a linear runs, which is one step of its own.
        fake: whether the forward runs on fake tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.stack: list[str] = []
        self.quiet = False
        self.fake = True

    def here(self) -> str:
        """The place in the model where the forward is right now."""
        return f"in {self.stack[-1]!r}" if self.stack and self.stack[-1] else "in the model"

    def begin(self, inputs: Any) -> None:
        """The forward is about to run on ``inputs``."""

    def linear(self, name: str, run: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """The forward of the linear ``name``."""
        self.quiet = True
        try:
            out = run(input)
        finally:
            self.quiet = False
        self.steps.append(Step("linear", (), name))
        return out

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.quiet and isinstance(func, torch._ops.OpOverload):
            name = func._schema.name.split("::")[1]
            if name not in _SILENT:
                self.steps.append(Step(name, self._numbers(func, args, kwargs or {}), self.here()))
            self.follow(func, args, kwargs or {}, out)
        return out

    def _numbers(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[complex, ...]:
        """The numbers an operation computes with: scalars and constants, no sizes and indices."""
        found: list[complex] = []
        types = {a.name: str(a.type) for a in func._schema.arguments}
        for name, value in [*zip(types, args), *kwargs.items()]:
            if isinstance(value, Tensor) and self.fake:
                known = value.constant if isinstance(value, FakeTensor) else value
                if known is not None and known.numel() == 1 and type(known) is Tensor:
                    with unset_fake_temporarily():
                        found.append(complex(known))
            elif isinstance(value, (int, float)) and types.get(name) not in _PLACES:
                found.append(value)
        return tuple(found)

    def follow(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """An operation has run."""


class Tracer(Recorder):
    """Follows the axes through every operation of a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace(steps=self.steps)
        self.values: dict[int, Value] = {}
        self.by_storage: dict[int, list[Value]] = {}
        self.sources: dict[int, int] = {}
        self.model = model
        self.modules = dict(model.named_modules())
        self.names: dict[int, str] = {}
        self.parameters: set[str] = set()
        self.owned: dict[int, Call] = {}
        self._keep: list[Tensor] = []
        self._survey()

    def _survey(self) -> None:
        """Which modules are plain linears, and the names of all parameters and buffers."""
        holders: dict[int, list[str]] = {}
        named: list[tuple[str, Tensor]] = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        for name, tensor in named:
            holders.setdefault(id(tensor), []).append(name)
            self.names.setdefault(id(tensor), name)
            self._keep.append(tensor)
        for name, module in self.modules.items():
            if not isinstance(module, nn.Linear):
                continue
            call = self.trace.linears[name] = Call(name, module, blocked=_blocked(module))
            if call.blocked:
                self.trace.foreign[name] = call.blocked
                continue
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                self.owned[id(parameter)] = call
                ties = [h for h in holders[id(parameter)] if h != f"{name}.{key}"]
                if ties and not call.blocked:
                    call.tied = True
                    call.blocked = f"its {key} is tied to {ties[0]!r}"

    # ------------------------------------------------------------------ values

    def value(self, tensor: Tensor) -> Value:
        """What is known of ``tensor``; a parameter gets an axis for each of its dimensions."""
        known = self.values.get(id(tensor))
        if known is not None:
            return known
        name = self.names.get(id(tensor), "")
        dims: list[Dim] = [(int(n),) for n in tensor.shape]
        call = self.owned.get(id(tensor))
        if call is not None:
            call.blocked = call.blocked or f"its parameters are used outside it, {self.here()}"
        if isinstance(tensor, nn.Parameter) and name:
            self.parameters.add(name)
            dims = []
            for d, n in enumerate(tensor.shape):
                axis = self.trace.params.setdefault((name, d), Axis(int(n)))
                dims.append((axis,) if n > 1 else ())
        return self.put(Value(tensor, dims, name=name))

    def put(self, value: Value) -> Value:
        """Remember a value."""
        self.values[id(value.tensor)] = value
        self.by_storage.setdefault(rules.storage(value.tensor), []).append(value)
        return value

    def new_bit(self, source: int) -> int:
        """A fresh bit for a linear (or another matrix product) of a value made by ``source``."""
        self.sources[len(self.sources)] = source
        return len(self.sources) - 1

    # -------------------------------------------------------------- operations

    def begin(self, inputs: Any) -> None:
        """The inputs have no axes, and what depends on them is live."""
        for tensor in tensors_in(inputs):
            dims: list[Dim] = [(int(n),) for n in tensor.shape]
            self.put(Value(tensor, dims, live=True, name="an input of the model"))

    def follow(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Carry the axes through an operation."""
        rules.apply(self, func, args, kwargs, out)

    def linear(self, name: str, run: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """The forward of a plain linear: consumes its input's features, starts a new axis."""
        call, source = self.trace.linears[name], self.value(input)
        out = super().linear(name, run, input)
        call.calls += 1
        if call.calls == 1:
            call.index, call.out = self.new_bit(source.made_by), Axis(int(out.shape[-1]))
            call.taken, call.lost = source.dims[-1], source.lost
            call.source, call.fresh = source.made_by, source.last
        else:
            call.blocked = call.blocked or "it is called several times in one forward"
            mix([*source.dims[-1], *call.taken], f"{name!r} is called several times")
        bit = 1 << call.index
        features: Dim = (call.out,) if call.out.size > 1 else (1,)
        self.put(Value(out, [*source.dims[:-1], features], source.made_by | bit, bit, True))
        return out

    def finish(self, outputs: Any) -> Trace:
        """Note what the model returns."""
        for tensor in tensors_in(outputs):
            value = self.value(tensor)
            self.trace.last |= value.last
            mix((f for d in value.dims for f in d), "they are an output of the model")
        return self.trace

    def matrix(self, owner: str, param: str, source: int) -> int:
        """Note a matrix product with a parameter that belongs to no plain linear."""
        module = self.modules[owner]
        kind = f"{type(module).__name__} is not supported: only a plain torch.nn.Linear is"
        if owner not in self.trace.linears:
            reason = f"{kind} (its {param!r} is a factor of a matrix product)"
            self.trace.foreign.setdefault(owner or param, reason)
        return self.new_bit(source)


# Operations that compute nothing: which of them run depends on strides (``contiguous``), and fake
# tensors call some themselves now and then.
_SILENT = {
    "detach", "alias", "lift_fresh", "device", "clone", "view", "_unsafe_view", "_reshape_alias",
    "expand", "permute", "transpose", "t", "squeeze", "unsqueeze",
}  # fmt: skip
# Types of arguments that say where, not how much.
_PLACES = {"int", "SymInt", "bool", "Optional[int]", "Optional[SymInt]", "Optional[bool]"}


def is_masked(module: nn.Module) -> bool:
    """Whether a linear is one of slimkern's masked ones (they compute some rows and columns)."""
    return type(module).__module__ == "slimkern.nn.masked"


def is_block_masked(module: nn.Module) -> bool:
    """Whether a linear is masked in blocks: with inputs, outputs and units of the plain one."""
    return type(module).__module__ == "slimkern.nn.block_masked"


def _blocked(module: nn.Linear) -> str | None:
    """Why a linear is no plain one, or None."""
    own = type(module).forward is not nn.Linear.forward
    if own and not is_masked(module) and not is_block_masked(module):
        return f"{type(module).__name__} is not supported: it has a forward of its own"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if "weight" not in module._parameters or "bias" not in module._parameters:
        return "its weight is computed from other parameters (parametrization)"
    return None
