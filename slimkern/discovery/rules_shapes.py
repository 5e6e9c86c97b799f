"""Rules of views, of parts and joins of tensors, and of lookups."""

from __future__ import annotations

from torch import Tensor

from slimkern.discovery.axes import Dim, mix, regroup
from slimkern.discovery.op import Op, Rule, rule, unknown

RULES: dict[str, Rule] = {}


@rule(RULES, "view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(op: Op) -> list[Dim]:
    odd = f"{op.here} regroups them into blocks that don't line up"
    if "size" not in op.args:
        return unknown(op)
    return regroup(op.of("self").dims, op.out.shape, odd)


@rule(RULES, "t", "transpose", "permute", "swapaxes")
def _permute(op: Op) -> list[Dim]:
    dims = list(op.of("self").dims)
    if op.name == "permute":
        return [dims[d] for d in op.args["dims"]]
    if len(dims) >= 2:
        a, b = (0, 1) if op.name == "t" else (op.args["dim0"], op.args["dim1"])
        dims[a], dims[b] = dims[b], dims[a]
    return dims


@rule(RULES, "unsqueeze")
def _unsqueeze(op: Op) -> list[Dim]:
    dims = list(op.of("self").dims)
    dims.insert(op.args["dim"] % (len(dims) + 1), (1,))
    return dims


@rule(RULES, "squeeze")
def _squeeze(op: Op) -> list[Dim]:
    value, over = op.of("self"), op.args.get("dim")
    rank = len(value.dims)
    over = range(rank) if over is None else over if isinstance(over, (list, tuple)) else [over]
    gone = {d % rank for d in over if value.tensor.shape[d] == 1} if rank else set()
    return [dim for d, dim in enumerate(value.dims) if d not in gone]


@rule(RULES, "expand")
def _expand(op: Op) -> list[Dim]:
    value, dims = op.of("self"), op.plain()
    for d in range(1, len(value.dims) + 1):
        if value.tensor.shape[-d] == op.out.shape[-d]:
            dims[-d] = value.dims[-d]
    return dims


@rule(RULES, "slice", "narrow")
def _slice(op: Op) -> list[Dim]:
    value, dims = op.of("self"), list(op.of("self").dims)
    d = op.args["dim"] % len(dims)
    if op.out.shape[d] != value.tensor.shape[d]:
        op.part(dims[d])
        dims[d] = (int(op.out.shape[d]),)
    return dims


@rule(RULES, "select")
def _select(op: Op) -> list[Dim]:
    dims = list(op.of("self").dims)
    op.part(dims.pop(op.args["dim"]))
    return dims


SEVERAL = {"split", "split_with_sizes", "unbind", "chunk", "unsafe_split", "unsafe_chunk"}


def several(op: Op, outs: list[Tensor]) -> list[list[Dim]]:
    """Operations that divide a tensor along one dimension."""
    dims = list(op.of("self").dims)
    d = op.args["dim"] % len(dims)
    if len(outs) > 1:
        op.part(dims[d])
    rest = [dims[:d], dims[d + 1 :]]
    if op.name == "unbind":
        return [[*rest[0], *rest[1]] for _ in outs]
    return [[*rest[0], (int(t.shape[d]),), *rest[1]] for t in outs]


@rule(RULES, "cat", "stack")
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
            op.meet(a, b, v, [v, parts[0][0]]) if i != d else a
            for i, (a, b) in enumerate(zip(merged, dims))
        ]
    return [along if i == d else dim for i, dim in enumerate(merged)]


@rule(RULES, "embedding")
def _embedding(op: Op) -> list[Dim]:
    weight, indices = op.of("weight"), op.of("indices")
    op.mix(indices.dims)
    mix(weight.dims[0], f"{op.here} looks them up")
    return [*([(int(n),) for n in indices.tensor.shape]), weight.dims[1]]


@rule(RULES, "index")
def _index(op: Op) -> list[Dim]:
    """Indexing with tensors: the leading dimensions are looked up, the others stay."""
    dims, indices = list(op.of("self").dims), list(op.args["indices"])
    used = [i for i, t in enumerate(indices) if t is not None]
    for i in used:
        op.part(dims[i])
        op.mix(op.tracer.value(indices[i]).dims)
    if used != list(range(len(used))):
        unknown(op)
        return op.plain()
    kept = dims[len(used) :]
    return [*op.plain()[: op.out.dim() - len(kept)], *kept]


@rule(RULES, "index_select")
def _index_select(op: Op) -> list[Dim]:
    dims = list(op.of("self").dims)
    d = op.args["dim"] % len(dims)
    op.part(dims[d])
    dims[d] = (int(op.out.shape[d]),)
    return dims
