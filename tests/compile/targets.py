"""The GPUs that kernels are compiled for, and what a multiprocessor of each has."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU architecture, as Triton names it, and the limits that occupancy follows from.

    Attributes:
        name: ``sm_90``, ``gfx942``.
        backend: Triton's: ``cuda`` or ``hip``.
        arch: the compute capability times ten, or the name of the GFX architecture.
        warp: threads per warp.
        registers: 32-bit registers per multiprocessor (AMD: vector registers, of all its SIMDs).
        granule: registers are given to a warp in multiples of this.
        shared_block: bytes of shared memory that one block may have.
        shared: bytes of shared memory per multiprocessor; ``reserved`` of them go to each block.
        warps: resident warps per multiprocessor.
        processors: multiprocessors of the largest part, for launches that ask.
        matrix: the matrix instructions that a large tile must use, per generation.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    registers: int
    granule: int
    shared_block: int
    shared: int
    reserved: int
    warps: int
    processors: int
    matrix: str

    @property
    def capability(self) -> tuple[int, int]:
        """What ``torch.cuda.get_device_capability`` says there."""
        return (9, 4) if isinstance(self.arch, str) else divmod(self.arch, 10)

    def blocks(self, registers: int, shared: int, warps: int) -> int:
        """Blocks that are resident on a multiprocessor at once.

        Args:
            registers: per thread.
            shared: bytes per block.
            warps: per block.
        """
        per_warp = -(-registers * self.warp // self.granule) * self.granule
        by_registers = self.registers // max(per_warp, self.granule) // warps
        by_shared = self.shared // (shared + self.reserved) if shared + self.reserved else 32
        return min(by_registers, by_shared, self.warps // warps)


# CUDA C++ programming guide, "technical specifications per compute capability"; CDNA 3 ISA guide.
# The code for sm_80 runs on consumer cards too, where a block may have 99 KiB (the A100: 163).
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 65536, 256, 99 * KIB, 164 * KIB, KIB, 64, 108, "HMMA"),
        Target("sm_90", "cuda", 90, 32, 65536, 256, 227 * KIB, 228 * KIB, KIB, 64, 132, "HGMMA"),
        Target(
            "sm_100", "cuda", 100, 32, 65536, 256, 227 * KIB, 228 * KIB, KIB, 64, 148, "UTCHMMA"
        ),
        Target(
            "gfx942", "hip", "gfx942", 64, 131072, 512, 64 * KIB, 64 * KIB, 0, 32, 304, "v_mfma"
        ),
    )
}
