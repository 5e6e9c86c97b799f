"""What one forward does: the calls of its modules, and who uses what they return.

From this follows where a forward can be resumed: after a given module, everything that was returned
before is either put back from storage or, where nothing outside of finished modules looks at it,
stood in for.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch import Tensor


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
    """An operation of torch at ``time``, and the tensors (by number) that it took.

    ``changes`` are those of them that it wrote into, and all that lie in the same memory. One that
    ``tells`` returned no tensor but numbers, on which the course of the forward may depend.
    """

    time: int
    takes: tuple[int, ...]
    changes: tuple[int, ...]
    tells: bool


@dataclass(frozen=True)
class Frontier:
    """What is done when a module has returned.

    Attributes:
        done: the outermost calls that have ended, ``(module, nth call) -> index``.
        needed: what they returned and is still looked at: ``index -> leaves``.
        same: ``(index, leaf)`` that is the very tensor that stands in ``needed`` under another.
        changed: ``(index, leaf)`` that an operation changes in place: it gets a copy.
    """

    done: dict[tuple[str, int], int] = field(default_factory=dict)
    needed: dict[int, frozenset[int]] = field(default_factory=dict)
    same: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
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

    def within(self, index: int) -> list[str]:
        """The modules that are called in a call, once for every time."""
        end = self.calls[index].end
        later = itertools.islice(self.calls, index + 1, None)
        return [call.name for call in itertools.takewhile(lambda call: call.start < end, later)]

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
        same: dict[tuple[int, int], tuple[int, int]] = {}
        waiting = [op for op in self.ops if op.time > now]
        # What happened between the finished calls happens again, and may ask a tensor for numbers.
        waiting += [op for op in self.ops if op.time < now and op.tells and not _inside(op, done)]
        visited = {op.time for op in waiting}
        while waiting:
            op = waiting.pop()
            self._check_apart(op, done, name)
            for tensor in op.takes:
                places = self._places(tensor, done)
                if places:
                    needed.setdefault(places[0][0], set()).add(places[0][1])
                    same.update(dict.fromkeys(places[1:], places[0]))
                elif self.made_by[tensor] >= 0:
                    maker = self.ops[self.made_by[tensor]]
                    self._check_open(maker, done, name)
                    if maker.time not in visited:
                        visited.add(maker.time)
                        waiting.append(maker)
        changed = {tensor for op in self.ops for tensor in op.changes}
        return Frontier(
            {(call.name, call.nth): i for i, call in done.items()},
            {i: frozenset(leaves) for i, leaves in needed.items()},
            same,
            frozenset(place for tensor in changed for place in self._places(tensor, done)),
        )

    def _places(self, tensor: int, done: dict[int, Call]) -> list[tuple[int, int]]:
        """Where finished calls returned it."""
        return [place for place in self.returned_by[tensor] if place[0] in done]

    def _check_open(self, op: Op, done: dict[int, Call], name: str) -> None:
        call = _inside(op, done)
        if call is not None:
            raise ValueError(
                f"the forward can't be resumed after {name!r}: {call.name!r} makes a tensor that "
                f"is used later, and does not return it (a change in place, or an object that "
                f"hides it)"
            )

    def _check_apart(self, op: Op, done: dict[int, Call], name: str) -> None:
        """Tensors that share memory come back from the store apart."""
        kept = {place for t in op.changes for place in self._places(t, done)[:1]}
        if len(kept) > 1:
            names = ", ".join(repr(self.calls[i].name) for i in sorted({call for call, _ in kept}))
            raise ValueError(
                f"the forward can't be resumed after {name!r}: {names} returned tensors that share "
                f"memory, and they are changed in place later"
            )


def _inside(op: Op, done: dict[int, Call]) -> Call | None:
    """The finished call in which an operation happened."""
    return next((call for call in done.values() if call.start < op.time < call.end), None)
