"""Which kernel and which configuration a product takes: by shape, dtype, strides and device.

The choice depends on sizes, never on values, and is the same from run to run. A table holds at most
eight configurations, from the largest output tile to the smallest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops._tile import Tile, capability, check_dtype

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # releases of Triton before 3.4
    TensorDescriptor = None

# At most 96 KiB of shared memory each, so that every GPU since Ampere, small ones included, can
# launch them; and registers for the fullest epilogue on sm_80, where operands pass through them.
HALF_TILES = (
    Tile(128, 128, 32, warps=8, stages=4),
    Tile(128, 64, 64, warps=8, stages=3),
    Tile(64, 64, 64, warps=4, stages=4),
    Tile(32, 64, 64, warps=4, stages=4),
    Tile(16, 64, 64, warps=4, stages=4),
)
# Rows that do not start on 16-byte boundaries are loaded in small pieces, each with an address of
# its own: tiles must be smaller to stay in registers.
NARROW_TILES = (
    Tile(128, 64, 32, warps=8, stages=3),
    Tile(64, 64, 32, warps=8, stages=3),
    Tile(16, 64, 32, warps=4, stages=3),
)
# Full-precision float32 has no matrix unit on NVIDIA GPUs; one thread holds a slice of operands.
FLOAT_TILES = (
    Tile(64, 64, 16, warps=4, stages=3, registers=168),
    Tile(32, 64, 16, warps=4, stages=3),
    Tile(16, 64, 16, warps=4, stages=3),
)
# For tensor descriptors: GPUs of compute capability 9 to 11 have 227 KiB of shared memory for a
# program. Those of 12 have descriptors too, but 99 KiB: they take the pointer kernels. There is one
# program for each multiprocessor, which may have all of its registers.
DESCRIPTOR_TILES = (
    Tile(128, 256, 64, warps=8, stages=3, registers=255),
    Tile(128, 128, 64, warps=8, stages=4, registers=255),
    Tile(128, 64, 64, warps=8, stages=4, registers=255),
    Tile(64, 64, 64, warps=4, stages=4, registers=255),
    Tile(64, 32, 64, warps=4, stages=4, registers=255),
)
COPY_TILE = Tile(16, 128, 1, warps=4, stages=2)  # of the compact copy and of the slices' sum
GROUP = 8  # rows of tiles per group of the swizzle
MULTIPLE = 64  # elements: what compact copies and padded rows are rounded up to


def tiles_for(like: Tensor, align: int) -> tuple[Tile, ...]:
    """The configurations of pointer kernels for a dtype and an alignment of the strides.

    Raises:
        TypeError: a dtype these kernels do not compute in.
    """
    check_dtype("x", like)
    if like.dtype == torch.float32:
        return FLOAT_TILES
    return NARROW_TILES if align < 4 else HALF_TILES


def turns(like: Tensor, tile: Tile, exactness: str) -> bool:
    """Whether operands that lie across the reduction go through registers: see the kernels.

    In tf32, where the tile is large enough for the matrix instructions of Hopper and later ones.
    """
    return exactness == "tf32" and tile.a >= 64 and capability(like) >= 90


def has_descriptors(tensor: Tensor) -> bool:
    """Whether tensors of this dtype and device are loaded by descriptor.

    Halves on GPUs from Hopper on whose programs may take the shared memory that the tiles need.
    """
    halves = tensor.dtype.itemsize == 2 and TensorDescriptor is not None
    return halves and 90 <= capability(tensor) < 120


def describable(tensor: Tensor) -> bool:
    """Whether its rows start on 16-byte boundaries, and neighbours in a row lie side by side."""
    return (
        tensor.stride(1) == 1
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.stride(0) >= tensor.shape[1] > 0
        and tensor.data_ptr() % 16 == 0
    )


def descriptor(tensor: Tensor | None, rows: int, columns: int) -> TensorDescriptor | None:
    """What a kernel loads and stores tiles of ``rows x columns`` by; None stays None."""
    if tensor is None:
        return None
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])
