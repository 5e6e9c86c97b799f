"""Slim models that others have cut: a check that slimkern's slim models are as slim as can be."""

from __future__ import annotations

from abc import abstractmethod

from torch import nn

from bench.providers._common import missing, placed, torch_call, wrong_device
from bench.providers.base import Call, Provider, ProviderError
from bench.work import Setting, Work
from slimkern.report.speed_schema import Precision


class _Cut(Provider):
    """Eager torch on the dense module, cut by ``cut`` to the plan of the work."""

    precisions: tuple[Precision, ...] = ("fp32", "bf16")

    def refuses(self, work: Work, setting: Setting) -> str | None:
        if "slim" not in work.tags:
            return "nothing was cut here"
        return wrong_device(setting)

    def prepare(self, work: Work, setting: Setting) -> Call:
        module = placed(self.cut(work), setting)
        return torch_call(work, module, module, setting)

    @abstractmethod
    def cut(self, work: Work) -> nn.Module:
        """The slim module, float32 on the CPU."""


class HandSliced(_Cut):
    """New linears out of indexed weights."""

    name = "hand-sliced"

    def cut(self, work: Work) -> nn.Module:
        from bench.slims import hand_sliced

        return hand_sliced(work)


class TorchPruning(_Cut):
    """Torch-Pruning's dependency graph and its removal."""

    name = "torch-pruning"

    def refuses(self, work: Work, setting: Setting) -> str | None:
        return super().refuses(work, setting) or missing("torch_pruning")

    def cut(self, work: Work) -> nn.Module:
        from bench.slims import torch_pruned

        try:
            return torch_pruned(work)
        except RuntimeError as error:
            raise ProviderError(f"Torch-Pruning did not make the plan's cut: {error}") from error
