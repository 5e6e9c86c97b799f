"""What GPUs could do at best by their data sheets: a bound of every piece of work, never a result.

The roofline: no GPU needs less than its matrix units take for the products, nor less than its
memory takes for every number moved once. A bound leaves out that neither is ever reached, and
everything that is no product; nothing here was measured. ``python -m bench.gpu_traffic`` prints
the bounds of single kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slimkern.report.speed_schema import Precision, SpeedRow


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU, dense products.

    Attributes:
        flops: precision -> flop/s. ``fp32-high`` is TF32; ``fp32-medium``, like ``bf16``, bfloat16
            with float32 sums; fp16 is as fast as bfloat16 on all of them.
        bandwidth: of its memory, byte/s.
        source: where the figures stand.
    """

    flops: Mapping[Precision, float]
    bandwidth: float
    source: str


def _flops(bf16: float, tf32: float, fp32: float) -> dict[Precision, float]:
    """From TFLOP/s."""
    return {
        "bf16": bf16 * 1e12,
        "fp32-medium": bf16 * 1e12,
        "fp32-high": tf32 * 1e12,
        "fp32": fp32 * 1e12,
    }


# NVIDIA's sheets print products with structured sparsity at twice these figures.
GPUS: dict[str, Gpu] = {
    "A100": Gpu(
        _flops(312.0, 156.0, 19.5),
        2.039e12,
        "NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM",
    ),
    "H100": Gpu(
        _flops(989.4, 494.7, 66.9),
        3.35e12,
        "NVIDIA H100 Tensor Core GPU data sheet and architecture white paper, H100 SXM5",
    ),
    "H200": Gpu(
        _flops(989.4, 494.7, 66.9),
        4.8e12,
        "NVIDIA H200 Tensor Core GPU data sheet, H200 SXM",
    ),
    "MI300X": Gpu(
        _flops(1307.4, 653.7, 163.4),
        5.3e12,
        "AMD Instinct MI300X accelerator data sheet",
    ),
}


def roofline(flops: float, moved: float, precision: Precision) -> dict[str, float]:
    """GPU -> seconds that its peaks alone would take: a bound.

    Args:
        flops: of the matrix products.
        moved: bytes that must move at least once.
        precision: of the products.

    Raises:
        ValueError: a negative number, or an unknown precision.
    """
    if not (flops >= 0 and moved >= 0):
        raise ValueError(f"flops is {flops} and moved {moved}; accepted: at least 0 each")
    known = next(iter(GPUS.values())).flops
    if precision not in known:
        raise ValueError(f"precision is {precision!r}; accepted: {', '.join(known)}")
    return {
        name: max(flops / gpu.flops[precision], moved / gpu.bandwidth) for name, gpu in GPUS.items()
    }


def of_row(row: SpeedRow) -> dict[str, float]:
    """The bounds of a row of results, from its flops and bytes."""
    return roofline(row["flops"], row["bytes"], row["precision"])
