"""The slim model as it is served on CPUs: fused, once per kind of products it can be had with."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

import slimkern
from slimkern.ops import choose_math
from slimkern.report.schema import Fused
from slimkern.training.evaluation import Score

# Its name in tables, what `fuse_` is asked for, and the dtype of the model.
_VARIANTS = (
    ("fused", "highest", torch.float32),
    ("fused, high", "high", torch.float32),
    ("fused, medium", "medium", torch.float32),
    ("fused, bf16", "highest", torch.bfloat16),
)


def fused_models(slim: nn.Module) -> tuple[dict[str, nn.Module], str | None]:
    """Fused copies of a slim model by their names, float32 first, and why there are none.

    A precision that comes to the same products as the one before it is left out.
    """
    made: dict[str, nn.Module] = {}
    last = None
    for name, precision, dtype in _VARIANTS:
        how = (dtype, choose_math(dtype, precision))
        if how == last:
            continue
        last = how
        model = copy.deepcopy(slim).to(dtype).eval()
        try:
            made[name] = slimkern.fuse_(model, precision=precision)
        except slimkern.FuseError as error:
            return {}, str(error)
    return made, None


def section(
    models: Mapping[str, nn.Module], refused: str | None, scores: Mapping[str, list[Score]]
) -> Fused:
    """The results' section on what :func:`fused_models` returned; ``scores`` are of all models."""
    if refused is not None:
        return {"refused": refused}
    members: Fused = {"models": []}
    for name, model in models.items():
        blocks = slimkern.fused_blocks(model)
        members["models"].append({
            "name": name,
            "math": ", ".join(sorted({block.math for block in blocks})),
            "blocks": len(blocks),
            "packed_bytes": sum(block.nbytes for block in blocks),
            "scores": scores[name],
        })  # fmt: skip
    return members
