"""Seeing what goes into linears while a model runs, and leaving no trace of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

See = Callable[[str, Tensor], "Tensor | None"]


@contextmanager
def watched(model: nn.Module, names: Iterable[str], see: See) -> Iterator[None]:
    """For the time of a ``with``: ``see(name, x)`` is told of every input of the named linears.

    Where it returns a tensor, the linear gets that instead. A linear that runs several times in a
    forward is seen as often. The fast path of ``nn.TransformerEncoderLayer``, which calls no
    module inside, is off meanwhile.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    handles: list[Any] = []
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for name in names:
            linear = model.get_submodule(name)
            handles.append(linear.register_forward_pre_hook(_hook(name, see), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fast)


def _hook(name: str, see: See) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        other = see(name, args[0] if args else kwargs["input"])
        if other is None:
            return None
        return (other, *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}

    return hook


@contextmanager
def evaluating(model: nn.Module) -> Iterator[dict[str, bool]]:
    """For the time of a ``with``: no dropout, no gradients; every module's mode comes back.

    Yields the modes, by the names of the modules.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield modes
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
