"""What the pack functions return and ops take: a block's weights as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimkern.ops._registry import Backends

# Where weights are packed for which kernels; the ops on packs take the pack's own backend.
PACKED_BACKENDS = Backends(__package__, default={"cpu": "cpu", "cuda": "triton"})
HARDWARE = {"cpu": "cpu", "triton": "cuda"}  # backend -> the type of device that it is written for


@dataclass(frozen=True)
class Packed:
    """A block's packed weights.

    Attributes:
        data: uint8, one dimension.
        kind: ``linear``, ``ffn``, ``attention_block`` or ``encoder_layer``.
        isa: the instruction set it is for; of a pack for GPUs, that in use when it was made.
        math: how products are computed; see `slimkern.ops.choose_math`.
        in_features, out_features: widths of the rows that go in and come out.
        backend: whose it is, ``cpu`` or ``triton``.
        parts: of a pack for GPUs the tensors in ``data``, and how they are put together.
        spec: see `slimkern.ops._device_pack.Spec`.
    """

    data: Tensor
    kind: str
    isa: str
    math: str
    in_features: int
    out_features: int
    backend: str = "cpu"
    parts: tuple[Tensor, ...] = ()
    spec: str = ""

    @property
    def tensors(self) -> list[Tensor]:
        """What an op is given: the bytes, or the tensors in them."""
        return list(self.parts) if self.parts else [self.data]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.data.numel()


def check_call(op: str, kind: str, x: Tensor, packed: Packed, *others: Tensor | None) -> None:
    """What every op on a pack asks of its arguments before it is called.

    Raises:
        RuntimeError: a gradient is asked for.
        TypeError: not a pack, or one of another kind.
        ValueError: x or another tensor is not where the pack is, or x has rows of another width.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} has no gradient and x requires one: call it under torch.inference_mode() or "
            "torch.no_grad(), or train the model that slimkern.unfuse_ gives back"
        )
    if packed.kind != kind:
        raise TypeError(f"packed holds {packed.kind}; {op} accepts: {kind}")
    device = packed.data.device
    for tensor in (x, *others):
        if tensor is not None and tensor.device != device:
            name = "x" if tensor is x else "a mask"
            raise ValueError(f"{name} is on {tensor.device}; {op} accepts: {device}")
    if x.dim() == 0 or x.size(-1) != packed.in_features:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; {op} accepts: a last dimension of {packed.in_features}"
        )
