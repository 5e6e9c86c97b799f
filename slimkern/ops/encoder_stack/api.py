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
        ValueError: no pack, or packs for several widths, devices or backends; and as
            `slimkern.ops.encoder_layer`.
        TypeError, RuntimeError: as `slimkern.ops.encoder_layer`.
    """
    if not packs:
        raise ValueError("packs is empty; encoder_stack accepts: one or more")
    first = packs[0]
    check_call("encoder_stack", "encoder_layer", x, first, mask, head_bias)
    for i, packed in enumerate(packs):
        if packed.kind != "encoder_layer":
            raise TypeError(f"packs[{i}] holds {packed.kind}; encoder_stack accepts: encoder_layer")
        if packed.backend != first.backend or packed.data.device != first.data.device:
            raise ValueError(
                f"packs[{i}] is for backend {packed.backend!r} on {packed.data.device}; "
                f"encoder_stack accepts: that of packs[0], {first.backend!r} on "
                f"{first.data.device}"
            )
        if packed.in_features != first.in_features:
            raise ValueError(
                f"packs[{i}] takes rows of {packed.in_features}; encoder_stack accepts: those of "
                f"packs[0], {first.in_features}"
            )
    tensors = [tensor for packed in packs for tensor in packed.tensors]
    return _op(x, tensors, [packed.spec for packed in packs], mask, head_bias, first.backend)
