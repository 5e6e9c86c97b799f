"""NVIDIA's machine code, from the tools in Triton's own wheel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.compile.code import Figures, Instruction, figures_of

_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")
_LABEL = re.compile(r"^(\.L_\w+):")
_DESTINATION = re.compile(r"`\((\.L_\w+)\)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
# The first that fits decides.
_KINDS = (
    ("matrix", r"(HMMA|HGMMA|IMMA|QGMMA|UTCHMMA|UTCQMMA)\b"),
    ("global load", r"(LDG|LDGSTS|UTMALDG|UBLKCP|LD)\b"),
    ("global store", r"(STG|UTMASTG|UTMAREDG|ST)\b"),
    ("spill", r"(LDL|STL)\b"),
    ("shared memory", r"(LDS|LDSM|STS|STSM|MOVM|ATOMS|LDTM|STTM)\b"),
    ("float", r"(FFMA|FFMA2|FADD|FADD2|FMUL|FMUL2|HFMA2|HADD2|HMUL2|DFMA|MUFU|FMNMX|FSEL|FSETP)\b"),
    ("conversion", r"(F2F|F2FP|I2F|I2FP|F2I|I2I|PRMT)\b"),
    (
        "wait",
        r"(BAR|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|SYNCS|ARRIVES|FENCE|MEMBAR|ERRBAR|CCTL|"
        r"UTMACCTL|UTMACMDFLUSH|UTCBAR|ELECT|BSYNC|BSSY|NANOSLEEP|YIELD|CGAERRBAR|NOP|UCGABAR)",
    ),
    ("branch", r"(BRA|EXIT|CALL|RET|BRX|JMP|BREAK|BMOV|WARPGROUPSET|USETMAXREG)\b"),
    ("move", r"(MOV|UMOV|CS2R|S2R|S2UR|R2UR|SEL|USEL|SHFL|VOTE|VOTEU|R2P|P2R|UP2UR|CS2UR|HFMA2)\b"),
    ("constant load", r"(LDC|ULDC|LDCU)\b"),
    (
        "address",
        r"(U?IADD|U?IMAD|U?LEA|U?ISETP|U?LOP|U?SHF|U?PLOP|U?IABS|U?IMNMX|VIADD|VIMNMX|U?BMSK|"
        r"U?SGXT|U?POPC|U?FLO|U?PRMT|UIADD|I2IP|VIADDMNMX|UISETP|U?SHL|U?SHR|U?BREV|U?VIADD)",
    ),
)
_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in _KINDS)


def _kind(opcode: str, operands: str) -> str:
    # HFMA2.MMA, MOV and CS2R of zeros are how registers are cleared.
    if opcode.startswith("HFMA2") and "-RZ, RZ" in operands:
        return "move"
    return next((kind for kind, pattern in _PATTERNS if pattern.match(opcode)), "other")


def _load(opcode: str) -> int:
    """Bytes that a thread loads from global memory."""
    words = opcode.split(".")
    if words[0] not in ("LDG", "LDGSTS"):
        return 0
    for word, size in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2)):
        if word in words:
            return size
    return 1 if {"U8", "S8"} & set(words) else 4


def parse(text: str) -> tuple[list[Instruction], list[range]]:
    """The instructions of ``nvdisasm -c``, and its loops.

    A loop is what lies between the destination of a branch back and the branch.
    """
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif match := _LINE.match(line):
            opcode, operands = match[1], match[2]
            if opcode.startswith("BRA") and (destination := _DESTINATION.search(operands)):
                branches.append((len(code), destination[1]))
            tma = opcode.startswith(("UTMALDG", "UBLKCP"))
            code.append(Instruction(opcode, _kind(opcode, operands), _load(opcode), tma))
    loops = {range(labels[name], at + 1) for at, name in branches if labels[name] <= at}
    return code, sorted(loops, key=len)


def resources(usage: str) -> tuple[int, int]:
    """(registers per thread, bytes of stack and local memory) from ``cuobjdump``."""
    found = _USAGE.search(usage)
    if found is None:
        raise ValueError(f"cuobjdump said nothing of registers: {usage!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def read(compiled: Any) -> Figures:
    """The figures of a kernel that was compiled for an NVIDIA GPU."""
    import triton

    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])

        def run(*command: str) -> str:
            return subprocess.run(
                [*command, str(path)], check=True, capture_output=True, text=True
            ).stdout

        registers, spilled = resources(run(tools.cuobjdump.path, "--dump-resource-usage"))
        code, loops = parse(run(tools.nvdisasm.path, "-c"))
    return figures_of(
        code,
        loops,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
    )
