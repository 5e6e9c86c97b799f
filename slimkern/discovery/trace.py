"""One forward of a model on fake tensors, with symbolic axes carried through every operation.

Nothing is computed and nothing of the model changes: the forward runs under ``FakeTensorMode``, and
what modules set on themselves meanwhile (flags, caches, counters) is put back afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from slimkern.discovery import rules
from slimkern.discovery.axes import Axis, Dim, mix
from slimkern.discovery.inputs import Inputs, tensors_in


@dataclass
class Value:
    """What is known of a tensor.

    Attributes:
        tensor: the tensor itself; holding it keeps its identity unique.
        dims: the factors of each dimension.
        made_by: linears that it was computed from, as bits.
        last: of these, the ones whose output it still is: no other linear and no sum with an
            activation from further up came after. The head of a model is found by it.
        live: it depends on the model's inputs.
        lost: axes that it depends on but no longer shows.
        name: the parameter, buffer or input that it is.
    """

    tensor: Tensor
    dims: list[Dim]
    made_by: int = 0
    last: int = 0
    live: bool = False
    lost: frozenset[Axis] = frozenset()
    name: str = ""


@dataclass
class Call:
    """A linear module and its one call.

    Attributes:
        name, module: the linear.
        index: its bit, in order of execution.
        out: the axis of its output features.
        taken: the factors of its input features, as they were then.
        lost: axes that its input depends on without showing them.
        source: the linears that its input was computed from, as bits.
        fresh: the linears whose output its input still is (see ``Value.last``), as bits.
        blocked: why it can be no member of a group, or None.
        tied: it is blocked because a parameter is also another module's.
    """

    name: str
    module: nn.Linear
    index: int = -1
    calls: int = 0
    out: Axis = field(default_factory=lambda: Axis(1))
    taken: Dim = ()
    lost: frozenset[Axis] = frozenset()
    source: int = 0
    fresh: int = 0
    blocked: str | None = None
    tied: bool = False


@dataclass
class Trace:
    """What one forward showed.

    Attributes:
        linears: every plain linear, by name.
        foreign: modules that multiply by a matrix but are no plain linear: name -> reason.
        params: the axis of each dimension of each other parameter: (name, dimension) -> axis.
        products: factor pairs of two activations that were contracted with each other (queries
            with keys).
        carried: dimensions that a product of two activations carries along (the values').
        last: linears that reach the outputs with no other linear after them, as bits.
        joined: linears whose output is a term of a residual sum, as bits.
    """

    linears: dict[str, Call] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)
    params: dict[tuple[str, int], Axis] = field(default_factory=dict)
    products: list[tuple[Dim, Dim]] = field(default_factory=list)
    carried: list[Dim] = field(default_factory=list)
    last: int = 0
    joined: int = 0

    def called(self) -> list[Call]:
        """The linears that were called, in order of their first call."""
        return sorted((c for c in self.linears.values() if c.calls), key=lambda c: c.index)


class Tracer(TorchDispatchMode):
    """Follows the axes through every operation of a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.values: dict[int, Value] = {}
        self.by_storage: dict[int, list[Value]] = {}
        self.stack: list[str] = []
        self.bits = 0
        self.quiet = False
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
        for kind in (self.model.named_parameters, self.model.named_buffers):
            for name, tensor in kind(remove_duplicate=False):
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
            for key, tensor in module._parameters.items():
                if tensor is None:
                    continue
                self.owned[id(tensor)] = call
                ties = [h for h in holders[id(tensor)] if h != f"{name}.{key}"]
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
        self.by_storage.setdefault(_storage(value.tensor), []).append(value)
        return value

    def here(self) -> str:
        """The place in the model where the forward is right now."""
        return f"in {self.stack[-1]!r}" if self.stack and self.stack[-1] else "in the model"

    def new_bit(self) -> int:
        """A fresh bit for a linear (or another matrix product)."""
        self.bits += 1
        return self.bits - 1

    # -------------------------------------------------------------- operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.quiet and isinstance(func, torch._ops.OpOverload):
            rules.apply(self, func, args, kwargs or {}, out)
        return out

    def linear(self, call: Call, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The forward of a plain linear: consumes its input's features, starts a new axis."""
        source = self.value(x)
        self.quiet = True
        try:
            out = run(x)
        finally:
            self.quiet = False
        call.calls += 1
        if call.calls == 1:
            call.index, call.out = self.new_bit(), Axis(int(out.shape[-1]))
            call.taken, call.lost = source.dims[-1], source.lost
            call.source, call.fresh = source.made_by, source.last
        else:
            call.blocked = call.blocked or "it is called several times in one forward"
            mix([*source.dims[-1], *call.taken], f"{call.name!r} is called several times")
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

    def matrix(self, owner: str, param: str) -> int:
        """Note a matrix product with a parameter that belongs to no plain linear."""
        module = self.modules[owner]
        kind = f"{type(module).__name__} is not supported: only a plain torch.nn.Linear is"
        if owner not in self.trace.foreign and owner not in self.trace.linears:
            self.trace.foreign[owner] = f"{kind} (its {param!r} is a factor of a matrix product)"
        return self.new_bit()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def is_masked(module: nn.Module) -> bool:
    """Whether a linear is one of slimkern's masked ones (they compute some rows and columns)."""
    return type(module).__module__ == "slimkern.nn.masked"


def _blocked(module: nn.Linear) -> str | None:
    """Why a linear is no plain one, or None."""
    if type(module).forward is not nn.Linear.forward and not is_masked(module):
        return f"{type(module).__name__} is not supported: it has a forward of its own"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if "weight" not in module._parameters or "bias" not in module._parameters:
        return "its weight is computed from other parameters (parametrization)"
    return None


def _dense(module: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight, module.bias)


def _masked(module: Any, x: Tensor) -> Tensor:
    """The output of a masked linear, as to its shape: the kept rows."""
    rows = module.out_features if module.rows is None else len(module.rows)
    return x.new_empty(*x.shape[:-1], rows)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """What modules set on themselves in the meantime is undone; modules are in eval mode."""
    before = [
        (m, dict(m.__dict__), *(dict(d) for d in (m._parameters, m._buffers, m._modules)))
        for m in model.modules()
    ]
    try:
        for m, *_ in before:
            m.__dict__["training"] = False
        yield
    finally:
        for m, state, *registries in before:
            m.__dict__.clear()
            m.__dict__.update(state)
            for now, then in zip((m._parameters, m._buffers, m._modules), registries):
                if [*now] != [*then] or any(now[k] is not then[k] for k in then):
                    now.clear()
                    now.update(then)


@contextmanager
def _module_stack(tracer: Tracer) -> Iterator[None]:
    """Keeps the tracer's stack of module names, with hooks that are no part of the model."""
    names = {id(m): n for n, m in tracer.modules.items()}
    thread = threading.get_ident()

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread and id(module) in names:
            tracer.stack.append(names[id(module)])

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if threading.get_ident() == thread and id(module) in names:
            tracer.stack.pop()

    before = module_hooks.register_module_forward_pre_hook(enter)
    after = module_hooks.register_module_forward_hook(leave)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def run(model: nn.Module, inputs: Inputs) -> Trace:
    """Trace one forward.

    On fake tensors; where the model's own code needs the values of a tensor (a branch on data),
    once more on real ones.

    Raises:
        whatever the model's forward raises on these inputs.
    """
    try:
        return _run(model, inputs, fake=True)
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
    ):
        return _run(model, inputs, fake=False)


def _run(model: nn.Module, inputs: Inputs, *, fake: bool) -> Trace:
    tracer = Tracer(model)
    fused = torch.backends.mha.get_fastpath_enabled()
    buffers = [] if fake else [(b, b.clone()) for b in model.buffers()]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
            args, kwargs = inputs.materialize(mode)
            for tensor in tensors_in((args, kwargs)):
                dims: list[Dim] = [(int(n),) for n in tensor.shape]
                tracer.put(Value(tensor, dims, live=True, name="an input of the model"))
            stack.enter_context(_restored(model))
            for call in tracer.trace.linears.values():
                if call.name in tracer.trace.foreign:
                    continue
                run = partial(_masked if is_masked(call.module) else _dense, call.module)
                call.module.__dict__["forward"] = partial(tracer.linear, call, run)
            stack.enter_context(_module_stack(tracer))
            if mode is not None:
                stack.enter_context(mode)
            stack.enter_context(tracer)
            outputs = model(*args, **kwargs)
        return tracer.finish(outputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
