"""What both readers of machine code give: an instruction's kind, loops, figures of a kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    opcode: str
    kind: str
    load: int = 0  # bytes per thread of a load from global memory
    tma: bool = False


@dataclass
class Figures:
    """What a compiled kernel costs.

    Attributes:
        registers: per thread.
        spilled: bytes of stack and local memory, and on AMD GPUs the vector registers there.
        shared: bytes per block.
        warps: per block.
        tensor_memory: columns, on sm_100.
        matrix: opcodes of the matrix instructions, anywhere.
        loop: kind -> instructions of the main loop.
        loads: bytes of a load from global memory -> loads in the main loop.
        tma: whether any loop loads through the tensor memory accelerator.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    tensor_memory: int = 0
    matrix: list[str] = field(default_factory=list)
    loop: dict[str, int] = field(default_factory=dict)
    loads: dict[int, int] = field(default_factory=dict)
    tma: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def figures_of(
    code: Sequence[Instruction], loops: Sequence[Sequence[int]], **resources: int
) -> Figures:
    """The figures of a kernel from its code, the positions in each loop, and its resources."""
    loop = [code[position] for position in main_loop(code, loops)]
    return Figures(
        **resources,
        matrix=sorted({line.opcode for line in code if line.kind == "matrix"}),
        loop=dict(Counter(line.kind for line in loop).most_common()),
        loads=dict(sorted(Counter(line.load for line in loop if line.load).items())),
        tma=any(line.tma for line in code),
    )


def main_loop(code: Sequence[Instruction], loops: Sequence[Sequence[int]]) -> Sequence[int]:
    """The positions of the innermost loop that does the work; all where none does.

    The work is matrix instructions, or floating-point ones in a kernel that has none of the former.
    Copies of an iteration before and behind a pipelined loop are in no loop.
    """
    for kind in ("matrix", "float"):
        counts = [sum(code[position].kind == kind for position in loop) for loop in loops]
        most = max(counts, default=0)
        if most:
            return min((loop for loop, n in zip(loops, counts) if 2 * n >= most), key=len)
        if any(line.kind == kind for line in code) and kind == "matrix":
            break
    return range(len(code))
