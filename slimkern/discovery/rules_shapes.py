"""Rules of views, of parts and joins of tensors, and of lookups."""

from __future__ import annotations

import torch
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


@rule(RULES, "view_as_complex")
def _complex(op: Op) -> list[Dim]:
    *dims, parts = op.of("self").dims
    op.mix([parts])
    return dims


@rule(RULES, "view_as_real")
def _real(op: Op) -> list[Dim]:
    return [*op.of("self").dims, (2,)]


@rule(RULES, "constant_pad_nd", "repeat", "topk")
def _resized(op: Op) -> list[Dim]:
    """Operations that change the extent of some dimensions and keep the others as they are."""
    value, dims = op.of("self"), op.plain()
    chosen = op.args["dim"] % len(dims) - len(dims) if op.name == "topk" else None
    for d in range(1, len(value.dims) + 1):
        if value.tensor.shape[-d] != op.out.shape[-d] or -d == chosen:
            op.mix([value.dims[-d]])
        elif op.name != "constant_pad_nd" or not any(op.args["pad"][2 * d - 2 : 2 * d]):
            dims[-d] = value.dims[-d]
        else:
            op.mix([value.dims[-d]])
    return dims


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
    if None in indices[: len([i for i in indices if i is not None])]:
        return unknown(op)
    used = 0  # a mask takes as many dimensions as it has
    for t in (i for i in indices if i is not None):
        used += t.dim() if t.dtype in (torch.bool, torch.uint8) else 1
        op.mix(op.tracer.value(t).dims)
    for dim in dims[:used]:
        op.part(dim)
    kept = dims[used:]
    return [*op.plain()[: op.out.dim() - len(kept)], *kept]


@rule(RULES, "index_select")
def _index_select(op: Op) -> list[Dim]:
    dims = list(op.of("self").dims)
    d = op.args["dim"] % len(dims)
    op.part(dims[d])
    dims[d] = (int(op.out.shape[d]),)
    return dims
