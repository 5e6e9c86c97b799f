"""The training-time object: masks that follow an optimizer.

Hooks on the optimizer count its steps, keep the scores, and move the masks at prune steps. Nothing
is mounted on the model and no method is replaced, so that a model in training is copied, pickled
and saved like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from slimkern import obs_step
from slimkern.config import PruningRule
from slimkern.discovery.groups import Group
from slimkern.masks import masked_plan, owned_elements
from slimkern.nn import MaskedLinear
from slimkern.obs_ranks import on_first
from slimkern.optimizer_state import innermost
from slimkern.parallel import ranks_of
from slimkern.patterns.pruning import BlockPruning, BlockRules, digests
from slimkern.patterns.track import BlockTrack
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.pruning_report import GroupReport, PruningReport, Sparsity, removed_share
from slimkern.pruning_state import read_keep
from slimkern.surgery import mask_
from slimkern.track import Track


class Pruning:
    """Masks that grow while an optimizer steps; what ``prepare_pruning`` returns.

    Steps are completed **optimizer** steps: micro-batches of gradient accumulation do not count,
    and neither does a step that a ``GradScaler`` skips. Scores are read from the gradients just
    before a step; masks move, and columns of masked units are set back to zero, just after it.
    A unit that is masked stays masked, and so does a block, unless its rule says ``regrow``.

    In a run of several processes every rank makes this object and takes every step; scores are
    averaged over the ranks, and all hold the same masks after every update.

    Args:
        model: the model. Its linears are masked by :func:`slimkern.mask_` from the first cut on.
        rules: each rule with the groups it prunes.
        optimizer: the optimizer that trains the model; may be ``None`` only where every rule cuts
            by magnitude or ``obs`` before the first step.
        notes: what preparation wants to have reported.
        batches: what rules of type ``obs`` calibrate on, as the model takes them; kept as long as
            this object. Such a rule writes to the second linears' weights and biases, frozen or
            not, at its prune steps.
        process_group: the processes that train the model together; by default all of
            ``torch.distributed``, where it is initialised.
        blocks: each rule with a block pattern, with the linears it prunes.

    Attributes:
        step: completed optimizer steps.
        optimizer: the optimizer that the steps are counted of, or ``None``.

    Raises:
        ValueError: a rule lacks a schedule, an optimizer or batches, or prunes before there are
            gradients; a weight is frozen that a criterion needs the gradient of; the optimizer is
            another model's.
        RuntimeError: the ranks disagree, or this failed on another one.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Iterable[tuple[PruningRule, tuple[Group, ...]]],
        optimizer: torch.optim.Optimizer | None = None,
        notes: Iterable[str] = (),
        batches: Iterable[Any] = (),
        process_group: Any = None,
        blocks: BlockRules = (),
    ) -> None:
        self.model = model
        self._ranks = ranks_of(process_group)
        self.step = 0
        with self._ranks.together("preparing to prune"):
            self.optimizer = optimizer = innermost(optimizer)
            self._tracks = [Track.start(rule, groups) for rule, groups in rules]
            self._batches = tuple(batches)
            self._notes = (*notes, *obs_step.checked(model, self._tracks, self._batches))
            self._groups = {g.name: g for t in self._tracks for g in t.groups}
            self._blocks = BlockPruning(model, blocks)
            names = {n for t in self._all_tracks() for n in t.names}
            self._weights = {n: model.get_parameter(f"{n}.weight") for n in sorted(names)}
            self._check_optimizer(optimizer)
            self._sizes = {n: owned_elements(model, g) for n, g in self._groups.items()}
            self._keep = {n: tuple(range(g.num_units)) for n, g in self._groups.items()}
            self._read_masks()
        self._handles: list[Any] = []
        self._skipped = self._over = False
        self._agree("what to prune, how and when", with_rules=True)
        self._cut()
        self._blocks.ready(self.step)
        if optimizer is not None:
            self._handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    @property
    def done(self) -> bool:
        """Whether every rule has reached its target: the rest of the training recovers."""
        return all(self.step >= t.steps[-1] for t in self._all_tracks())

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be done as asked: one sentence each."""
        return self._notes + tuple(n for t in self._all_tracks() for n in t.notes)

    def sparsity(self) -> Sparsity:
        """Fractions removed so far, per group and in total."""
        each = {n: 1 - len(self._keep[n]) / g.num_units for n, g in self._groups.items()}
        removed, weights = self._blocks.weights_removed()
        total = sum(self._sizes[n] * each[n] for n in each) + removed
        total /= sum(self._sizes.values()) + weights
        each |= {r.name: 1 - r.kept / r.num_units for r in self._blocks.rows()}
        units = [(g.kind, len(self._keep[n]), g.num_units) for n, g in self._groups.items()]
        ffn, mha = (removed_share([u[1:] for u in units if u[0] == k]) for k in ("ffn", "mha"))
        return Sparsity(total, ffn, mha, each, removed / weights if weights else None)

    def report(self) -> PruningReport:
        """Where the run stands: every group, what is kept of it, and the notes."""
        rows = tuple(
            GroupReport(
                g.name, g.kind, g.num_units, len(self._keep[g.name]), t.rule.target_sparsity
            )
            for t in self._tracks
            for g in t.groups
        )
        rows += self._blocks.rows()
        last = max(t.steps[-1] for t in self._all_tracks())
        return PruningReport(self.step, last, self.sparsity(), rows, self.notes)

    def plan(self) -> SlimPlan:
        """What stays of whole units, as of now: the plan that ``slim_`` would be given."""
        entries = tuple(PlanEntry(g, self._keep[n]) for n, g in self._groups.items())
        return SlimPlan(entries, self.notes)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on exactly, beside model and optimizer.

        Returns:
            ``{"step": int, "scores": {linear name: tensor}, "keep": {group name: int64 tensor},
            "blocks": {linear name: uint8 bits of its block mask}}``, tensors on the CPU. The same
            on every rank; no rank waits for another.
        """
        return {
            "step": self.step,
            "scores": {
                n: s.detach().cpu().clone()
                for t in self._all_tracks()
                for n, s in t.keeper.state.items()
            },
            "keep": {n: torch.tensor(k, dtype=torch.int64) for n, k in self._keep.items()},
            "blocks": self._blocks.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the model's masks are set to it.

        The model and the optimizer must hold their own saved states. Every rank loads the same.

        Raises:
            ValueError: the state is of another model or another configuration; nothing has been
                changed then.
        """
        entries = read_keep(state, self._groups, self._weights)
        kept = self._blocks.read_state(state.get("blocks", {}))
        scores = [t.own_scores(state["scores"], self._weights) for t in self._all_tracks()]
        step = int(state["step"])
        moved = [e for e in entries if e.keep != self._keep[e.group.name]]
        mask_(self.model, SlimPlan(tuple(moved)))
        self._keep = {e.group.name: e.keep for e in entries}
        self._blocks.apply(kept)
        for track, own in zip(self._all_tracks(), scores):
            track.keeper.state = own
        self.step = step
        self._blocks.ready(step)
        self._agreed = False

    def remove(self) -> None:
        """Let go of the optimizer. Masks stay as they are and no longer move."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._over = True
        self._blocks.stop()

    def _all_tracks(self) -> list[Track | BlockTrack]:
        return [*self._tracks, *self._blocks.tracks]

    def _agree(self, what: str, with_rules: bool = False) -> None:
        """Hold step and masks, and perhaps the rules, against the other ranks'."""
        values: dict[str, Any] = {"step": self.step, "masks": self._keep}
        values |= {f"blocks of {n}": d for n, d in digests(self._blocks.kept()).items()}
        if with_rules:
            values |= {f"rule {i}": t.subject for i, t in enumerate(self._all_tracks())}
        self._ranks.agree(what, values)
        self._agreed = not with_rules

    def _check_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        for track in self._all_tracks():
            track.check(self._weights, optimizer)
        if optimizer is not None and not self._owned_by(optimizer):
            raise ValueError(
                "optimizer= holds none of the weights that are to be pruned: make it from "
                "model.parameters() of this model"
            )

    def _owned_by(self, optimizer: torch.optim.Optimizer) -> bool:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        now = (self.model.get_parameter(f"{n}.weight") for n in self._weights)
        return any(id(p) in held for p in now)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._over or self._slimmed(optimizer):
            return
        if not self._agreed:  # a state may have been loaded since the start, on one rank alone
            self._agree("where the run stands")
        # A fused optimizer under a GradScaler is stepped with scaled gradients, and told to do
        # nothing when one of them is infinite.
        found_inf = getattr(optimizer, "found_inf", None)
        self._skipped = found_inf is not None and bool(found_inf)
        scale = getattr(optimizer, "grad_scale", None)
        if self._skipped:
            return
        for track in self._tracks:
            if track.observes(self.step):
                grads = {n: w.grad for n, w in self._weights.items()}
                track.keeper.observe(self._weights, grads, 1.0 if scale is None else scale)
        self._blocks.observe(self.step, self._weights, 1.0 if scale is None else scale)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._over or self._skipped:
            return
        for group in self._groups.values():
            for member in group.consumers:
                linear = self.model.get_submodule(member.name)
                if isinstance(linear, MaskedLinear):
                    linear.zero_masked()
        self._blocks.clean()
        self.step += 1
        self._cut()
        self._blocks.ready(self.step)

    def _slimmed(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the model was slimmed since the last step; an optimizer left behind raises."""
        changed = [
            n for n, w in self._weights.items() if self.model.get_parameter(f"{n}.weight") is not w
        ]
        if not changed:
            self._over = self._blocks.released
            return self._over
        now = {n: self.model.get_parameter(f"{n}.weight") for n in self._weights}
        alike = all(now[n].shape == w.shape for n, w in self._weights.items())
        if not self._owned_by(optimizer):
            raise RuntimeError(
                f"the model has new weights ({changed[0]!r} and others; was it slimmed, or "
                f"sharded?), and this optimizer still holds the old ones: it would train nothing. "
                f"Slim with model_slim(model, optimizer=optimizer), or make a new optimizer"
            )
        if alike:  # the same weights in other tensors: sharded since, or moved
            self._weights = now
            for track in self._all_tracks():
                track.check(now, optimizer)
            return False
        self._over, self._weights = True, {}  # the optimizer holds this object: free the weights
        return True

    def _read_masks(self) -> None:
        masks = masked_plan(self.model, self._groups.values())
        self._keep.update({e.group.name: e.keep for e in masks})

    def _cut(self) -> None:
        """Select anew where this step is a prune step, mask what goes, repair what stays."""
        tracks = [t for t in self._tracks if self.step in t.steps]
        kept = self._blocks.choose(self.step, self._weights, self._ranks)
        if not tracks and not kept:
            return
        self._read_masks()  # the user, or another Pruning, may have masked more
        keep = dict(self._keep)
        for track in (t for t in tracks if not t.rule.needs_batches):
            keep.update(track.choose(self.step, self._weights, self._keep, self._ranks))
        measured = [t for t in tracks if t.rule.needs_batches]
        calibrating = (self.model, measured, self.step, self._keep, self._batches)
        found = on_first(self._ranks, *calibrating)
        keep.update(found.keep)
        self._ranks.agree(f"the masks of step {self.step}", {**keep, **digests(kept)})
        moved = [PlanEntry(g, keep[n]) for n, g in self._groups.items() if keep[n] != self._keep[n]]
        mask_(self.model, SlimPlan(tuple(moved)))
        found.write(self.model)
        self._blocks.apply(kept)
        self._keep = keep
