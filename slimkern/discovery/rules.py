"""What each operation does to the axes of its operands.

A rule gets the operation with its arguments by name and returns the dimensions of the result (the
first result, where there are several). An operation without a rule mixes whatever it is given: the
axes in it can't be cut, and the reason names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimkern.discovery.axes import Axis, Dim, axes, mix, pair, regroup

if TYPE_CHECKING:
    from slimkern.discovery.trace import Tracer, Value


@dataclass
class Op:
    """An operation in flight: its short name, arguments by name, operands, result and place."""

    tracer: Tracer
    name: str
    args: dict[str, Any]
    operands: list[Value]
    out: Tensor
    residual: bool = False
    bits: int = 0

    @property
    def here(self) -> str:
        """How reasons speak of the operation: its name and its place."""
        name = self.name.strip("_").removeprefix("native_")
        if name.startswith("scaled_dot_product"):
            name = "scaled_dot_product_attention"
        return f"{name!r} {self.tracer.here()}"

    def of(self, name: str) -> Value:
        """What is known of the operand ``name``."""
        return self.tracer.value(self.args[name])

    def mix(self, dims: Iterable[Dim], *, normed: bool = False) -> None:
        """The operation mixes the entries of these dimensions."""
        for dim in dims:
            mix(dim, f"{self.here} mixes them", normed=normed)

    def plain(self) -> list[Dim]:
        """A result without axes."""
        return [(int(n),) for n in self.out.shape]


Rule = Callable[[Op], "list[Dim]"]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


def apply(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Work out what is known of the results of one operation."""
    outs = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if _is_tensor(t)]
    name = func._schema.name.split("::")[1]
    writes = func._schema.is_mutable
    if not (outs or writes or name in _READS):
        return
    bound = _bind(func, args, kwargs)
    operands = [tracer.value(t) for t in _tensors(bound.values())]
    op = Op(tracer, name, bound, operands, outs[0] if outs else operands[0].tensor)
    if not outs or (writes and not name.endswith("_")):
        _unknown(op)
        for v in operands:
            v.lost |= frozenset(a for w in operands for d in w.dims for a in axes(d))
        outs = outs or [op.out]
    rule = RULES.get(name) or RULES.get(name.rstrip("_"))
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = _pointwise
    if 0 in outs[0].shape or (writes and not name.endswith("_")):
        rule = None
    results = _several(op, outs) if name in _SEVERAL else [(rule or _unknown)(op)]
    _record(op, outs, results, writes)


_READS = {"_local_scalar_dense", "item", "equal", "is_nonzero"}


def _record(op: Op, outs: list[Tensor], results: list[list[Dim]], writes: bool) -> None:
    from slimkern.discovery.trace import Value

    tracer, operands = op.tracer, op.operands
    made_by, last, live = op.bits, 0, False
    lost: set[Axis] = set()
    for v in operands:
        made_by, last, live = made_by | v.made_by, last | v.last, live or v.live
        lost |= v.lost
        lost.update(a for d in v.dims for a in axes(d))
    last = 0 if op.residual else last
    name = operands[0].name if len(operands) == 1 and not live else ""
    for i, tensor in enumerate(outs):
        dims = results[i] if i < len(results) else [(int(n),) for n in tensor.shape]
        shown = {a for d in dims for a in axes(d)}
        gone = frozenset(a for a in lost if a.root not in shown)
        if writes and i == 0:
            _write(op, tracer.value(tensor), Value(tensor, dims, made_by, last, live, gone))
        else:
            tracer.put(Value(tensor, dims, made_by, last, live, gone, name))


def _write(op: Op, old: Value, new: Value) -> None:
    """An operation in place: everything that shares the memory now depends on its operands."""
    from slimkern.discovery.trace import _storage

    sharing = [v for v in op.tracer.by_storage[_storage(old.tensor)] if v is not old]
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


def _is_tensor(data: Any) -> bool:
    return isinstance(data, Tensor)


def _tensors(data: Iterable[Any]) -> list[Tensor]:
    found = []
    for item in data:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found += [t for t in item if isinstance(t, Tensor)]
    return found


def _unknown(op: Op) -> list[Dim]:
    op.mix(d for v in op.operands for d in v.dims)
    return op.plain()


# ------------------------------------------------------------------------------- entry by entry


def _pointwise(op: Op) -> list[Dim]:
    """Broadcasting operations: entries that meet belong together."""
    values = [v for v in op.operands if v.dims]
    rank = op.out.dim()
    _note_residual(op, values)
    dims: list[Dim] = []
    for d in range(rank):
        dim: Dim | None = None
        for v in values:
            i = d - rank + len(v.dims)
            if i < 0 or v.tensor.shape[i] != op.out.shape[d] or op.out.shape[d] == 1:
                continue
            dim = v.dims[i] if dim is None else _meet(op, dim, v.dims[i], v, values)
        dims.append((int(op.out.shape[d]),) if dim is None else dim)
    return dims


def _meet(op: Op, a: Dim, b: Dim, value: Value, values: list[Value]) -> Dim:
    def plain(axis: Axis, in_a: bool) -> None:
        axis.residual |= op.residual
        other = value if in_a else next(v for v in values if v is not value)
        axis.mixed = axis.mixed or _sum_or_constant(op, other)

    common = pair(a, b, plain, f"{op.here} pairs them with entries that are arranged differently")
    if op.residual:
        for axis in axes(common):
            axis.residual = True
            axis.mixed = axis.mixed or _sum_or_constant(op, value)
    return common


def _sum_or_constant(op: Op, other: Value) -> str:
    if op.residual:
        return f"a residual is added to them {op.tracer.here()}"
    kind = "an activation" if other.live else "a constant"
    what = repr(other.name) if other.name else kind
    return f"{op.here} combines them with {what}, which can't be cut"


def _note_residual(op: Op, values: list[Value]) -> None:
    """A sum of an activation and something computed from it by linears."""
    if op.name.rstrip("_") not in ("add", "sub", "rsub") or len(values) != 2:
        return
    a, b = values
    if not (a.live and b.live) or a.tensor.numel() != b.tensor.numel():
        return
    nested = (a.made_by & b.made_by) in (a.made_by, b.made_by)
    op.residual = nested and a.made_by != b.made_by
    if op.residual:
        op.tracer.trace.joined |= a.last | b.last


@_rule(
    "_to_copy", "copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "clone",
    "masked_fill", "_prelu_kernel", "hardswish", "gelu", "silu", "fill", "floor_divide",
    "zeros_like", "ones_like", "full_like", "empty_like", "contiguous", "log_sigmoid_forward",
)  # fmt: skip
def _entries(op: Op) -> list[Dim]:
    return _pointwise(op)


@_rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "logcumsumexp", "cumprod", "sort")
def _along(op: Op) -> list[Dim]:
    """Operations that mix the entries of one dimension and keep the shape."""
    dims = list(op.of("self").dims)
    if dims:
        op.mix([dims[op.args["dim"]]])
    return dims


@_rule("native_layer_norm", "_fused_rms_norm")
def _norm(op: Op) -> list[Dim]:
    dims = list(op.of("input").dims)
    op.mix(dims[-len(op.args["normalized_shape"]) :], normed=True)
    return dims


@_rule(
    "sum", "mean", "amax", "amin", "prod", "logsumexp", "argmax", "argmin", "max", "min", "any",
    "all", "var", "std", "linalg_vector_norm", "norm", "median",
)  # fmt: skip
def _reduce(op: Op) -> list[Dim]:
    """Reductions over some dimensions (all where none is named)."""
    dims = list(op.of("self").dims)
    if "other" in op.args:
        return _pointwise(op)
    over = op.args.get("dim")
    if over is None or over == []:
        over = list(range(len(dims)))
    over = [d % len(dims) for d in (over if isinstance(over, (list, tuple)) else [over])]
    op.mix([dims[d] for d in over], normed=True)
    if op.args.get("keepdim"):
        return [(1,) if d in over else dim for d, dim in enumerate(dims)]
    return [dim for d, dim in enumerate(dims) if d not in over]


# ------------------------------------------------------------------------------- views


@_rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(op: Op) -> list[Dim]:
    odd = f"{op.here} regroups them into blocks that don't line up"
    if "size" not in op.args:
        return _unknown(op)
    return regroup(op.of("self").dims, op.out.shape, odd)


@_rule("t", "transpose", "permute", "swapaxes")
def _permute(op: Op) -> list[Dim]:
    dims = list(op.of("self").dims)
    if op.name == "permute":
        return [dims[d] for d in op.args["dims"]]
    if len(dims) >= 2:
        a, b = (0, 1) if op.name == "t" else (op.args["dim0"], op.args["dim1"])
        dims[a], dims[b] = dims[b], dims[a]
    return dims


@_rule("unsqueeze")
def _unsqueeze(op: Op) -> list[Dim]:
    dims = list(op.of("self").dims)
    dims.insert(op.args["dim"] % (len(dims) + 1), (1,))
    return dims


@_rule("squeeze")
def _squeeze(op: Op) -> list[Dim]:
    value, over = op.of("self"), op.args.get("dim")
    rank = len(value.dims)
    over = range(rank) if over is None else over if isinstance(over, (list, tuple)) else [over]
    gone = {d % rank for d in over if value.tensor.shape[d] == 1} if rank else set()
    return [dim for d, dim in enumerate(value.dims) if d not in gone]


@_rule("expand")
def _expand(op: Op) -> list[Dim]:
    value, dims = op.of("self"), op.plain()
    for d in range(1, len(value.dims) + 1):
        if value.tensor.shape[-d] == op.out.shape[-d]:
            dims[-d] = value.dims[-d]
    return dims


@_rule("slice", "narrow")
def _slice(op: Op) -> list[Dim]:
    value, dims = op.of("self"), list(op.of("self").dims)
    d = op.args["dim"] % len(dims)
    if op.out.shape[d] != value.tensor.shape[d]:
        _part(op, dims[d])
        dims[d] = (int(op.out.shape[d]),)
    return dims


@_rule("select")
def _select(op: Op) -> list[Dim]:
    dims = list(op.of("self").dims)
    _part(op, dims.pop(op.args["dim"]))
    return dims


def _part(op: Op, dim: Dim) -> None:
    mix(dim, f"{op.here} takes a part of them (a fused projection)")


_SEVERAL = {"split", "split_with_sizes", "unbind", "chunk", "unsafe_split", "unsafe_chunk"}


def _several(op: Op, outs: list[Tensor]) -> list[list[Dim]]:
    """Operations that divide a tensor along one dimension."""
    dims = list(op.of("self").dims)
    d = op.args["dim"] % len(dims)
    if len(outs) > 1:
        _part(op, dims[d])
    rest = [dims[:d], dims[d + 1 :]]
    if op.name == "unbind":
        return [[*rest[0], *rest[1]] for _ in outs]
    return [[*rest[0], (int(t.shape[d]),), *rest[1]] for t in outs]


@_rule("cat", "stack")
def _cat(op: Op) -> list[Dim]:
    rank, stacked = op.out.dim(), op.name == "stack"
    d = op.args["dim"] % rank
    parts = []
    for v in op.operands:
        if v.tensor.numel() == 0:
            continue
        dims = list(v.dims)
        if stacked:
            dims.insert(d, (1,))
        parts.append((v, dims))
    if len(parts) > 1 or stacked:
        op.mix(dims[d] for _, dims in parts)
        along: Dim = (int(op.out.shape[d]),)
    else:
        along = parts[0][1][d]
    merged = parts[0][1]
    for v, dims in parts[1:]:
        merged = [
            _meet(op, a, b, v, [v, parts[0][0]]) if i != d else a
            for i, (a, b) in enumerate(zip(merged, dims))
        ]
    return [along if i == d else dim for i, dim in enumerate(merged)]


# ------------------------------------------------------------------------------- lookups


@_rule("embedding")
def _embedding(op: Op) -> list[Dim]:
    weight, indices = op.of("weight"), op.of("indices")
    op.mix(indices.dims)
    mix(weight.dims[0], f"{op.here} looks them up")
    return [*([(int(n),) for n in indices.tensor.shape]), weight.dims[1]]


@_rule("index")
def _index(op: Op) -> list[Dim]:
    """Indexing with tensors: the leading dimensions are looked up, the others stay."""
    dims, indices = list(op.of("self").dims), list(op.args["indices"])
    used = [i for i, t in enumerate(indices) if t is not None]
    for i in used:
        _part(op, dims[i])
        op.mix(op.tracer.value(indices[i]).dims)
    if used != list(range(len(used))):
        _unknown(op)
        return op.plain()
    kept = dims[len(used) :]
    return [*op.plain()[: op.out.dim() - len(kept)], *kept]


@_rule("index_select")
def _index_select(op: Op) -> list[Dim]:
    dims = list(op.of("self").dims)
    d = op.args["dim"] % len(dims)
    _part(op, dims[d])
    dims[d] = (int(op.out.shape[d]),)
    return dims


# ------------------------------------------------------------------------------- contractions


def _contract(op: Op, a: Value, b: Value) -> list[Dim]:
    """``[..., M, K] @ [..., K, N]``: batch dimensions meet, K is mixed, M and N stay."""
    for factor, dim in ((a, b.dims[-2]), (b, a.dims[-1])):
        if factor.name in op.tracer.parameters:
            owner, _, leaf = factor.name.rpartition(".")
            op.bits |= 1 << op.tracer.matrix(owner, leaf)
            kind = type(op.tracer.modules[owner]).__name__
            mix(dim, f"{factor.name!r} multiplies them outside a plain torch.nn.Linear ({kind})")
    op.mix([a.dims[-1], b.dims[-2]])
    if a.live and b.live:
        op.tracer.trace.products.append((a.dims[-1], b.dims[-2]))
        op.tracer.trace.carried.append((*a.dims[-2], *b.dims[-1]))
    batch = [_meet(op, x, y, b, [b, a]) for x, y in zip(a.dims[:-2], b.dims[:-2])]
    return [*batch, a.dims[-2], b.dims[-1]]


@_rule("mm", "bmm")
def _mm(op: Op) -> list[Dim]:
    return _contract(op, op.of("self"), op.of("mat2"))


@_rule("addmm", "baddbmm")
def _addmm(op: Op) -> list[Dim]:
    names = ("mat1", "mat2") if op.name == "addmm" else ("batch1", "batch2")
    dims = _contract(op, op.of(names[0]), op.of(names[1]))
    added = op.of("self")
    for d in range(1, len(added.dims) + 1):
        if added.tensor.shape[-d] == op.out.shape[-d] > 1:
            dims[-d] = _meet(op, dims[-d], added.dims[-d], added, [added, op.operands[-1]])
    return dims


@_rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def _attention(op: Op) -> list[Dim]:
    """Fused attention: ``softmax(q kᵀ + mask) v`` for each entry of the leading dimensions."""
    q, k, v = (op.of(n) for n in ("query", "key", "value"))
    op.mix([q.dims[-1], k.dims[-1], k.dims[-2], v.dims[-2]])
    op.tracer.trace.products.append((q.dims[-1], k.dims[-1]))
    op.tracer.trace.carried.append(v.dims[-1])
    lead = list(q.dims[:-2])
    masks = [op.args.get(n) for n in ("attn_mask", "attn_bias")]
    for other in [k, v, *(op.tracer.value(m) for m in masks if _is_tensor(m))]:
        for d in range(len(lead)):
            i = d - q.tensor.dim()
            if -i > other.tensor.dim() or other.tensor.shape[i] == 1 or _repeats(other, i):
                continue
            shared = q.tensor.shape[d] // other.tensor.shape[i]  # grouped-query attention
            lead[d] = _meet(op, lead[d], (*other.dims[i], shared), other, [other, q])
    return [*lead, q.dims[-2], v.dims[-1]]


def _repeats(value: Value, dim: int) -> bool:
    """Whether a dimension is one entry shown many times (``expand``)."""
    return value.tensor.shape[dim] > 1 and value.tensor.stride(dim) == 0
