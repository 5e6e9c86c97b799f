"""What a pruning run says of itself: frozen data that prints as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sparsity:
    """Fractions removed so far.

    Attributes:
        total: of the weights in all groups that are pruned.
        ffn, mha: of the channels and of the heads; ``None`` where none are pruned.
        groups: of the units of each group, and of the blocks of each linear that is pruned in
            blocks.
        blocks: of the weights of all linears that are pruned in blocks; ``None`` without any.
    """

    total: float
    ffn: float | None
    mha: float | None
    groups: dict[str, float]
    blocks: float | None = None


@dataclass(frozen=True)
class GroupReport:
    """One group's state: ``kept`` of ``num_units`` units, on the way to ``target``.

    Of a linear that is pruned in blocks: its pattern as ``kind``, and blocks for units (single
    weights for ``N:M``).
    """

    name: str
    kind: str
    num_units: int
    kept: int
    target: float


@dataclass(frozen=True)
class PruningReport:
    """Where a pruning run stands. Prints as a table."""

    step: int
    last_step: int
    sparsity: Sparsity
    groups: tuple[GroupReport, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("group", "kind", "kept", "of", "sparsity", "target")]
        for g in self.groups:
            now, target = f"{1 - g.kept / g.num_units:.4f}", f"{g.target:.4f}"
            rows.append((g.name, g.kind, str(g.kept), str(g.num_units), now, target))
        widths = [max(len(r[i]) for r in rows) for i in range(6)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
        lines.append(
            f"step {self.step} (last cut at {self.last_step}): "
            f"{self.sparsity.total:.2%} of the weights in these groups removed"
        )
        return "\n".join(lines + [f"note: {n}" for n in self.notes])


def removed_share(units: Sequence[tuple[int, int]]) -> float | None:
    """The fraction removed of ``(kept, all)`` units of groups; ``None`` where there is no group."""
    return 1 - sum(k for k, _ in units) / sum(n for _, n in units) if units else None
