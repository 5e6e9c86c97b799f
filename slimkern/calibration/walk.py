"""Layer by layer: what each second linear sees in the dense model, and in the one being slimmed.

The slim model's own activations are the inputs ``x`` and the dense model's are the aim: where the
linear's output is added to a residual stream, its target is

    y = (dense output + dense residual) - residual of the slim model,

so that each layer also makes up for what went wrong before it (as in K-Prune, Park, Choi and Kang,
"Accurate retraining-free pruning for pretrained encoder-based language models", 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimkern.calibration.batches import Batch, real_rows, spread_over
from slimkern.calibration.moments import Moments
from slimkern.calibration.record import record, sample
from slimkern.calibration.replay import Replay, Seen
from slimkern.calibration.script import Script
from slimkern.calibration.store import Store
from slimkern.discovery.groups import Group, Member

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Site:
    """A second linear and its group; a group that several layers share has several."""

    group: Group
    member: Member

    @property
    def name(self) -> str:
        """The linear's dotted name."""
        return self.member.name


class Walk:
    """The dense model and the one being slimmed, side by side, from one second linear to the next.

    Both must be in evaluation mode while it lasts.

    Args:
        dense: the dense model.
        slim: its copy that is being slimmed.
        groups: whose second linears are visited.
        batches: what the models run on.
        store: where activations wait.
        selection_tokens: units are chosen on about so many tokens; repairs use all.

    Attributes:
        sites: in order of execution.
        few: indices of the batches on which units are chosen.

    Raises:
        ValueError: a second linear is called several times, or not at all, in one forward.
    """

    def __init__(
        self,
        dense: nn.Module,
        slim: nn.Module,
        groups: Iterable[Group],
        batches: list[Batch],
        store: Store,
        selection_tokens: int,
    ) -> None:
        self.slim = slim
        self.store = store
        self.every = list(range(len(batches)))
        self.few = spread_over(batches, selection_tokens)
        sites = [Site(g, m) for g in groups for m in g.consumers]
        # All that a recorded forward makes is held until it is over: two rows will do. They run
        # along with the dense model, to see that a resumed forward is the whole one: first, so
        # that what a module remembers of its last forward is another batch's.
        self.recorded = len(batches)
        self.batches = [*batches, min(batches, key=lambda b: b.entries).head(2)]
        self.script = record(dense, self.batches[self.recorded], {s.name for s in sites})
        for site in sites:
            times = self.script.times(site.name)
            if times != 1:
                raise ValueError(
                    f"{site.name!r} is called {times} times in one forward; a layer can be "
                    f"calibrated where it is called once: leave it out with excluded_op_names"
                )
        self.sites = sorted(sites, key=lambda s: self.script.position(s.name))
        self._dense = Replay(dense, self.script, self.batches, store, "dense")
        self._slim = Replay(slim, self.script, self.batches, store, "slim")
        self._left: set[str] = set()

    def aim(self, site: Site) -> None:
        """Bring the dense model to ``site`` on all batches, and store what is aimed at."""

        def look(index: int, seen: Seen) -> None:
            if index == self.recorded:
                _check_resumed(self.script, site.name, seen.x)
            else:
                self.store.put(("target", index), {"y": seen.target})

        self._dense.to(site.name, [self.recorded, *self.every], look)
        self._dense.arrive(site.name)

    def look(self, site: Site) -> Moments:
        """Moments of the inputs alone that the model being slimmed has at ``site`` on the few
        batches; nothing moves."""
        weight = self.slim.get_parameter(f"{site.name}.weight")
        moments = Moments(weight.shape[1], 0, weight.device)

        def look(index: int, seen: Seen) -> None:
            moments.update(real_rows(self.batches[index], seen.x, site.name))

        self._slim.to(site.name, self.few, look, compute=False, keep=False)
        return moments

    def arrive(self, site: Site) -> Moments:
        """Moments of these inputs and of their targets on all batches; the model being slimmed
        moves on to ``site``."""
        weight = self.slim.get_parameter(f"{site.name}.weight")
        moments = Moments(weight.shape[1], weight.shape[0], weight.device)

        def look(index: int, seen: Seen) -> None:
            target = self.store.get(("target", index))["y"]
            if seen.residual is not None:
                target = target - seen.residual
            self.add(moments, index, site.name, seen.x, target)
            self.store.put(("x", index), {"x": seen.x})

        self._slim.to(site.name, self.every, look, compute=False)
        self._slim.arrive(site.name)
        return moments

    def leave(self, site: Site) -> None:
        """Compute the linear of ``site``, whose weights are final now, on all batches."""
        linear = self.slim.get_submodule(site.name)
        self._left.add(site.name)
        with torch.no_grad():
            for index in self.every:
                x = self.store.get(("x", index))["x"]
                self._slim.output(site.name, index, linear.forward(x))  # its hooks run later
                self.store.drop(("x", index))
                self.store.drop(("target", index))

    def narrow(self, name: str, rows: Tensor) -> None:
        """A linear keeps these rows: what is stored of its outputs follows, if it has been left.

        In a plain stack of linears each is the second of one group and the first of the next.
        """
        if name in self._left:
            self._slim.narrow(name, self.every, rows)

    def add(self, moments: Moments, index: int, name: str, x: Tensor, y: Tensor) -> None:
        """Let a batch's real tokens enter; what is not finite is refused."""
        batch = self.batches[index]
        moments.update(real_rows(batch, x, name), real_rows(batch, y, name))


class DenseWalk:
    """The dense model alone, from one second linear to the next, on some of the batches.

    Args:
        walk: whose dense model, sites and batches are used.
        sites: the ones visited, in order of execution.
        indices: of the batches.
    """

    def __init__(self, walk: Walk, sites: Sequence[Site], indices: list[int]) -> None:
        self.walk = walk
        self.sites = sites
        self.indices = indices
        model = walk._dense.model
        self._replay = Replay(model, walk.script, walk.batches, walk.store, "dense only")

    def visit(self, site: Site) -> Moments:
        """Moments of what goes into the linear of ``site`` and of what it returns."""
        weight = self._replay.model.get_parameter(f"{site.name}.weight")
        moments = Moments(weight.shape[1], weight.shape[0], weight.device)

        def look(index: int, seen: Seen) -> None:
            if index == self.walk.recorded:
                _check_resumed(self.walk.script, site.name, seen.x)
            else:
                self.walk.add(moments, index, site.name, seen.x, seen.y)

        self._replay.to(site.name, [self.walk.recorded, *self.indices], look)
        self._replay.arrive(site.name)
        return moments

    def close(self) -> None:
        """Let go of the stored activations."""
        for index in (*self.indices, self.walk.recorded):
            self.walk.store.drop(("dense only", index))


def _check_resumed(script: Script, name: str, x: Tensor) -> None:
    """Refuse to go on where a resumed forward computes something else than a whole one."""
    whole, resumed = script.samples[name][0], sample(x)
    if whole.shape != resumed.shape or not torch.equal(whole, resumed):
        if whole.shape == resumed.shape and not torch.isfinite(whole).all():
            return  # the layer itself is refused, with its name, when its inputs are read
        difference = "another shape"
        if whole.shape == resumed.shape:
            difference = f"inputs off by {float((whole - resumed).abs().max()):.1e}"
        raise ValueError(
            f"{name!r}: the forward can't be resumed there ({difference}): its result depends on "
            f"more than what its modules return"
        )
