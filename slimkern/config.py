"""What to prune, how much of it and when: :class:`WeightPruningConfig`, validated.

The keys and defaults are those of Intel Neural Compressor's class of the same name, so that
scripts written for it keep working; ``round_multiplier`` and ``total_steps`` are additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from slimkern.config_checks import (
    check_known,
    flag,
    fraction,
    off,
    one_of,
    op_types,
    patterns,
    whole,
)
from slimkern.patterns.pattern import BlockPattern, block_pattern
from slimkern.schedule import DECAYS, derive_steps

PRUNING_TYPES = ("magnitude", "gradient", "snip", "snip_momentum", "obs")
PATTERNS = ("channelx1", "mha")  # whole FFN channels, whole attention heads
REDUCE_TYPES = ("mean", "sum", "max")
SCOPES = ("global", "local")


@dataclass(frozen=True)
class PruningRule:
    """One complete rule: which units, what fraction of them, by which criterion, and when.

    The fields are the keys of :class:`WeightPruningConfig`, checked and completed. ``end_step`` is
    ``None`` where neither it nor ``total_steps`` was given.
    """

    target_sparsity: float = 0.9
    pruning_type: str = "snip_momentum"
    pattern: str = "4x1"
    op_names: tuple[str, ...] = ()
    excluded_op_names: tuple[str, ...] = ()
    start_step: int = 0
    end_step: int | None = None
    pruning_frequency: int = 1
    pruning_scope: str = "global"
    min_sparsity_ratio_per_op: float = 0.0
    max_sparsity_ratio_per_op: float = 0.98
    sparsity_decay_type: str = "exp"
    criterion_reduce_type: str = "mean"
    pruning_op_types: tuple[str, ...] = ("Conv", "Linear")
    low_memory_usage: bool = False
    round_multiplier: int = 32
    total_steps: int | None = None
    regrow: bool = False

    @property
    def block(self) -> BlockPattern | None:
        """The block pattern, or ``None`` for whole units (``channelx1``, ``mha``)."""
        return None if self.pattern in PATTERNS else block_pattern(self.pattern)

    @property
    def needs_gradients(self) -> bool:
        """Whether the criterion reads gradients."""
        return self.pruning_type not in ("magnitude", "obs")

    @property
    def needs_batches(self) -> bool:
        """Whether layers are measured on calibration batches, and weights change with the masks."""
        return self.pruning_type == "obs"

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> PruningRule:
        """Check values, complete them, derive the steps that were not given.

        Args:
            values: any of the keys of :class:`WeightPruningConfig`; ``None`` means not given.

        Raises:
            TypeError: an unknown key; the nearest known one is suggested.
            ValueError: a value is not accepted; the message names key, value and what is.
        """
        check_known(values, KEYS)
        given = {k: v for k, v in values.items() if v is not None}
        checked = {k: _CHECKS[k](k, v) for k, v in given.items()}
        _refuse_contradictions(checked)
        rule = {k: v for k, v in checked.items() if k in cls.__dataclass_fields__}
        rule.update(derive_steps(**{k: rule.get(k) for k in _STEP_KEYS}))
        built = _within_the_pattern(cls(**rule))
        if built.target_sparsity > built.max_sparsity_ratio_per_op:
            raise ValueError(
                f"target_sparsity={built.target_sparsity} can't be reached with "
                f"max_sparsity_ratio_per_op={built.max_sparsity_ratio_per_op}: raise the limit"
            )
        if built.min_sparsity_ratio_per_op > built.target_sparsity:
            raise ValueError(
                f"min_sparsity_ratio_per_op={built.min_sparsity_ratio_per_op} is above "
                f"target_sparsity={built.target_sparsity}, which all layers together lose"
            )
        return built


class WeightPruningConfig:
    """Pruning rules: one dictionary per rule, completed by values common to all.

    Args:
        pruning_configs: a list of dictionaries (or one), each with any of the keys below; a key
            that is missing takes the value given here. ``None``: one rule made of the values
            below alone. The dictionaries are read, never written to.
        target_sparsity: fraction to remove, in [0, 1).
        pruning_type: ``magnitude``, ``gradient``, ``snip`` or ``snip_momentum``; or ``obs``, which
            measures the layers on calibration batches (``dataloader`` of ``prepare_pruning``) and
            repairs the second linear's weights at each prune step. It is no reduction of element
            scores: ``criterion_reduce_type`` and ``low_memory_usage`` keep their defaults.
        pattern: ``channelx1`` (FFN channels) or ``mha`` (heads), which ``model_slim`` removes; or
            blocks of any linear, which stay as zeros: ``NxM`` (N outputs x M inputs), ``1x1``,
            ``channelxM`` (M inputs, all outputs; M at least 2), ``Nxchannel`` (N outputs, all
            inputs) and ``N:M`` (N zeros of every M inputs). A prefix that ends in ``_`` is
            stripped.
        op_names: names or regular expressions (``re.search``) of what is pruned: second linears
            of FFNs, any linear of an attention; for blocks any linear. An entry that is a module's
            exact name means that module (and what is in it) alone. Not given: everything found but
            the model's head.
        excluded_op_names: the same, for what is left alone.
        backend: accepted for compatibility; must be ``None``.
        start_step: optimizer step at which the sparsity starts to grow. Default 0, or one
            thirteenth of ``total_steps``.
        end_step: optimizer step at which the target is reached; equal to ``start_step``: all at
            once. Default ten thirteenths of ``total_steps``.
        pruning_scope: ``global`` or ``local``.
        pruning_frequency: optimizer steps between two prune steps. Default 1, or with
            ``total_steps`` what makes about 40 prune steps.
        min_sparsity_ratio_per_op, max_sparsity_ratio_per_op: limits for each layer (the lower one
            in the global scope). For ``N:M`` the upper one is at most N/M.
        sparsity_decay_type: ``exp``, ``cos``, ``linear`` or ``cube``.
        pruning_op_types: a part of a class name, or several.
        low_memory_usage: scores of blocks in bfloat16. Those of whole units are one number per
            unit, and stay float32 but for the reduce type ``max``.
        **kwargs: ``round_multiplier`` (32; ``channelx1`` alone), ``total_steps``,
            ``criterion_reduce_type`` (``mean``, ``sum``, ``max``), ``regrow`` (blocks with
            ``pruning_type="gradient"`` alone: a masked block whose gradient is large comes back at
            a prune step, from zero; the step before it, and no other, computes dense gradients),
            and for compatibility ``criterion_type`` (must equal
            ``pruning_type``), ``parameters``, ``reg_type``, ``reg_coeff``,
            ``resume_from_pruned_checkpoint`` (which must be off).

    Attributes:
        rules: the complete :class:`PruningRule` of each dictionary, in order.

    Raises:
        TypeError: an unknown key; the nearest known one is suggested.
        ValueError: a value is not accepted.
    """

    def __init__(
        self,
        pruning_configs: Iterable[Mapping[str, Any]] | Mapping[str, Any] | None = None,
        target_sparsity: float = 0.9,
        pruning_type: str = "snip_momentum",
        pattern: str = "4x1",
        op_names: Iterable[str] | str | None = None,
        excluded_op_names: Iterable[str] | str | None = None,
        backend: None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        pruning_scope: str = "global",
        pruning_frequency: int | None = None,
        min_sparsity_ratio_per_op: float = 0.0,
        max_sparsity_ratio_per_op: float = 0.98,
        sparsity_decay_type: str = "exp",
        pruning_op_types: Iterable[str] | str = ("Conv", "Linear"),
        low_memory_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        common = {k: v for k, v in locals().items() if k in KEYS} | kwargs
        check_known(common, KEYS)
        if pruning_configs is None or isinstance(pruning_configs, Mapping):
            pruning_configs = [pruning_configs or {}]
        sections = list(pruning_configs)
        for section in sections:
            if not isinstance(section, Mapping):
                raise TypeError(f"pruning_configs must hold dictionaries, got {section!r}")
            check_known(section, KEYS)
        self.rules = tuple(PruningRule.from_values({**common, **s}) for s in sections)

    def __repr__(self) -> str:
        return "WeightPruningConfig(\n" + "".join(f"  {r}\n" for r in self.rules) + ")"


def _within_the_pattern(rule: PruningRule) -> PruningRule:
    """The rule with the limits that its pattern sets."""
    pattern = rule.block
    if pattern is None:
        return rule
    if rule.target_sparsity > pattern.limit:
        raise ValueError(
            f"target_sparsity={rule.target_sparsity} can't be reached with pattern "
            f"{rule.pattern!r}, {pattern.zeros} zeros of every {pattern.of}: give at most "
            f"{pattern.limit:.6g}"
        )
    return replace(
        rule, max_sparsity_ratio_per_op=min(rule.max_sparsity_ratio_per_op, pattern.limit)
    )


def _refuse_contradictions(values: Mapping[str, Any]) -> None:
    criterion = values.get("criterion_type")
    pruning_type = values.get("pruning_type", PruningRule.pruning_type)
    if criterion is not None and criterion != pruning_type:
        raise ValueError(
            f"criterion_type={criterion!r} differs from pruning_type={pruning_type!r}, which "
            f"decides the criterion: give pruning_type alone"
        )
    pattern = values.get("pattern", PruningRule.pattern)
    if values.get("regrow") and (pattern in PATTERNS or pruning_type != "gradient"):
        raise ValueError(
            f"regrow=True is not accepted with pattern={pattern!r} and "
            f"pruning_type={pruning_type!r}; accepted: a block pattern and 'gradient', as masked "
            f"units compute nothing, and the other criteria multiply by a weight that is zero"
        )
    if pruning_type == "obs":
        if pattern not in PATTERNS:
            raise ValueError(
                f"pattern={pattern!r} is not accepted with pruning_type='obs', which removes whole "
                f"units; accepted: {', '.join(PATTERNS)}"
            )
        for key in ("criterion_reduce_type", "low_memory_usage"):
            usual = getattr(PruningRule, key)
            if values.get(key, usual) != usual:
                raise ValueError(
                    f"{key}={values[key]!r} has no meaning for pruning_type='obs', which keeps no "
                    f"scores of elements: leave it out"
                )


def _pattern(key: str, value: Any) -> str:
    text = value.rpartition("_")[2] if isinstance(value, str) else ""
    if text not in PATTERNS:
        try:
            block_pattern(text)
        except ValueError as error:
            raise ValueError(
                f"{key}={value!r} is no pattern; accepted: {', '.join(PATTERNS)}, NxM, channelxM, "
                f"Nxchannel, N:M ({error})"
            ) from None
    return text


_NOT_BUILT = {
    "_progressive": "masks interpolated between prune steps miss their target; prune more often",
    "pattern_lock": "zeros that a model brings are trained like any weight",
    "block_mask": "scores of blocks come from weights and gradients (criterion_reduce_type)",
    "retrain_free": "slimkern.one_shot removes channels without training, and repairs the rest",
    "sparse_gpt": "slimkern.one_shot removes channels without training, and repairs the rest",
}
_NO_REGULARIZER = "there is no group-lasso regularizer yet; leave it out"
_STEP_KEYS = ("start_step", "end_step", "pruning_frequency", "total_steps")
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "target_sparsity": fraction,
    "pruning_type": one_of(*PRUNING_TYPES, reasons=_NOT_BUILT),
    "pattern": _pattern,
    "op_names": patterns,
    "excluded_op_names": patterns,
    "backend": off("pruning has one implementation"),
    "start_step": whole(0),
    "end_step": whole(0),
    "pruning_scope": one_of(*SCOPES),
    "pruning_frequency": whole(1),
    "min_sparsity_ratio_per_op": fraction,
    "max_sparsity_ratio_per_op": fraction,
    "sparsity_decay_type": one_of(*DECAYS),
    "pruning_op_types": op_types,
    "low_memory_usage": flag,
    "round_multiplier": whole(1),
    "total_steps": whole(1),
    "criterion_reduce_type": one_of(*REDUCE_TYPES),
    "regrow": flag,
    "criterion_type": one_of(*PRUNING_TYPES),
    "parameters": off(_NO_REGULARIZER),
    "reg_type": off(_NO_REGULARIZER),
    "reg_coeff": off(_NO_REGULARIZER),
    "resume_from_pruned_checkpoint": off(
        "masks of a model stay without it, and a run is resumed with pruning.load_state_dict()"
    ),
}
KEYS = tuple(_CHECKS)
