"""From the axes of one forward to groups and refusals."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from slimkern.discovery.axes import Axis, Factor, axes, extent, leaves, mix
from slimkern.discovery.counts import ffn_attributes, head_attributes
from slimkern.discovery.groups import Between, Discovery, Group, Member, Refusal
from slimkern.discovery.record import Call, Trace

Unit = tuple[Factor, ...]


class _Refused(Exception):  # noqa: N818 - a verdict, not an error of the program
    """A group can't be formed; the message completes "<linear>: ..."."""


def resolve(model: nn.Module, trace: Trace) -> Discovery:
    """Groups in order of execution of their second linears, and everything refused."""
    return _Resolver(model, trace).run()


class _Resolver:
    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model, self.trace = model, trace
        self.calls = trace.called()
        for call in self.calls:
            if call.blocked:
                mix([call.out, *call.taken], f"{call.name!r} can't be cut: {call.blocked}")
        self.makers: dict[Factor, list[Call]] = {}
        for call in self.calls:
            for axis in axes([call.out]):
                self.makers.setdefault(axis, []).append(call)
        self.params: dict[Factor, list[tuple[str, int]]] = {}
        for key, param in trace.params.items():
            for axis in axes([param]):
                self.params.setdefault(axis, []).append(key)
        self.takers: dict[Factor, list[Call]] = {}
        for call in self.calls:
            for axis in axes(call.taken):
                self.takers.setdefault(axis, []).append(call)

    def run(self) -> Discovery:
        """Look at every linear as a second linear."""
        refused = dict(self.trace.foreign)
        for name, call in self.trace.linears.items():
            if call.blocked and not call.tied:
                refused.setdefault(name, call.blocked)
            elif not call.calls:
                refused.setdefault(name, "not called by the example inputs")
        groups: list[Group] = []
        done: set[str] = set()
        for call in self.calls:
            if call.name in done or call.name in refused:
                continue
            try:
                group = self._group(call)
            except _Refused as verdict:
                refused[call.name] = str(verdict)
                continue
            if group is not None:
                groups.append(group)
                done |= {m.name for m in group.consumers}
        order = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        rows = sorted(refused.items(), key=lambda item: order.get(item[0], -1))
        return Discovery(tuple(groups), tuple(Refusal(*row) for row in rows))

    def _group(self, call: Call) -> Group | None:
        """The group whose second linear is ``call``; None where it is no second linear."""
        unit = self._unit(call)
        if unit is None:
            return None
        makers = self._having(unit, self.makers)
        takers = self._having(unit, self.takers)
        params = sorted({p for axis in unit for p in self.params.get(axis, [])})
        live = extent(unit)
        size = extent(call.taken) // live
        num_units = call.module.in_features // size
        attention = any(self._role(m) for m in makers)
        if attention:
            members = self._heads(unit, makers, takers, params)
        else:
            members = self._channels(unit, makers, takers, size)
        for other in takers:
            if other in makers:
                raise _Refused(f"{other.name!r} both makes and takes the same features")
        self._check_sizes(unit, makers, takers, num_units)
        consumers = tuple(Member(t.name, extent(t.taken) // live, "consumer") for t in takers)
        if attention:
            attributes = head_attributes(self.model, makers, takers, params, live)
        else:
            attributes = ffn_attributes(self.model, makers, takers, live)
        return Group(
            name=call.name,
            kind="mha" if attention else "ffn",
            num_units=num_units,
            producers=members,
            consumers=consumers,
            between=self._between(params, num_units),
            attributes=attributes,
            is_head=any(self.trace.last >> t.index & 1 for t in takers),
        )

    # ------------------------------------------------------------------ units

    def _unit(self, call: Call) -> Unit | None:
        """The digits of a linear's input features that can be removed one by one.

        They are the longest leading run of digits that nothing mixed and that all linears and
        parameters that share any of them lead with too.
        """
        digits = leaves(call.taken)
        made = [d for d in digits if self.makers.get(d)]
        if not made:
            self._refuse_lost(call)
            return None
        names = _names(m for d in made for m in self.makers[d])
        stop = next(
            (i for i, d in enumerate(digits) if not isinstance(d, Axis) or d.mixed), len(digits)
        )
        if stop == 0:
            first = made[0]
            assert isinstance(first, Axis)
            if first.residual and first.normed and not call.fresh & ~self.trace.joined:
                return None  # the residual stream: its width is everyone's
            reason = first.mixed or "they are not in the order of its input features"
            raise _Refused(f"its input features are those of {names}, but {reason}")
        unit = tuple(digits[:stop])
        while True:
            shorter = unit
            for other in self._sharing(unit):
                shorter = shorter[: _common(shorter, other)]
            if not shorter:
                parts = any(m.out.size > extent(digits) for d in made for m in self.makers[d])
                why = "a part of them (a fused projection)" if parts else "not in the same order"
                raise _Refused(f"its input features are those of {names}, but {why}")
            if shorter == unit:
                return unit
            unit = shorter

    def _sharing(self, unit: Unit) -> list[list[Factor]]:
        found = [leaves([m.out]) for m in self._having(unit, self.makers)]
        found += [leaves(t.taken) for t in self._having(unit, self.takers)]
        for axis in unit:
            found += [leaves([self.trace.params[p]]) for p in self.params.get(axis, [])]
        return found

    @staticmethod
    def _having(unit: Unit, where: dict[Factor, list[Call]]) -> list[Call]:
        found = {c.index: c for axis in unit for c in where.get(axis, [])}
        return [found[i] for i in sorted(found)]

    def _refuse_lost(self, call: Call) -> None:
        """A linear whose input no longer shows the features of the linears that made it."""
        for axis in sorted((a.root for a in call.lost), key=lambda a: bool(a.residual)):
            for digit in axes([axis]):
                makers = self.makers.get(digit)
                if makers and digit.mixed and not (digit.residual and digit.normed):
                    raise _Refused(
                        f"its input comes from the features of {_names(makers)}, but {digit.mixed}"
                    )

    # ------------------------------------------------------------------ members

    def _channels(
        self, unit: Unit, makers: list[Call], takers: list[Call], size: int
    ) -> tuple[Member, ...]:
        """Producers of an FFN group.

        Raises:
            _Refused: several second linears, blocks of channels, or an attention with one head.
        """
        if len(takers) > 1:
            raise _Refused(
                f"the output of {_names(makers)} is consumed by {_names(takers)}, "
                "whose masks could differ"
            )
        live = extent(unit)
        carried = {axis for dim in self.trace.carried for axis in axes(dim)}
        if carried & set(axes(unit)):
            raise _Refused(f"between {_names(makers)} and it lies an attention with a single head")
        if size != 1 or any(m.out.size != live for m in makers):
            raise _Refused(
                f"the features of {_names(makers)} can only be removed in blocks: a fused "
                "projection or an attention of another kind"
            )
        return tuple(Member(m.name, 1, "producer") for m in makers)

    def _role(self, call: Call) -> str | None:
        """``query`` or ``key``: on which side of a product its features come first."""
        mine = set(axes([call.out]))
        for left, right in self.trace.products:
            sides = (bool(mine & set(axes(left))), bool(mine & set(axes(right))))
            if sides[0] != sides[1]:
                return "query" if sides[0] else "key"
        return None

    def _heads(
        self, unit: Unit, makers: list[Call], takers: list[Call], params: Sequence[object]
    ) -> tuple[Member, ...]:
        """Producers of an attention group, with their roles.

        Raises:
            _Refused: not one query, key and value for each output projection, different inputs,
                or key and value heads shared by several query heads.
        """
        live = extent(unit)
        values = {tuple(leaves(t.taken)) for t in takers}
        if len(takers) > 1 and (not params or len(values) < len(takers)):
            raise _Refused(
                f"the heads of {_names(makers)} are consumed by {_names(takers)}, "
                "whose masks could differ"
            )
        members, sources = [], dict[str, set[int]]()
        for m in makers:
            role = self._role(m)
            if role is None:
                role = "value" if tuple(leaves([m.out])) in values else "producer"
            members.append(Member(m.name, m.out.size // live, role))
            sources.setdefault(role, set()).add(m.source)
        counts = [sum(m.role == r for m in members) for r in ("query", "key", "value")]
        if {m.unit_size for m in members if m.role == "key"} != {
            m.unit_size for m in members if m.role == "query"
        }:
            raise _Refused(
                "key and value heads are shared by several query heads (grouped-query "
                "attention), which is not supported yet"
            )
        if counts != [len(takers)] * 3 or len(members) != 3 * len(takers):
            raise _Refused(
                f"no query, key and value are recognised among {_names(makers)}: a fused "
                "projection or another kind of attention"
            )
        if not sources["query"] == sources["key"] == sources["value"]:
            raise _Refused(
                "its queries and its keys and values come from different inputs "
                "(cross-attention), which is not supported yet"
            )
        return tuple(members)

    def _check_sizes(
        self, unit: Unit, makers: list[Call], takers: list[Call], num_units: int
    ) -> None:
        live = extent(unit)
        sizes = [(m.name, m.module.out_features, m.out.size) for m in makers]
        sizes += [(t.name, t.module.in_features, extent(t.taken)) for t in takers]
        for name, features, traced in sizes:
            if features != num_units * (traced // live):
                raise _Refused(f"the masks of {name!r} and of its group are of different widths")

    def _between(self, params: Sequence[tuple[str, int]], num_units: int) -> tuple[Between, ...]:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        found = []
        for name, dim in params:
            ties = [n for n, p in named.items() if p is named[name] and n != name]
            if ties:
                raise _Refused(f"{name!r}, which lies in between, is tied to {ties[0]!r}")
            entries = named[name].shape[dim]
            found.append(Between(name, dim, entries // num_units))
        return tuple(found)


def _common(a: Sequence[Factor], b: Sequence[Factor]) -> int:
    """Length of the common prefix."""
    n = 0
    while n < min(len(a), len(b)) and a[n] is b[n]:
        n += 1
    return n


def _names(calls: object) -> str:
    names = list(dict.fromkeys(c.name for c in calls))  # type: ignore[attr-defined]
    shown = ", ".join(repr(n) for n in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
