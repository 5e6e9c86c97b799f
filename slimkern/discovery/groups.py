"""What discovery finds: groups of weight slices that must go together, and what it refused.

Plain frozen data, readable as JSON, so that a plan can carry the description of its groups and be
applied to a fresh model without tracing it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["ffn", "mha"]


@dataclass(frozen=True)
class Member:
    """A linear module of a group.

    Unit ``u`` of the group is the rows (producer) or columns (consumer)
    ``u * unit_size : (u + 1) * unit_size`` of its weight, and of a producer's bias.

    Attributes:
        name: the module's dotted name in the model.
        unit_size: rows or columns per unit (1 for an FFN channel, ``head_dim`` for a head).
        role: ``producer`` or ``consumer``; in attention a producer is ``query``, ``key`` or
            ``value``.
    """

    name: str
    unit_size: int
    role: str


@dataclass(frozen=True)
class Between:
    """A parameter between producers and consumers that is indexed by unit and is cut with it.

    Attributes:
        name: the parameter's dotted name (``encoder.relative_attention_bias.weight``).
        dim: the dimension that runs over units.
        unit_size: entries of that dimension per unit.
    """

    name: str
    dim: int
    unit_size: int


@dataclass(frozen=True)
class Attribute:
    """An integer attribute of a module that counts units: after the cut it is kept * per_unit.

    Attributes:
        module: the module's dotted name.
        name: the attribute's name (``num_attention_heads``, ``all_head_size``).
        per_unit: what one unit adds to it (1 for a count of heads, ``head_dim`` for a width).
    """

    module: str
    name: str
    per_unit: int


@dataclass(frozen=True)
class Group:
    """Weight slices that must go together; one unit is the smallest thing that can be removed.

    Attributes:
        name: the dotted name of the (first) second linear: the group's identity.
        kind: ``ffn`` (units are channels) or ``mha`` (units are heads).
        num_units: units in the layer as it stands.
        producers: linears whose output rows are the units.
        consumers: linears whose input columns are the units: the second linear. Several where
            layers are tied.
        between: per-unit parameters in between, cut with the units. While one is there, masked
            training computes the producers in full.
        attributes: integer attributes that must follow the cut.
        is_head: the consumer reaches the model's outputs with no other linear after it.
    """

    name: str
    kind: Kind
    num_units: int
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    between: tuple[Between, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    is_head: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The group as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Group:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError, TypeError: a field is missing or unknown.
        """
        fields = dict(data)
        fields["producers"] = tuple(Member(**m) for m in data["producers"])
        fields["consumers"] = tuple(Member(**m) for m in data["consumers"])
        fields["between"] = tuple(Between(**b) for b in data.get("between", ()))
        fields["attributes"] = tuple(Attribute(**a) for a in data.get("attributes", ()))
        return cls(**fields)


@dataclass(frozen=True)
class Refusal:
    """A linear whose channels can't be removed exactly, and why.

    Attributes:
        name: the dotted name of the linear.
        reason: one sentence, naming the place that stands in the way.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Discovery:
    """The groups of a model in order of execution, and the refusals. Prints as a table."""

    groups: tuple[Group, ...]
    refused: tuple[Refusal, ...] = field(default=())

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group is named {name!r}; groups: {[g.name for g in self.groups]}")

    def __str__(self) -> str:
        rows = [("group", "kind", "units", "size", "producers")]
        for g in self.groups:
            made_by = ", ".join(m.name.removeprefix(_common(g)) for m in g.producers[:4])
            more = f", ... ({len(g.producers)})" if len(g.producers) > 4 else ""
            size = str(g.consumers[0].unit_size)
            name = g.name + (" (model head)" if g.is_head else "")
            rows.append((name, g.kind, str(g.num_units), size, made_by + more))
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
        lines += [f"refused  {r.name}: {r.reason}" for r in self.refused]
        return "\n".join(lines)


def _common(group: Group) -> str:
    """The dotted prefix that all names of a group share, so that a table can leave it out."""
    names = [m.name.split(".") for m in (*group.producers, *group.consumers)]
    prefix: list[str] = []
    for parts in zip(*names):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix) + "." if prefix else ""
