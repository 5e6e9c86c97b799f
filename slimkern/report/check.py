"""What results must hold to be rendered honestly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimkern.report.schema import (
    Family,
    FamilyMember,
    FusedModel,
    HistoryPoint,
    LayerWidth,
    MethodResult,
    Results,
)

_SCORE = ("split", "metric", "dense", "slim", "low", "high", "level", "rows")
"""The keys of :class:`slimkern.training.evaluation.Score`, which is not imported for them: it lives
beside the trainer."""
_SCORED = ("split", "metric", "dense", "slim")
_FUSED = ("name", "math", "blocks", "packed_bytes", "scores")
_MEMBER = ("name", "parameters", "parameters_no_embeddings", "slim_min", "slim_median", "scores")

REQUIRED: tuple[str, ...] = ("title", "command", "date", "machine", "versions")


def check(results: Mapping[str, object]) -> None:
    """Refuse results that the page could not render honestly.

    Raises:
        ValueError: a required section is missing or empty, or a section is unknown; the message
            names it and what is accepted.
    """
    missing = [key for key in REQUIRED if not results.get(key)]
    if missing:
        raise ValueError(f"results lacks {', '.join(missing)}; required: {', '.join(REQUIRED)}")
    unknown = sorted(set(results) - set(Results.__annotations__))
    if unknown:
        accepted = ", ".join(Results.__annotations__)
        raise ValueError(f"results has unknown sections {', '.join(unknown)}; accepted: {accepted}")
    _check_rows(
        results, "layers", tuple(LayerWidth.__annotations__), ("name", "kind", "kept", "total")
    )
    _check_rows(results, "scores", _SCORE, _SCORED)
    _check_rows(results, "history", tuple(HistoryPoint.__annotations__), ("step",))
    _check_rows(results, "methods", tuple(MethodResult.__annotations__), ("name",))
    one_shot, family = results.get("one_shot") or {}, results.get("family") or {}
    assert isinstance(one_shot, Mapping)
    assert isinstance(family, Mapping)
    _check_rows(one_shot, "before_healing", _SCORE, _SCORED)
    _check_fused(results)
    if family:
        lacking = [key for key in Family.__annotations__ if key not in family]
        if lacking:
            raise ValueError(f"results['family'] lacks {', '.join(lacking)}")
        _check_rows(family, "members", tuple(FamilyMember.__annotations__), _MEMBER)


def _check_fused(results: Mapping[str, Any]) -> None:
    """Every fused model has the scores of the others, and a time wherever they have one."""
    fused = results.get("fused") or {}
    _check_rows(fused, "models", tuple(FusedModel.__annotations__), _FUSED)
    expected = len(results.get("scores") or ())
    for index, model in enumerate(fused.get("models") or ()):
        _check_rows(model, "scores", _SCORE, _SCORED)
        if len(model["scores"]) != expected:
            raise ValueError(
                f"results['fused']['models'][{index}] has {len(model['scores'])} scores, and "
                f"results['scores'] has {expected}"
            )
        for row in (results.get("latency") or {}).get("rows") or ():
            name = model["name"]
            if name not in row.get("further_min", {}) or name not in row.get("further_median", {}):
                raise ValueError(f"results['latency'] has no times of the fused model {name!r}")


def _check_rows(
    results: Mapping[str, object],
    section: str,
    accepted: Sequence[str],
    required: Sequence[str],
) -> None:
    rows = results.get(section) or ()
    assert isinstance(rows, Sequence)
    for index, row in enumerate(rows):
        wrong = [k for k in required if k not in row] + [k for k in row if k not in accepted]
        if wrong:
            raise ValueError(
                f"results[{section!r}][{index}] lacks or does not know {', '.join(wrong)}; "
                f"required: {', '.join(required)}; accepted: {', '.join(accepted)}"
            )
