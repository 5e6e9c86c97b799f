"""Rules of matrix products and fused attention."""

from __future__ import annotations

from torch import Tensor

from slimkern.discovery.axes import Dim, mix
from slimkern.discovery.op import Op, Rule, repeats, rule
from slimkern.discovery.record import Value

RULES: dict[str, Rule] = {}


def _contract(op: Op, a: Value, b: Value) -> list[Dim]:
    """``[..., M, K] @ [..., K, N]``: batch dimensions meet, K is mixed, M and N stay."""
    for factor, dim in ((a, b.dims[-2]), (b, a.dims[-1])):
        if factor.name in op.tracer.parameters:
            owner, _, leaf = factor.name.rpartition(".")
            op.bits |= 1 << op.tracer.matrix(owner, leaf, a.made_by | b.made_by)
            kind = type(op.tracer.modules[owner]).__name__
            mix(dim, f"{factor.name!r} multiplies them outside a plain torch.nn.Linear ({kind})")
    op.mix([a.dims[-1], b.dims[-2]])
    if a.live and b.live:
        op.tracer.trace.products.append(((*a.dims[-1], *a.lost), (*b.dims[-2], *b.lost)))
        op.tracer.trace.carried.append((*a.dims[-2], *b.dims[-1]))
    batch = [op.meet(x, y, b, [b, a]) for x, y in zip(a.dims[:-2], b.dims[:-2])]
    return [*batch, a.dims[-2], b.dims[-1]]


@rule(RULES, "mm", "bmm")
def _mm(op: Op) -> list[Dim]:
    return _contract(op, op.of("self"), op.of("mat2"))


@rule(RULES, "addmm", "baddbmm")
def _addmm(op: Op) -> list[Dim]:
    names = ("mat1", "mat2") if op.name == "addmm" else ("batch1", "batch2")
    dims = _contract(op, op.of(names[0]), op.of(names[1]))
    added = op.of("self")
    for d in range(1, len(added.dims) + 1):
        if added.tensor.shape[-d] == op.out.shape[-d] > 1:
            dims[-d] = op.meet(dims[-d], added.dims[-d], added, [added, op.operands[-1]])
    return dims


@rule(
    RULES,
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def _attention(op: Op) -> list[Dim]:
    """Fused attention: ``softmax(q kᵀ + mask) v`` for each entry of the leading dimensions."""
    q, k, v = (op.of(n) for n in ("query", "key", "value"))
    op.mix([q.dims[-1], k.dims[-1], k.dims[-2], v.dims[-2]])
    op.tracer.trace.products.append(((*q.dims[-1], *q.lost), (*k.dims[-1], *k.lost)))
    op.tracer.trace.carried.append(v.dims[-1])
    lead = list(q.dims[:-2])
    masks = [op.args.get(n) for n in ("attn_mask", "attn_bias")]
    for other in [k, v, *(op.tracer.value(m) for m in masks if isinstance(m, Tensor))]:
        for d in range(len(lead)):
            i = d - q.tensor.dim()
            if -i > other.tensor.dim() or other.tensor.shape[i] == 1 or repeats(other, i):
                continue
            shared = q.tensor.shape[d] // other.tensor.shape[i]  # grouped-query attention
            lead[d] = op.meet(lead[d], (*other.dims[i], shared), other, [other, q])
    return [*lead, q.dims[-2], v.dims[-1]]
