"""One forward of a model on fake tensors.

Nothing is computed and nothing of the model changes: what modules set on themselves meanwhile
(flags, caches, counters) is put back afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from slimkern.discovery.inputs import Inputs
from slimkern.discovery.record import Trace
from slimkern.discovery.trace import Recorder, Tracer, is_masked

# Prints a traceback before a fake operation raises; the exception itself is enough.
_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
# Raised where a forward asks a fake tensor for its values.
_NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)


def _plain(module: nn.Linear, x: Tensor) -> Tensor:
    """The output of a plain linear; on fake tensors its shape is all there is."""
    if isinstance(x, FakeTensor) and x.shape[-1] == module.in_features:
        return x.new_empty(*x.shape[:-1], module.out_features)
    return nn.functional.linear(x, module.weight, module.bias)


def _masked(module: Any, x: Tensor) -> Tensor:
    """The output of a masked linear, as to its shape: the kept rows."""
    rows = module.out_features if module.rows is None else len(module.rows)
    return x.new_zeros(*x.shape[:-1], rows)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """What modules set on themselves in the meantime is undone; modules are in eval mode."""
    modules = list(model.modules())
    states = [dict(m.__dict__) for m in modules]
    every = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
    registries = [d for d in every if isinstance(d, dict)]  # a scripted module's are its own
    entries = [dict(d) for d in registries]
    try:
        for m in modules:
            m.__dict__["training"] = False
        yield
    finally:
        for m, state in zip(modules, states):
            m.__dict__.clear()
            m.__dict__.update(state)
        for registry, before in zip(registries, entries):
            now: dict[str, Any] = registry
            if [*now] != [*before] or any(now[k] is not before[k] for k in before):
                now.clear()
                now.update(before)


def _inside(recorder: Recorder, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, the forward of the module ``name``, noting that the forward is there meanwhile."""

    @wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        depth = len(recorder.stack)
        recorder.stack.append(name)
        out = run(*args, **kwargs)
        del recorder.stack[depth:]  # where run raises, the stack goes on to tell the place
        return out

    return forward


def _mode(model: nn.Module) -> FakeTensorMode:
    """The mode that a model made of fake tensors belongs to, or a new one."""
    fakes = (p.fake_mode for p in model.parameters() if isinstance(p, FakeTensor))
    return next(fakes, None) or FakeTensorMode(allow_non_fake_inputs=True)


def observe(model: nn.Module, inputs: Inputs) -> Trace:
    """Trace one forward.

    On fake tensors; where the model's own code needs the values of a tensor (a branch on data),
    once more on real ones.

    Raises:
        whatever the model's forward raises on these inputs.
    """
    try:
        return _trace(model, inputs, fake=True)
    except _NEEDS_VALUES:
        return _trace(model, inputs, fake=False)


def _trace(model: nn.Module, inputs: Inputs, *, fake: bool) -> Trace:
    tracer = Tracer(model)
    tracer.trace.fake = fake
    plain = {
        call.name: partial(_masked if is_masked(call.module) else _plain, call.module)
        for call in tracer.trace.linears.values()
        if call.name not in tracer.trace.foreign
    }
    return tracer.finish(forward(model, inputs, tracer, plain, fake=fake))


def forward(
    model: nn.Module,
    inputs: Inputs,
    recorder: Recorder,
    linears: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    fake: bool,
    change: Callable[[], None] = lambda: None,
) -> Any:
    """Run one forward under ``recorder`` and leave the model as it was.

    Args:
        model: in whatever mode; it runs in eval mode.
        inputs: the arguments.
        recorder: sees every operation.
        linears: by name, what stands in for the forward of a linear.
        fake: on fake tensors.
        change: called before the forward; what it sets on modules is undone too.

    Returns:
        what the model returns.

    Raises:
        whatever the model's forward raises.
    """
    fused, muted = torch.backends.mha.get_fastpath_enabled(), _LOGGER.disabled
    buffers = [] if fake else [(b, b.clone()) for b in model.buffers()]
    mode = _mode(model) if fake else None
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        _LOGGER.disabled = True
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if any("_orig_mod" in m._modules for m in model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            args, kwargs = inputs.materialize(mode)
            recorder.fake = fake
            recorder.begin((args, kwargs))
            stack.enter_context(_restored(model))
            if mode is not None:
                stack.enter_context(mode)
            change()
            for name, module in model.named_modules():
                run = linears.get(name)
                module.__dict__["forward"] = (
                    partial(recorder.linear, name, run)
                    if run is not None
                    else _inside(recorder, name, module.forward)
                )
            stack.enter_context(recorder)
            return model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        _LOGGER.disabled = muted
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
