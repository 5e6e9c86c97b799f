"""torch.compile: inductor, with frozen weights where there is no backward."""

from __future__ import annotations

import os
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.providers._common import (
    backward_call,
    forward_call,
    placed,
    placed_inputs,
    wrong_device,
)
from bench.providers.base import Call, Provider, ProviderError
from bench.work import Setting, Work
from slimkern.report.speed_schema import PRECISIONS

NOT_LISTED = "not on the compile list: each shape takes a compile"


class Compiled(Provider):
    """``torch.compile`` for one shape, the whole module in one graph.

    On a CPU, for inference: weights frozen into the graph (so that they are packed once) and the
    C++ wrapper, which takes Python out of the calls between kernels. Not ``max-autotune``: it
    chooses kernels by timing each for an instant, and on a machine that is not idle it chose slower
    ones (0.8 to 1.1 times the speed of the default, on slim and dense encoders of width 384, for
    several times the compile).
    """

    name = "torch.compile"
    precisions = PRECISIONS

    def refuses(self, work: Work, setting: Setting) -> str | None:
        if not work.compiled:
            return NOT_LISTED
        if setting.device == "cpu":
            if setting.precision == "fp32-high":
                return "the same code as fp32 on a CPU"
            if setting.precision == "fp32-medium":
                return f"torch eager shows what it does to the products; {NOT_LISTED}"
            if _compiler() is None:
                return "no C++ compiler found: install g++, or name one in CXX"
        return wrong_device(setting)

    def prepare(self, work: Work, setting: Setting) -> Call:
        module = placed(work.build(), setting)
        inputs = placed_inputs(work, setting)
        run, graphs = _compile(module, setting.device, freeze=not work.backward)
        # All compilation happens in here; afterwards the configuration is what it was before.
        with _configured(setting.device, graphs, freeze=not work.backward):
            if work.backward:
                call = backward_call(work, run, list(module.parameters()), inputs, setting)
            else:
                call = forward_call(run, inputs, setting)
            call()
            seen = len(graphs)
            call()
        if len(graphs) != seen:
            raise ProviderError("the second call was compiled again")
        if not work.backward:
            _check_frozen(graphs, len(inputs))
        return call


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), None)


def _compile(
    module: nn.Module, device: str, freeze: bool
) -> tuple[Callable[..., Tensor], list[tuple[int, int]]]:
    """The compiled module, and a list that tells of every graph that is compiled.

    A graph break raises. What torch has compiled hangs on a function's code object, up to a limit
    and until a reset, which would undo what other calls rest on; so each gets a code object of its
    own.
    """

    def run(*inputs: Tensor) -> Tensor:
        return module(*inputs)

    own = types.FunctionType(run.__code__.replace(), globals(), "run", None, run.__closure__)
    mode = "max-autotune" if device == "cuda" and freeze else None
    return torch.compile(own, mode=mode, dynamic=False, fullgraph=True), []


def _configured(device: str, graphs: list[tuple[int, int]], freeze: bool) -> Any:
    """Inductor's configuration for a compile: (inputs, constants) of each graph are noted."""
    from torch._inductor import config

    def note(graph: Any) -> None:
        kinds = [node.op for node in graph.nodes]
        graphs.append((kinds.count("placeholder"), kinds.count("get_attr")))

    changes: dict[str, Any] = {"post_grad_custom_post_pass": note}
    if freeze:
        changes.update(freezing=True, cpp_wrapper=device == "cpu")
    return config.patch(changes)


def _check_frozen(graphs: list[tuple[int, int]], inputs: int) -> None:
    """One graph, whose only inputs are the module's.

    Raises:
        ProviderError: weights are still inputs, or there is more than one graph.
    """
    if len(graphs) != 1 or graphs[0][0] != inputs:
        raise ProviderError(
            f"the weights were not frozen: graphs with (inputs, constants) {graphs}, expected one "
            f"with {inputs} inputs"
        )
