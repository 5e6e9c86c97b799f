"""Rules of operations that work entry by entry or along a dimension."""

from __future__ import annotations

from slimkern.discovery.axes import Dim
from slimkern.discovery.op import Op, Rule, repeats, rule
from slimkern.discovery.record import Value

RULES: dict[str, Rule] = {}


def pointwise(op: Op) -> list[Dim]:
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
            if len(values) > 1 and repeats(v, i):
                continue
            dim = v.dims[i] if dim is None else op.meet(dim, v.dims[i], v, values)
        dims.append((int(op.out.shape[d]),) if dim is None else dim)
    return dims


def _note_residual(op: Op, values: list[Value]) -> None:
    """A sum of an activation and something that linears computed from it."""
    if op.name.rstrip("_") not in ("add", "sub", "rsub") or len(values) != 2:
        return
    a, b = sorted(values, key=lambda v: v.made_by.bit_count())
    if not (a.live and b.live) or a.tensor.numel() != b.tensor.numel() or a.made_by & ~b.made_by:
        return
    branch = b.made_by & ~a.made_by
    sources = (s for bit, s in op.tracer.sources.items() if branch >> bit & 1)
    op.residual = any(not a.made_by & ~source for source in sources)
    if op.residual:
        op.tracer.trace.joined |= a.last | b.last


@rule(
    RULES,
    "_to_copy", "copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "clone",
    "masked_fill", "_prelu_kernel", "hardswish", "gelu", "silu", "fill", "floor_divide",
    "zeros_like", "ones_like", "full_like", "empty_like", "contiguous", "log_sigmoid_forward",
)  # fmt: skip
def _entries(op: Op) -> list[Dim]:
    return pointwise(op)


@rule(
    RULES, "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "logcumsumexp", "cumprod", "sort"
)
def _along(op: Op) -> list[Dim]:
    """Operations that mix the entries of one dimension and keep the shape."""
    dims = list(op.of("self").dims)
    if dims:
        op.mix([dims[op.args["dim"]]])
    return dims


@rule(RULES, "triu", "tril")
def _triangle(op: Op) -> list[Dim]:
    dims = list(op.of("self").dims)
    op.mix(dims[-2:])
    return dims


@rule(RULES, "flip", "roll")
def _reorder(op: Op) -> list[Dim]:
    """Operations that reorder the entries of some dimensions (all where none is named)."""
    dims = list(op.of("self").dims)
    op.mix([dims[d] for d in op.args["dims"] or range(len(dims))])
    return dims


@rule(RULES, "native_layer_norm", "_fused_rms_norm")
def _norm(op: Op) -> list[Dim]:
    dims = list(op.of("input").dims)
    op.mix(dims[-len(op.args["normalized_shape"]) :], normed=True)
    return dims


@rule(
    RULES,
    "sum", "mean", "amax", "amin", "prod", "logsumexp", "argmax", "argmin", "max", "min", "any",
    "all", "var", "std", "linalg_vector_norm", "norm", "median",
)  # fmt: skip
def _reduce(op: Op) -> list[Dim]:
    """Reductions over some dimensions (all where none is named)."""
    dims = list(op.of("self").dims)
    if "other" in op.args:
        return pointwise(op)
    over = op.args.get("dim")
    if over is None or over == []:
        over = list(range(len(dims)))
    over = [d % len(dims) for d in (over if isinstance(over, (list, tuple)) else [over])]
    op.mix([dims[d] for d in over], normed=True)
    if op.args.get("keepdim"):
        return [(1,) if d in over else dim for d, dim in enumerate(dims)]
    return [dim for d, dim in enumerate(dims) if d not in over]
