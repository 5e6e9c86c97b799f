"""``encoder_stack``: the registered op and the function to call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slimkern.ops._packed import Packed, check_call
from slimkern.ops._registry import Backends, define_op

BACKENDS = Backends(__package__, default={"cpu": "cpu", "cuda": "triton"}, units="products")


def _fake(
    x: Tensor,
    packed: list[Tensor],
    specs: list[str],
    mask: Tensor | None,
    head_bias: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape)


_op = define_op(
    "encoder_stack",
    "Tensor x, Tensor[] packed, str[] specs, Tensor? mask, Tensor? head_bias",
    _fake,
    BACKENDS,
)


def encoder_stack(
    x: Tensor,
    packs: Sequence[Packed],
    mask: Tensor | None = None,
    head_bias: Tensor | None = None,
) -> Tensor:
    """``encoder_layer`` of each pack in turn, in one call: what a short sequence spends in Python
    and in PyTorch's dispatcher, it spends once for all layers.

    Args:
        x: [B, T, hidden], float32 or bfloat16, on a GPU also float16; any strides.
        packs: of at least one layer, of any widths: what `slimkern.ops.pack_encoder_layer`
            returned, all for one device.
        mask, head_bias: as in `slimkern.ops.attention_block`, the same for every layer.

    Returns:
        The shape and dtype of x; bit by bit what the layers return one by one.

    Raises:
        ValueError: no pack, or packs for several backends; and as `slimkern.ops.encoder_layer`.
        TypeError, RuntimeError: as `slimkern.ops.encoder_layer`.
    """
    if not packs:
        raise ValueError("packs is empty; encoder_stack accepts: one or more")
    first = packs[0]
    check_call("encoder_stack", "encoder_layer", x, first, mask, head_bias)
    place = first.data.device
    for packed in packs[1:]:
        if (
            packed.kind != first.kind
            or packed.in_features != first.in_features
            or packed.data.device != place
        ):
            check_call("encoder_stack", "encoder_layer", x, packed, mask, head_bias)
        if packed.backend != first.backend:
            raise ValueError(
                f"packs are for backends {first.backend!r} and {packed.backend!r}; encoder_stack "
                "accepts: one for all of them"
            )
    tensors = [tensor for packed in packs for tensor in packed.tensors]
    return _op(x, tensors, [packed.spec for packed in packs], mask, head_bias, first.backend)
