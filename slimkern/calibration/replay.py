"""Run a forward over many batches, each time one layer further, computing nothing twice.

A forward is taken from one second linear to the next. What is done is not run again: a finished
module returns what is in the store, or NaN where nothing looks at it any more, so that a mistake
about that can't pass unseen. Behind the linear, the sum with the residual stream is caught, and the
forward ends there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from slimkern.calibration.batches import Batch
from slimkern.calibration.record import first_input, replaced_forwards
from slimkern.calibration.script import Frontier, Script
from slimkern.calibration.store import Store

_ADDS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
}


class _Reached(BaseException):
    """The forward has gone far enough. No ``Exception``: models may catch those."""


@dataclass
class Seen:
    """What happened at a linear.

    Attributes:
        x: its input.
        y: what it returned.
        residual: what ``y`` is added to right away; ``None`` where it is not.
    """

    x: Tensor
    y: Tensor
    residual: Tensor | None = None

    @property
    def target(self) -> Tensor:
        """The sum that the layer leaves in the residual stream, or ``y`` where there is none.

        Of half-precision terms in fp32: the sum's own rounding is large against ``y``.
        """
        if self.residual is None:
            return self.y
        wide = torch.promote_types(self.y.dtype, torch.float32)
        return self.y.to(wide) + self.residual.to(wide)


@dataclass(frozen=True)
class _Shape:
    """A tensor but for its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def stand_in(self) -> Tensor:
        """A tensor of its shape that holds one number: NaN, where the dtype knows it."""
        value = float("nan") if self.dtype.is_floating_point or self.dtype.is_complex else 0
        return torch.full((), value, dtype=self.dtype, device=self.device).expand(self.shape)


class _CatchSum(TorchFunctionMode):
    """Ends the forward where the output of a linear is first used, noting what it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        y = None if self.seen is None else self.seen.y
        if y is None or not any(v is y for v in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func in _ADDS:
            terms = [*args[:2], *(kwargs[k] for k in ("input", "other") if k in kwargs)]
            other = terms[0] if terms[1] is y else terms[1]
            plain = kwargs.get("alpha", 1) == 1 and isinstance(other, Tensor)
            if plain and other.shape == y.shape and self.seen is not None:
                self.seen.residual = other
            raise _Reached
        result = func(*args, **kwargs)
        if result is y or not any(isinstance(v, Tensor) for v in pytree.tree_leaves(result)):
            return result  # dropout that is off; a look at its shape
        raise _Reached


class Replay:
    """One model's forwards over all batches.

    Args:
        model: in evaluation mode.
        script: what its forward does.
        batches: what it is run on.
        store: where activations wait.
        tag: tells this model's activations from another's in the same store.
    """

    def __init__(
        self,
        model: nn.Module,
        script: Script,
        batches: list[Batch],
        store: Store,
        tag: Hashable,
    ) -> None:
        self.model = model
        self.script = script
        self.batches = batches
        self.store = store
        self.tag = tag
        self.at = Frontier()
        # What finished calls returned, but for the tensors: (batch, call) -> form, parts.
        self.returned: dict[tuple[int, int], tuple[Any, list[Any]]] = {}

    def to(
        self,
        name: str,
        indices: list[int],
        look: Callable[[int, Seen], None],
        *,
        compute: bool = True,
        keep: bool = True,
    ) -> None:
        """Run batches up to the linear ``name`` and on to the sum behind it.

        Args:
            name: the linear; it comes after the one that the forwards have been brought to.
            indices: of the batches.
            look: called with the index and what was seen.
            compute: whether the linear itself is computed; zeros stand in for it if not.
            keep: whether what is done is stored, so that :meth:`arrive` can follow.
        """
        upto = self.script.after(name)
        run = _Run(self, name, upto, compute)
        with replaced_forwards(self.model, run.forwards()), torch.no_grad():
            for index in indices:
                seen = run.batch(index)
                if keep:
                    self.store.put((self.tag, index), run.state())
                look(index, seen)

    def arrive(self, name: str) -> None:
        """The forwards of all batches stand behind the linear ``name`` from now on."""
        self.at = self.script.after(name)

    def output(self, name: str, index: int, y: Tensor) -> None:
        """Put ``y`` in the place of what the linear ``name`` returned for a batch."""
        call = next(i for i, c in enumerate(self.script.calls) if c.name == name)
        state = self.store.get((self.tag, index))
        for key in [k for k in state if k.startswith(f"{call}.")]:
            state[key] = y
        self.store.put((self.tag, index), state)

    def narrow(self, name: str, indices: list[int], rows: Tensor) -> None:
        """Of what the linear ``name``, finished just now, returned: these outputs alone.

        Raises:
            ValueError: it was not stored as such.
        """
        call = self.at.done.get((name, 0), -1)
        for index in indices:
            state = self.store.get((self.tag, index))
            if f"{call}.0" not in state:
                raise ValueError(
                    f"{name!r} is the second linear of one group and the first of another, with a "
                    f"third in between: leave one out with excluded_op_names"
                )
            y = state[f"{call}.0"]
            state[f"{call}.0"] = y.index_select(-1, rows.to(y.device))
            self.store.put((self.tag, index), state)


class _Run:
    """The forwards that stand in for those of finished modules, between two frontiers."""

    def __init__(self, replay: Replay, name: str, upto: Frontier, compute: bool) -> None:
        self.replay, self.name, self.upto, self.compute = replay, name, upto, compute
        self.index = -1
        self.counts: dict[str, int] = {}
        self.loaded: dict[str, Tensor] = {}
        self.given: dict[tuple[int, int], Tensor] = {}  # what finished calls returned again
        self.saved: dict[str, Tensor] = {}
        self.catch = _CatchSum()
        self.watching = ExitStack()

    def forwards(self) -> dict[str, Callable[..., Any]]:
        names = {name for name, _ in (*self.replay.at.done, *self.upto.done)}
        model = self.replay.model
        return {n: self._forward(n, model.get_submodule(n).forward) for n in names}

    def batch(self, index: int) -> Seen:
        """One batch's forward; what was seen at the linear."""
        replay = self.replay
        self.index = index
        self.counts.clear()
        self.given, self.saved = {}, {}
        self.loaded = replay.store.get((replay.tag, index)) if replay.at.done else {}
        self.catch = _CatchSum()
        with suppress(_Reached), ExitStack() as self.watching:
            replay.batches[index].call(replay.model)
        assert self.catch.seen is not None, f"{self.name} was called when the forward was recorded"
        return self.catch.seen

    def state(self) -> dict[str, Tensor]:
        """What a later run needs: carried on from before, and new."""
        wanted = {f"{i}.{leaf}" for i, leaves in self.upto.needed.items() for leaf in leaves}
        held = {**self.loaded, **self.saved}
        return {key: value for key, value in held.items() if key in wanted}

    def _forward(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        at, upto = self.replay.at, self.upto

        def forward(*args: Any, **kwargs: Any) -> Any:
            nth = self.counts.get(name, 0)
            self.counts[name] = nth + 1
            if (name, nth) in at.done:
                for inner in self.replay.script.within(at.done[name, nth]):
                    self.counts[inner] = self.counts.get(inner, 0) + 1
                return self._restored(at.done[name, nth])
            if name == self.name:
                return self._linear(first_input(args, kwargs), run)
            output = run(*args, **kwargs)
            if (name, nth) in upto.done:
                self._keep(upto.done[name, nth], output)
            return output

        return forward

    def _linear(self, x: Tensor, run: Callable[..., Any]) -> Tensor:
        outputs = len(self.replay.model.get_parameter(f"{self.name}.weight"))
        y = run(x) if self.compute else x.new_zeros(*x.shape[:-1], outputs)
        self._keep(self.upto.done[self.name, 0], y)
        self.catch.seen = Seen(x, y)
        self.watching.enter_context(self.catch)  # not before: it sees every operation
        return y

    def _keep(self, call: int, output: Any) -> None:
        """Note what a call returned: its shape, and the tensors that are still needed."""
        leaves, form = pytree.tree_flatten(output)
        for leaf in self.upto.needed.get(call, ()):
            copy = (call, leaf) in self.upto.changed
            self.saved[f"{call}.{leaf}"] = leaves[leaf].clone() if copy else leaves[leaf]
        parts = [_Shape.of(value) if isinstance(value, Tensor) else value for value in leaves]
        self.replay.returned[self.index, call] = form, parts

    def _restored(self, call: int) -> Any:
        """What a call returned, its tensors from the store, or NaN for those not needed."""
        form, parts = self.replay.returned[self.index, call]
        leaves = [
            self._tensor((call, leaf), part) if isinstance(part, _Shape) else part
            for leaf, part in enumerate(parts)
        ]
        return pytree.tree_unflatten(leaves, form)

    def _tensor(self, place: tuple[int, int], shape: _Shape) -> Tensor:
        at = self.replay.at
        place = at.same.get(place, place)
        if place not in self.given:
            needed = place[1] in at.needed.get(place[0], ())
            value = self.loaded[f"{place[0]}.{place[1]}"] if needed else shape.stand_in()
            self.given[place] = value.clone() if place in at.changed else value
        return self.given[place]
