"""torch eager: the module as it is."""

from __future__ import annotations

from bench.providers._common import placed, torch_call, wrong_device
from bench.providers.base import Call, Provider, high_is_highest
from bench.work import Setting, Work
from slimkern.report.speed_schema import PRECISIONS


class Eager(Provider):
    """The module itself, under ``torch.inference_mode`` where there is no backward."""

    name = "torch eager"
    precisions = PRECISIONS

    def refuses(self, work: Work, setting: Setting) -> str | None:
        return wrong_device(setting) or high_is_highest(work, setting)

    def prepare(self, work: Work, setting: Setting) -> Call:
        module = placed(work.build(), setting)
        return torch_call(work, module, module, setting)
