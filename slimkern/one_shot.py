"""``one_shot``: a slim model without training, from a few thousand unlabelled inputs.

Layer by layer, units are chosen by structured OBS and what stays is repaired by least squares, so
that each layer makes up for what was removed in it and before it. Widths come from a sparsity, the
same in every layer, or from a budget for the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimkern.allocation import Allocation, Budget, Prediction
from slimkern.calibration.batches import read_batches
from slimkern.calibration.ranking import mask_fisher
from slimkern.calibration.store import Store
from slimkern.calibration.walk import Progress, Walk
from slimkern.calibration.watch import evaluating
from slimkern.config import PruningRule
from slimkern.copies import own_, sharing_copy
from slimkern.cuts import refuse_sharded
from slimkern.discovery import discover
from slimkern.discovery.groups import Group
from slimkern.layerwise import Layerwise, Method
from slimkern.masks import is_masked
from slimkern.parallel import unwrapped
from slimkern.plan import SlimPlan
from slimkern.selection import kept_units
from slimkern.surgery import note_errors_
from slimkern.targets import matching, targets

_MEMORY = 256 * 2**20
_SELECTION_TOKENS = 4096
_PATTERNS = {"ffn": "channelx1", "mha": "mha"}


@dataclass(frozen=True)
class OneShot:
    """A slim model and how it came about. Unpacks as ``model, plan = ...``.

    Attributes:
        model: slim, in the mode of the model that was given, with tensors of its own.
        plan: what stayed, with the error of each group.
        predicted: what the budget was spent on; ``None`` where sparsities were given.
        seconds: how long it took.
    """

    model: nn.Module
    plan: SlimPlan
    predicted: Prediction | None
    seconds: float

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.plan))


@torch.inference_mode(False)
def one_shot(
    model: nn.Module,
    batches: Any,
    ffn2_sparsity: float = 0.0,
    mha_sparsity: float = 0.0,
    *,
    target_params: float | None = None,
    target_macs: float | None = None,
    target_latency: float | None = None,
    target_speedup: float | None = None,
    **options: Any,
) -> OneShot:
    """A slim copy of a model, without training.

    Args:
        model: dense, or slim already; it is not changed.
        batches: what it is calibrated on, without labels: an iterable of batches, tensors, or texts
            with ``tokenizer=`` (see :func:`slimkern.calibration.batches.read_batches`). A few
            thousand sentences will do.
        ffn2_sparsity, mha_sparsity: fractions of FFN channels and of heads to remove from every
            layer. Or exactly one of:
        target_params: parameters that the slim model has at most.
        target_macs: multiply-accumulates of one forward of ``latency_shape`` that it has at most.
        target_latency: seconds of one such forward on this machine.
        target_speedup: how many times faster than the dense model such a forward is to be.
        **options: of :class:`Options`.

    Returns:
        a :class:`OneShot`; ``small, plan = one_shot(...)`` unpacks it.

    Raises:
        ValueError: an argument is not accepted, the budget can't be met (the message names what
            can), there is nothing to remove or to calibrate on, or activations are NaN or infinite
            (the message names the layer).
        TypeError: an unknown option, or batches of no known make.
    """
    wanted = {
        "params": target_params,
        "macs": target_macs,
        "latency": target_latency,
        "speedup": target_speedup,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    sparsities = {"ffn": ffn2_sparsity, "mha": mha_sparsity}
    if len(given) + any(sparsities.values()) != 1:
        raise ValueError(
            "give ffn2_sparsity and mha_sparsity (one or both), or one of target_params, "
            f"target_macs, target_latency and target_speedup; got {given or 'none of them'}"
            f"{' and sparsities' if any(sparsities.values()) else ''}"
        )
    road = _Road(model, batches, Options(**options))
    if given:
        (unit, value), *_ = given.items()
        return road.under(Budget(unit, (value,)))[0]
    return road.even(sparsities)


@torch.inference_mode(False)
def one_shot_family(
    model: nn.Module, batches: Any, target_speedup: Sequence[float], **options: Any
) -> list[OneShot]:
    """Slim copies of a model for several speed-ups, from one table of costs and one calibration.

    Args:
        model, batches, **options: as of :func:`one_shot`.
        target_speedup: how many times faster each is to be, for example ``(1.5, 2, 3)``.

    Raises:
        ValueError, TypeError: as :func:`one_shot`.
    """
    if isinstance(target_speedup, (int, float)) or not len(target_speedup):
        raise ValueError(
            f"target_speedup must be a sequence of at least one number, for example (1.5, 2, 3), "
            f"got {target_speedup!r}"
        )
    return _Road(model, batches, Options(**options)).under(Budget("speedup", tuple(target_speedup)))


@dataclass(frozen=True)
class Options:
    """Options of :func:`one_shot`.

    Attributes:
        op_names, excluded_op_names: which layers, as in ``WeightPruningConfig``.
        round_multiplier: FFN widths that remain are multiples of it.
        criterion, repair, sequential, ones_row, add_bias, chunk, damping, ridge: see
            :class:`slimkern.layerwise.Method`.
        loss: of the criterion ``fisher``: ``loss(outputs, batch) -> scalar``; it needs none.
        selection_tokens: units are chosen on about so many tokens; repairs use all of them. By
            default 4,096, or twice the widest layer's channels.
        memory: bytes of activations that are held in memory, the rest waiting on disk. By default
            256 MiB for a model that is no larger, else a quarter of its size, at least 128 MiB.
        tokenizer, max_length, batch_size: for texts.
        latency_shape: (batch, tokens) of the forward that latency and multiply-accumulates are of.
        threads: while timing; PyTorch's own number by default.
        latency_cache: folder of measured tables; the user's cache by default.
        progress: ``progress(stage, done, total)``.
    """

    op_names: Sequence[str] | None = None
    excluded_op_names: Sequence[str] | None = None
    round_multiplier: int = 32
    criterion: str = "obs"
    repair: str = "least_squares"
    sequential: bool = True
    ones_row: bool = True
    add_bias: bool = False
    chunk: int = 16
    damping: float = 0.01
    ridge: float = 1e-3
    loss: Any = None
    selection_tokens: int | None = None
    memory: int | None = None
    tokenizer: Any = None
    max_length: int = 128
    batch_size: int = 64
    latency_shape: tuple[int, int] = (8, 128)
    threads: int | None = None
    latency_cache: Any = None
    progress: Progress | None = None

    @property
    def method(self) -> Method:
        """How units are chosen and layers repaired."""
        return Method(**{name: getattr(self, name) for name in Method.__dataclass_fields__})


class _Road:
    """From a model and its batches to one slim model or several."""

    def __init__(self, model: nn.Module, batches: Any, options: Options) -> None:
        self.started = time.perf_counter()
        self.model = unwrapped(model)
        refuse_sharded(self.model, "one_shot")
        self.options, self.method = options, options.method
        self.progress = options.progress or (lambda stage, done, total: None)
        if is_masked(self.model):
            raise ValueError("the model is masked: slim it first, with slimkern.model_slim(model)")
        if options.selection_tokens is not None and options.selection_tokens < 1:
            raise ValueError(f"selection_tokens={options.selection_tokens}; accepted: at least 1")
        self.batches = read_batches(
            self.model,
            batches,
            tokenizer=options.tokenizer,
            max_length=options.max_length,
            batch_size=options.batch_size,
        )
        self.found = discover(self.model, self.batches[0].example)
        self.notes: list[str] = []
        self.scores: dict[str, Tensor] | None = None  # of the criterion fisher

    def even(self, sparsities: dict[str, float]) -> OneShot:
        """The same fraction goes from every layer."""
        widths: dict[str, int] = {}
        chosen: list[Group] = []
        for kind, sparsity in sparsities.items():
            rule = self._rule(kind, sparsity)
            if not rule.target_sparsity:
                continue
            multiple = self.options.round_multiplier if kind == "ffn" else 1
            groups, notes = targets(self.model, self.found, rule)
            self.notes += notes
            for group in groups:
                chosen.append(group)
                widths[group.name] = kept_units(group.num_units, sparsity, multiple)
                if widths[group.name] == group.num_units:
                    self.notes.append(
                        f"{group.name}: rounding up to a multiple of {multiple} cancels the cut"
                    )
        with evaluating(self.model) as modes, self._store() as store:
            return self._slimmed(chosen, widths, None, store=store, modes=modes)

    def under(self, budget: Budget) -> list[OneShot]:
        """Each layer gets the width that serves the whole model best."""
        rules = [self._rule(kind, 0.5) for kind in _PATTERNS]
        chosen: list[Group] = []
        for rule in rules:
            groups, self.notes = matching(self.model, self.found, rule)
            chosen += groups
        if not chosen:
            targets(self.model, self.found, rules[0])  # raises, and says why
        options = self.options
        spend = Allocation(
            self.model, chosen, budget, options.latency_shape, options.round_multiplier
        )
        with evaluating(self.model) as modes, self._store() as store:
            spend.count(self.batches[0], options.threads, options.latency_cache, self.progress)
            spend.observe(self._walk(chosen, store), self.method, self.progress)
            return [
                self._slimmed(chosen, *spend.widths(value), store=store, modes=modes)
                for value in budget.values
            ]

    def _rule(self, kind: str, sparsity: float) -> PruningRule:
        return PruningRule.from_values(
            {
                "pattern": _PATTERNS[kind],
                "target_sparsity": sparsity,
                "max_sparsity_ratio_per_op": 0.999999,
                "op_names": self.options.op_names,
                "excluded_op_names": self.options.excluded_op_names,
                "round_multiplier": self.options.round_multiplier,
            }
        )

    def _store(self) -> Store:
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        asked = self.options.memory
        usual = _MEMORY if size <= _MEMORY else max(_MEMORY // 2, size // 4)
        return Store(usual if asked is None else asked)

    def _walk(self, groups: list[Group], store: Store) -> Walk:
        widest = max(g.num_units * m.unit_size for g in groups for m in g.consumers)
        tokens = self.options.selection_tokens or max(_SELECTION_TOKENS, 2 * widest)
        return Walk(self.model, sharing_copy(self.model), groups, self.batches, store, tokens)

    def _slimmed(
        self,
        groups: list[Group],
        widths: dict[str, int],
        predicted: Prediction | None,
        *,
        store: Store,
        modes: dict[str, bool],
    ) -> OneShot:
        """One slim model; the time since the last one, or since the start, is its own."""
        if self.method.criterion == "fisher" and self.scores is None:
            self.scores = mask_fisher(
                self.model, groups, self.batches, self.options.loss, progress=self.progress
            )
        walk = self._walk(groups, store)
        plan = Layerwise(walk, widths, self.method, self.scores, self.progress).run()
        plan = SlimPlan(plan.entries, tuple(dict.fromkeys((*self.notes, *plan.notes))))
        small = note_errors_(own_(walk.slim, self.model), plan)
        for name, module in small.named_modules():
            module.training = modes[name]
        started, self.started = self.started, time.perf_counter()
        return OneShot(small, plan, predicted, self.started - started)
