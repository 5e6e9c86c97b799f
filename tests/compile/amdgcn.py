"""AMD's machine code, from the assembly that Triton keeps."""

from __future__ import annotations

import re
from typing import Any

from tests.compile.code import Figures, Instruction, figures_of

_LABEL = re.compile(r"^(\.LBB\w+):")
_IN_LOOP = re.compile(r"in Loop: Header=(\w+)")
_LINE = re.compile(r"^\s+([a-z]\w+)(.*)")
_KINDS = (
    ("matrix", r"v_mfma|v_smfmac"),
    ("global load", r"(global|buffer|flat)_load"),
    ("global store", r"(global|buffer|flat)_store"),
    ("spill", r"scratch_"),
    ("lane move", r"v_(write|read)lane"),  # where scalar registers spill to: vector ones
    ("shared memory", r"ds_"),
    ("wait", r"s_(waitcnt|barrier|nop|sleep|setprio|sched)"),
    ("branch", r"s_(cbranch|branch|endpgm)"),
    ("conversion", r"v_cvt|v_perm"),
    ("float", r"v_(pk_)?(fma|mac|add_f|mul_f|sub_f|exp|log|rcp|sqrt|rsq|max_f|min_f|cmp_\w+_f)"),
    ("constant load", r"s_(load|buffer_load)"),
    ("move", r"[sv]_(accvgpr|mov|cndmask|cselect|readfirstlane|bpermute)"),
    ("address", r"[sv]_"),
)
_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in _KINDS)
_WIDTHS = (("x4", 16), ("x3", 12), ("x2", 8), ("dword", 4), ("short", 2), ("byte", 1))


def _load(opcode: str) -> int:
    if not re.match(r"(global|buffer|flat)_load", opcode):
        return 0
    return next(size for word, size in _WIDTHS if word in opcode)


def parse(text: str) -> tuple[list[Instruction], list[list[int]]]:
    """The instructions, and its innermost loops.

    Blocks of a loop may lie anywhere; the compiler's comments say which loop a block belongs to.
    """
    code: list[Instruction] = []
    loops: dict[str, list[int]] = {}
    block = header = ""
    for line in text.splitlines():
        line, _, comment = line.partition(";")
        if label := _LABEL.match(line):
            block, header = label[1].removeprefix(".L"), ""
        elif comment.startswith(" %bb"):
            block = header = ""
        if "Loop Header:" in comment:
            header = block
        elif found := _IN_LOOP.search(comment):
            header = found[1]
        if match := _LINE.match(line):
            opcode = match[1]
            kind = next((kind for kind, pattern in _PATTERNS if pattern.match(opcode)), "other")
            if header:
                loops.setdefault(header, []).append(len(code))
            code.append(Instruction(opcode, kind, _load(opcode)))
    return code, list(loops.values())


def read(compiled: Any) -> Figures:
    """The figures of a kernel that was compiled for an AMD GPU."""
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(found[1])

    code, loops = parse(text)
    return figures_of(
        code,
        loops,
        registers=field("vgpr_count"),
        spilled=field("vgpr_spill_count") + field("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
    )
