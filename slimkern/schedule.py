"""Sparsity over optimizer steps: pure functions of numbers.

Steps are *completed* optimizer steps. Prune step ``c`` of ``N`` (``c = 1 .. N``) comes
``c * frequency`` steps after ``start_step``, ``N = floor((end_step - start_step) / frequency)``,
and raises the sparsity from ``s0`` towards the target ``S`` (formulas: Intel Neural Compressor
2.6, whose values at ``c = N`` fall short of the target by rounding; here they are the target):

- ``exp``:    ``1 - (1 - s0) * ((1 - S) / (1 - s0)) ** (c / N)``
- ``cos``:    ``s0 + (S - s0) * (1 - cos(pi / 2 * c / N))``
- ``linear``: ``s0 + (S - s0) * c / N``
- ``cube``:   ``s0 + (S - s0) * (c / N) ** 3``
"""

from __future__ import annotations

import math
from collections.abc import Callable

DECAYS = ("exp", "cos", "linear", "cube")

# The reference recipe trains 13 epochs: 1 dense, 9 while the sparsity grows, 3 to recover.
_RECIPE_EPOCHS, _WARM_EPOCHS, _END_EPOCH = 13, 1, 10
_PRUNE_STEPS = 40

_SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "exp": lambda x, s0, s: 1 - (1 - s0) * ((1 - s) / (1 - s0)) ** x,
    "cos": lambda x, s0, s: s0 + (s - s0) * (1 - math.cos(math.pi / 2 * x)),
    "linear": lambda x, s0, s: s0 + (s - s0) * x,
    "cube": lambda x, s0, s: s0 + (s - s0) * x**3,
}


def derive_steps(
    start_step: int | None = None,
    end_step: int | None = None,
    pruning_frequency: int | None = None,
    total_steps: int | None = None,
) -> dict[str, int | None]:
    """Complete a schedule; what is given stays.

    With ``total_steps = T`` the proportions of the reference recipe are taken: ``start_step`` is
    ``T // 13``, ``end_step`` is ``round(10 T / 13)``, and ``pruning_frequency`` makes about 40
    prune steps of the time between. Without it ``start_step`` is 0 and ``pruning_frequency`` 1.

    Returns:
        ``{start_step, end_step, pruning_frequency}``; ``end_step`` is ``None`` when neither it nor
        ``total_steps`` was given.

    Raises:
        ValueError: ``end_step`` before ``start_step``, or after ``total_steps``.
    """
    if total_steps is not None:
        if start_step is None:
            start_step = total_steps * _WARM_EPOCHS // _RECIPE_EPOCHS
            start_step = start_step if end_step is None else min(start_step, end_step)
        if end_step is None:
            derived = round(total_steps * _END_EPOCH / _RECIPE_EPOCHS)
            end_step = min(total_steps, max(start_step + 1, derived))
        if pruning_frequency is None:
            pruning_frequency = max(1, (end_step - start_step) // _PRUNE_STEPS)
        if end_step > total_steps:
            raise ValueError(
                f"end_step={end_step} comes after the end of training, total_steps={total_steps}: "
                f"the target would never be reached"
            )
    start_step = 0 if start_step is None else start_step
    if end_step is not None and end_step < start_step:
        raise ValueError(f"end_step={end_step} comes before start_step={start_step}")
    return {
        "start_step": start_step,
        "end_step": end_step,
        "pruning_frequency": 1 if pruning_frequency is None else pruning_frequency,
    }


def prune_steps(start_step: int, end_step: int, frequency: int) -> range:
    """The steps at which units are selected, never empty.

    One shot (``start_step == end_step``): that step alone. A frequency longer than the whole
    interval: one prune step, at ``end_step``, by when gradients have been seen.
    """
    if end_step - start_step < frequency:
        return range(end_step, end_step + 1)
    return range(start_step + frequency, end_step + 1, frequency)


def sparsity_at(
    step: int, steps: range, target: float, decay: str = "exp", initial: float = 0.0
) -> float:
    """The sparsity that holds after ``step`` completed steps.

    Args:
        step: completed optimizer steps.
        steps: what :func:`prune_steps` returned.
        target: the value from the last prune step on, exactly.
        decay: one of ``DECAYS``.
        initial: the value before the first prune step.

    Raises:
        ValueError: ``decay`` is unknown.
    """
    if decay not in _SHAPES:
        raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {decay!r}")
    if step < steps.start:
        return initial
    done = (step - steps.start) // steps.step + 1
    if done >= len(steps):
        return target
    return min(target, _SHAPES[decay](done / len(steps), initial, target))
