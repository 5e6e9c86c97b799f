"""Who takes training steps: masks as slimkern does them, multiplied in, and the slim model.

All of them start from the same dense weights and plan, run in eager torch, and end the step with
the same fused AdamW. The learning rate is zero: the arithmetic and the traffic are the same with
any other, and as the weights stay what they are, every step is the same step, and its outputs can
be compared with the reference whenever one likes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import slimkern
from bench.providers._common import MATMUL, matmul_precision, wrong_device
from bench.providers.base import Call, Provider, chosen, high_is_highest
from bench.training_cases import Index, TrainingWork, loss_of, outputs_of, probes
from bench.work import Outputs, Setting, Work
from slimkern.nn import MaskedLinear
from slimkern.plan import SlimPlan
from slimkern.report.speed_schema import PRECISIONS


def training_providers(names: Sequence[str] | None = None) -> list[Provider]:
    """Providers of training steps, in the order in which they are shown.

    Plain torch comes first: in each precision, the first is the measuring stick of the others.

    Args:
        names: only these; ``None`` for all.

    Raises:
        ValueError: there is no provider of that name.
    """
    known: list[Provider] = [
        DenseEager(),
        MaskMultiply(),
        CompiledMaskMultiply(),
        SlimkernMasked(),
        AlreadySlim(),
    ]
    return chosen(known, names)


class TrainingProvider(Provider):
    """Puts a dense model into one of the forms; the step is the same for all.

    ``bf16`` is ``torch.autocast``: parameters, gradients, the loss and AdamW are float32.
    """

    precisions = PRECISIONS

    def refuses(self, work: Work, setting: Setting) -> str | None:
        if not isinstance(work, TrainingWork):
            return "takes training steps only"
        return wrong_device(setting) or high_is_highest(work, setting)

    def prepare(self, work: Work, setting: Setting) -> Call:
        if not isinstance(work, TrainingWork):
            raise TypeError(f"work is {work.case!r}; accepted: a TrainingWork")
        with torch.inference_mode(False), torch.enable_grad():
            model = work.build().to(setting.device).train()
            run, parts, after = self.form(model, work)
            return TrainingStep(work, setting, run, list(model.parameters()), parts, after)

    @abstractmethod
    def form(self, model: nn.Module, work: TrainingWork) -> Form:
        """Bring the dense model into the provider's form, in place."""


Run = Callable[..., Tensor]
Form = tuple[Run, list[tuple[nn.Parameter, Index]], Callable[[], None] | None]
"""What is called with the inputs, the parts whose gradients are compared, and what else is done
after each of the optimizer's steps."""


class TrainingStep:
    """Forward, backward, and AdamW where the work has it; gives what `TrainingWork` says.

    Args:
        work, setting: what and how.
        run: the model, called with the inputs.
        parameters: that AdamW updates.
        parts: whose gradients are outputs, after the loss.
        after: done after each step of AdamW.
    """

    def __init__(
        self,
        work: TrainingWork,
        setting: Setting,
        run: Run,
        parameters: list[nn.Parameter],
        parts: list[tuple[nn.Parameter, Index]],
        after: Callable[[], None] | None = None,
    ) -> None:
        self._run, self._parameters, self._parts, self._after = run, parameters, parts, after
        self._inputs = tuple(x.to(setting.device) for x in work.inputs())
        self._target = work.target().to(setting.device)
        self._setting = setting
        self.optimizer = None
        if work.optimizer:
            on_gpu = setting.device == "cuda"  # where a step may be captured in a CUDA graph
            self.optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True, capturable=on_gpu)

    def __call__(self) -> Outputs:
        setting = self._setting
        bf16 = setting.precision == "bf16"
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            matmul_precision(MATMUL[setting.precision]),
        ):
            with torch.autocast(setting.device, torch.bfloat16, enabled=bf16):
                hidden = self._run(*self._inputs)
            loss = loss_of(hidden, self._target)
            loss.backward()
            outputs = outputs_of(loss, self._parts)
            if self.optimizer is not None:
                self.optimizer.step()
                if self._after is not None:
                    self._after()
            for parameter in self._parameters:
                parameter.grad = None
        return outputs


class DenseEager(TrainingProvider):
    """No masks at all: what a step costs before anything is masked."""

    name = "dense eager"

    def refuses(self, work: Work, setting: Setting) -> str | None:
        if isinstance(work, TrainingWork) and work.sparsity:
            return "has no masks: the base at 0 %"
        return super().refuses(work, setting)

    def form(self, model: nn.Module, work: TrainingWork) -> Form:
        return model, probes(model, work.plan(), slim=False), None


class MaskMultiply(TrainingProvider):
    """Full weights, multiplied by a mask of ones and zeros in every forward.

    This is ``torch.nn.utils.prune``, on the second linear of each group alone: with its columns
    zero, masks on the rows that feed them change nothing, and would cost as much again.
    """

    name = "mask multiply"

    def form(self, model: nn.Module, work: TrainingWork) -> Form:
        plan = work.plan()
        parts = probes(model, plan, slim=False)
        multiply_masks_(model, plan)
        return model, parts, None


class CompiledMaskMultiply(MaskMultiply):
    """The same through ``torch.compile``; in the two precisions that it has kernels of its own
    for, as each compile of a forward and a backward takes a minute."""

    name = "torch.compile mask multiply"
    precisions = ("fp32", "bf16")

    def refuses(self, work: Work, setting: Setting) -> str | None:
        if isinstance(work, TrainingWork) and not work.compiled:
            return "each takes a compile: not on the short list"
        return super().refuses(work, setting)

    def form(self, model: nn.Module, work: TrainingWork) -> Form:
        _, parts, after = super().form(model, work)
        return torch.compile(model, fullgraph=True, dynamic=False), parts, after


class SlimkernMasked(TrainingProvider):
    """``slimkern.mask_``: full weights, of which only what is kept is computed.

    As in ``prepare_pruning``, columns of masked units are set to zero after each optimizer step.
    """

    name = "slimkern masked"

    def form(self, model: nn.Module, work: TrainingWork) -> Form:
        plan = work.plan()
        slimkern.mask_(model, plan)
        masked = [m for m in model.modules() if isinstance(m, MaskedLinear)]

        def after() -> None:
            for linear in masked:
                linear.zero_masked()

        return model, probes(model, plan, slim=False), after


class AlreadySlim(TrainingProvider):
    """``slimkern.slim_``: a plain small model. What masked training can reach at best."""

    name = "already slim"

    def form(self, model: nn.Module, work: TrainingWork) -> Form:
        plan = work.plan()
        slimkern.slim_(model, plan)
        return model, probes(model, plan, slim=True), None


def multiply_masks_(model: nn.Module, plan: SlimPlan) -> None:
    """Mask the columns of every second linear by ``prune.custom_from_mask``, kept ones by 1."""
    for entry in plan:
        for member in entry.group.consumers:
            linear = model.get_submodule(member.name)
            units = torch.zeros(entry.group.num_units)
            units[list(entry.keep)] = 1.0
            columns = units.repeat_interleave(member.unit_size)
            weight = linear.get_parameter("weight")
            mask = columns.to(weight.device).expand_as(weight).contiguous()
            prune.custom_from_mask(linear, "weight", mask)
