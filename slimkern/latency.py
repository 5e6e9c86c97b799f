"""What a width costs in seconds on this machine: measured once, kept on disk.

A group's time cannot be counted: kernels like some widths better than others, and narrow ones
hardly gain. It is measured on the whole model, so that caches, memory and the rest of a block are
what they will be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimkern import latency_cache, machine, timing
from slimkern.copies import sharing_copy
from slimkern.costs import Costs
from slimkern.discovery.groups import Group
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import slim_

_MEASURED = 8  # widths per class that are timed; what lies between is interpolated
_TOGETHER = 3  # copies that are alive at once, and timed in turns with one dense model

Call = Callable[[nn.Module], Callable[[], object]]
Progress = Callable[[int, int], None]


def measure_latency(
    model: nn.Module,
    groups: Iterable[Group],
    call: Call,
    *,
    levels: Mapping[str, Sequence[int]],
    threads: int | None = None,
    rounds: int = 9,
    cache: str | Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> Costs:
    """Seconds of one forward as a function of the groups' widths, on this machine.

    **Additivity is assumed**: what a group saves does not depend on the widths of the others.
    Groups of one shape (kind, sizes of their linears, size of a unit) are taken to cost the same.
    For each such class, and about eight of its widths, a copy of the model with *all* groups of
    the class at that width is timed in turns with the dense model; with ``T(w)`` its time (its
    share of the dense time in that run, times the fastest dense run of all) and ``n`` groups in
    the class, one of them costs ``(T(w) - T(smallest)) / n``, made non-decreasing in ``w`` by the
    nearest monotone curve (pool adjacent violators). Widths between are interpolated. ``fixed``
    makes the total at full widths the measured dense time.

    Copies share every parameter that is not cut, and the model itself is not changed. Which units
    a copy keeps is drawn at random: only their number matters for the time.

    Args:
        model: the dense model, in the mode, dtype and place it is to be timed in.
        groups: its groups, as :func:`slimkern.discover` found them.
        call: a model -> the forward to be timed, without arguments: its closure fixes the inputs,
            the same for each model.
        levels: group name -> the widths wanted of it; the full width is always there too. A group
            that is left out stays as it is, its time in ``fixed``.
        threads: PyTorch threads while timing; ``None`` leaves the setting.
        rounds: timed rounds, at least 3; the fastest counts.
        cache: the folder of measured tables; ``latency`` in the user's cache by default. A table
            is found again for the same model structure, levels, ``key``, threads, machine,
            versions and precision; then nothing is timed. One in which no width gains anything is
            not kept: a busy machine, or a model too small to time.
        key: what else decides the time: batch and tokens at least.
        progress: called with (copies timed, copies in all), while measuring.

    Returns:
        costs in seconds, a table for every group.

    Raises:
        KeyError: ``levels`` names no group of these.
        ValueError: a width lies outside its group, an output holds NaN or infinities or no
            numbers at all, or an argument is out of range.
        SurgeryError: a group does not fit the model.
        OSError: the cache can't be read or written.
    """
    groups = tuple(groups)
    wanted = _classes(model, groups, levels)
    question = _question(model, groups, wanted, threads, key)
    folder = latency_cache.default_folder() if cache is None else Path(cache)
    folder.mkdir(parents=True, exist_ok=True)  # an error here comes before the measurement
    path = folder / f"{latency_cache.digest(question)}.json"
    known = latency_cache.read(path, question, groups)
    if known is not None:
        return known
    dense, seconds = _measure(model, call, wanted, threads, rounds, progress)
    costs = _costs(groups, wanted, dense, seconds)
    if _tells(costs):
        latency_cache.write(path, question, costs)
    return costs


def _tells(costs: Costs) -> bool:
    """Whether some width gains something, where there is more than one."""
    tables = [table.values() for table in costs.tables.values() if len(table) > 1]
    return not tables or any(max(seconds) > min(seconds) for seconds in tables)


def monotone(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence with the least squared distance: pool adjacent violators.

    (Barlow et al., Statistical Inference under Order Restrictions, 1972.)
    """
    pools: list[tuple[float, int]] = []  # mean and length
    for value in values:
        mean, size = float(value), 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, size = (before * many + mean * size) / (many + size), many + size
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]


_Class = tuple[tuple[Group, ...], tuple[int, ...]]  # groups of one shape, ascending widths


def _classes(
    model: nn.Module, groups: tuple[Group, ...], levels: Mapping[str, Sequence[int]]
) -> list[_Class]:
    """Groups of one shape, with the widths to measure: the smallest, the full one, some between."""
    names = {g.name for g in groups}
    unknown = sorted(set(levels) - names)
    if unknown:
        raise KeyError(f"levels names no group of these: {unknown}; groups: {sorted(names)}")
    alike: dict[str, list[Group]] = {}
    for group in groups:
        if group.name in levels:
            alike.setdefault(json.dumps(_shape(model, group)), []).append(group)
    classes = []
    for members in alike.values():
        full = members[0].num_units
        for g in members:
            if not all(1 <= w <= full for w in levels[g.name]):
                raise ValueError(
                    f"levels of {g.name!r} are {tuple(levels[g.name])}; accepted: 1 to {full} units"
                )
        widths = sorted({full, *(int(w) for g in members for w in levels[g.name])})
        steps = min(_MEASURED, len(widths)) - 1
        picked = {round(i * (len(widths) - 1) / max(1, steps)) for i in range(steps + 1)}
        classes.append(
            (tuple(members), tuple(widths[i] for i in sorted({*picked, len(widths) - 1})))
        )
    return classes


def _shape(model: nn.Module, group: Group) -> list[Any]:
    """What groups that cost the same have in common."""
    sides = [
        [[m.unit_size, *model.get_submodule(m.name).weight.shape] for m in members]  # type: ignore[misc]
        for members in (group.producers, group.consumers)
    ]
    return [group.kind, group.num_units, *sides]


def _measure(
    model: nn.Module,
    call: Call,
    classes: list[_Class],
    threads: int | None,
    rounds: int,
    progress: Progress | None,
) -> tuple[float, dict[tuple[int, int], float]]:
    """Seconds of the dense model, and of each (class, width) below the full one."""
    jobs = [(c, w) for c, (_, widths) in enumerate(classes) for w in widths[:-1]]
    if not jobs:
        timed = timing.time_interleaved(
            {"dense": call(model)}, check=_check_finite, rounds=rounds, threads=threads
        )
        return timed["dense"].minimum, {}
    runs: list[float] = []
    shares: dict[tuple[int, int], float] = {}
    for start in range(0, len(jobs), _TOGETHER):
        batch = jobs[start : start + _TOGETHER]
        calls = {"dense": call(model)}
        for c, width in batch:
            calls[f"{c}:{width}"] = call(_slimmed(model, classes[c][0], width))
        timed = timing.time_interleaved(calls, check=_check_finite, rounds=rounds, threads=threads)
        runs.append(timed["dense"].minimum)
        for c, width in batch:
            shares[c, width] = timed[f"{c}:{width}"].minimum / runs[-1]
        if progress is not None:
            progress(len(shares), len(jobs))
    dense = min(runs)
    return dense, {job: share * dense for job, share in shares.items()}


def _slimmed(model: nn.Module, groups: tuple[Group, ...], width: int) -> nn.Module:
    """A copy with these groups at ``width``; what is not cut is the model's own tensors."""
    entries = []
    for group in groups:
        order = torch.randperm(group.num_units, generator=torch.Generator().manual_seed(0))
        entries.append(PlanEntry(group, tuple(sorted(order[:width].tolist()))))
    return slim_(sharing_copy(model), SlimPlan(tuple(entries)))


def _costs(
    groups: tuple[Group, ...],
    classes: list[_Class],
    dense: float,
    seconds: Mapping[tuple[int, int], float],
) -> Costs:
    tables: dict[str, dict[int, float]] = {g.name: {g.num_units: 0.0} for g in groups}
    for c, (members, widths) in enumerate(classes):
        times = monotone([seconds.get((c, w), dense) for w in widths])
        for group in members:
            table = {w: (t - times[0]) / len(members) for w, t in zip(widths, times)}
            tables[group.name] = table
    fixed = dense - sum(table[max(table)] for table in tables.values())
    return Costs("seconds", fixed, tables)


def _check_finite(outputs: dict[str, object]) -> None:
    for name, output in outputs.items():
        tensors = [t for t in _tensors(output) if t.is_floating_point()]
        if not tensors:
            raise ValueError(
                f"the forward of {name!r} returned {type(output).__name__} without a "
                "floating-point tensor in it: there is nothing to check before it is timed"
            )
        if not all(bool(t.isfinite().all()) for t in tensors):
            raise ValueError(f"the output of {name!r} holds NaN or infinities; it is not timed")


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _question(
    model: nn.Module,
    groups: tuple[Group, ...],
    classes: list[_Class],
    threads: int | None,
    key: str,
) -> dict[str, Any]:
    """Everything that decides the answer, as JSON data."""
    parameters = [
        [n, list(p.shape), str(p.dtype), p.device.type] for n, p in model.named_parameters()
    ]
    modules = [[n, type(m).__name__, m.training] for n, m in model.named_modules()]
    structure = [parameters, modules, _attention(model), [g.to_dict() for g in groups]]
    here = machine.machine()
    return {
        "structure": latency_cache.digest(structure),
        "classes": [[[g.name for g in gs], _shape(model, gs[0]), list(ws)] for gs, ws in classes],
        "key": key,
        "threads": torch.get_num_threads() if threads is None else threads,
        "machine": {k: here.get(k) for k in ("cpu", "cores", "isa", "gpu")},
        "versions": machine.versions(),
        "precision": _precision(),
    }


def _attention(model: nn.Module) -> list[str]:
    """The attention that transformers' models use: a setting, not a module."""
    configs = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}
    return sorted({str(getattr(c, "_attn_implementation", None)) for c in configs.values()})


def _precision() -> list[str]:
    """PyTorch's float32 precision, by its older setting where it can be read, and by the newer."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # raised once the two settings have been mixed
        older = "mixed"
    mkldnn = getattr(torch.backends.mkldnn, "matmul", None)
    places = (torch.backends, torch.backends.cuda.matmul, mkldnn)
    return [older, *(str(getattr(place, "fp32_precision", None)) for place in places)]
