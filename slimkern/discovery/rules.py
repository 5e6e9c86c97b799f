"""What each operation does to the axes of its operands.

A rule gets the operation with its arguments by name and returns the dimensions of the result (the
first result, where there are several). An operation without a rule mixes whatever it is given: the
axes in it can't be cut, and the reason names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimkern.discovery import rules_entries, rules_products, rules_shapes
from slimkern.discovery.axes import Axis, Dim, axes, mix
from slimkern.discovery.op import Op, Rule, unknown
from slimkern.discovery.record import Value
from slimkern.discovery.rules_entries import pointwise
from slimkern.discovery.rules_shapes import SEVERAL, several

if TYPE_CHECKING:
    from slimkern.discovery.trace import Tracer

RULES: dict[str, Rule] = {
    **rules_entries.RULES,
    **rules_shapes.RULES,
    **rules_products.RULES,
}


def apply(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Work out what is known of the results of one operation."""
    outs = _tensors(out if isinstance(out, (tuple, list)) else (out,))
    name = func._schema.name.split("::")[1]
    writes = func._schema.is_mutable
    if not (outs or writes or name in _READS):
        return
    bound = _bind(func, args, kwargs)
    operands = [tracer.value(t) for t in _tensors(bound.values())]
    op = Op(tracer, name, bound, operands, outs[0] if outs else operands[0].tensor)
    if not outs or (writes and not name.endswith("_")):
        unknown(op)
        for v in operands:
            v.lost |= frozenset(a for w in operands for d in w.dims for a in axes(d))
        outs = outs or [op.out]
    rule = RULES.get(name) or RULES.get(name.rstrip("_"))
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = pointwise
    if 0 in outs[0].shape or (writes and not name.endswith("_")):
        rule = None
    results = several(op, outs) if name in SEVERAL else [(rule or unknown)(op)]
    _record(op, outs, results, writes)


_READS = {"_local_scalar_dense", "item", "equal", "is_nonzero"}


def _record(op: Op, outs: list[Tensor], results: list[list[Dim]], writes: bool) -> None:
    tracer, operands = op.tracer, op.operands
    made_by, last, live = op.bits, 0, False
    lost: set[Axis] = set()
    for v in operands:
        made_by, last, live = made_by | v.made_by, last | v.last, live or v.live
        lost |= v.lost
        lost.update(a for d in v.dims for a in axes(d))
    last = 0 if op.residual or op.bits else last
    name = operands[0].name if len(operands) == 1 and not live else ""
    for i, tensor in enumerate(outs):
        dims: list[Dim] = results[i] if i < len(results) else [(int(n),) for n in tensor.shape]
        shown = {a for d in dims for a in axes(d)}
        gone = frozenset(a for a in lost if a.root not in shown)
        if writes and i == 0:
            _write(op, tracer.value(tensor), Value(tensor, dims, made_by, last, live, gone))
        else:
            tracer.put(Value(tensor, dims, made_by, last, live, gone, name))


def _write(op: Op, old: Value, new: Value) -> None:
    """An operation in place: everything that shares the memory now depends on its operands."""
    sharing = [v for v in op.tracer.by_storage[storage(old.tensor)] if v is not old]
    before = {a for d in old.dims for a in axes(d)}
    added = {a for d in new.dims for a in axes(d)} - before
    if sharing and added:
        mix(added, f"{op.here} writes them into a part of another tensor")
        new.lost |= added
    for v in sharing:
        v.made_by, v.last, v.live = v.made_by | new.made_by, v.last | new.last, v.live or new.live
        v.lost |= new.lost
    old.dims, old.made_by, old.last = new.dims, new.made_by, new.last
    old.live, old.lost = new.live, new.lost


def _bind(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    schema = func._schema.arguments
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    bound.update((a.name, value) for a, value in zip(schema, args))
    bound.update(kwargs)
    return bound


def _tensors(data: Iterable[Any]) -> list[Tensor]:
    found = []
    for item in data:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found += [t for t in item if isinstance(t, Tensor)]
    return found


def storage(tensor: Tensor) -> int:
    """What tells memory apart."""
    return tensor.untyped_storage()._cdata
