"""``SlimCallback``: gradual slimming inside a ``transformers.Trainer`` of the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimkern.auto_slim import parse_auto_slim_config, prepare_pruning
from slimkern.config import WeightPruningConfig
from slimkern.parallel import ranks_of
from slimkern.pruning import Pruning, PruningReport
from slimkern.training.checkpoints import read_beside, write_beside

STATE_NAME = "slimkern_pruning"
Configs = WeightPruningConfig | Iterable[Mapping[str, Any]]


class SlimCallback(TrainerCallback):
    """Grows the masks of a model while any ``transformers.Trainer`` trains it.

    ::

        slim = SlimCallback(ffn2_sparsity=0.8, mha_sparsity=0.6, pruning_scope="local")
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[slim]).train()
        model = slimkern.model_slim(model)

    When training begins, targets are found and masks mounted on the Trainer's own optimizer, with
    the number of optimizer steps that the Trainer has planned (gradient accumulation included).
    Sparsities appear in the logs, and the state of the masks is saved with every checkpoint, as
    safetensors and JSON: ``trainer.train(resume_from_checkpoint=...)`` goes on exactly.

    Args:
        configs: what ``parse_auto_slim_config`` returned, or a ``WeightPruningConfig``, used as
            they are. Left out: made here from the arguments that follow.
        ffn2_sparsity, mha_sparsity: fractions of FFN channels and heads to remove.
        warm_epochs: epochs before the sparsity grows. Default: a thirteenth of the training.
        cooldown_epochs: epochs after the target is reached. Default: three thirteenths.
        calibration: batches for ``pruning_type="obs"``, as the model takes them (a data loader or a
            list of mappings): the first 8,192 tokens of them. A training that is resumed needs the
            same ones again.
        **rules: further keys of ``WeightPruningConfig`` (``pruning_scope``, ``pruning_type``,
            ``pruning_frequency``, ``round_multiplier``, ...).

    Attributes:
        pruning: the :class:`slimkern.pruning.Pruning` object, once training has begun.

    Raises:
        ValueError: ``configs`` and other arguments are both given, or epochs are negative.
    """

    def __init__(
        self,
        configs: Configs | None = None,
        *,
        ffn2_sparsity: float = 0.0,
        mha_sparsity: float = 0.0,
        warm_epochs: float | None = None,
        cooldown_epochs: float | None = None,
        calibration: Iterable[Any] | None = None,
        **rules: Any,
    ) -> None:
        epochs_given = warm_epochs is not None or cooldown_epochs is not None
        if configs is not None and (ffn2_sparsity or mha_sparsity or rules or epochs_given):
            raise ValueError("configs is complete in itself: give it alone, or the other arguments")
        for name, epochs in (("warm_epochs", warm_epochs), ("cooldown_epochs", cooldown_epochs)):
            if epochs is not None and epochs < 0:
                raise ValueError(f"{name} is {epochs}; accepted: at least 0")
        self.configs = configs
        self.sparsities = {"ffn2_sparsity": ffn2_sparsity, "mha_sparsity": mha_sparsity}
        self.warm_epochs = warm_epochs
        self.cooldown_epochs = cooldown_epochs
        self.calibration = calibration
        self.rules = rules
        self.pruning: Pruning | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Find the targets, mount the masks, and restore their state where training is resumed.

        Raises:
            RuntimeError: the callback has been used before.
            FileNotFoundError: training is resumed from a checkpoint that holds no masks.
            ValueError: the checkpoint's masks are of another step than its model.
        """
        if self.pruning is not None:
            raise RuntimeError("this SlimCallback has been used; make a new one for each training")
        model: nn.Module = kwargs["model"]
        configs = self.configs
        if configs is None:
            schedule = self._schedule(state.max_steps, state.max_steps / args.num_train_epochs)
            rules: dict[str, Any] = {**self.sparsities, **schedule, **self.rules}
            configs = parse_auto_slim_config(model, **rules)
        optimizer = _unwrapped(kwargs["optimizer"])
        pruning = prepare_pruning(model, configs, optimizer, self.calibration)
        if state.global_step:
            with ranks_of().together("resuming the masks"):
                pruning.load_state_dict(read_beside(args, state.global_step, STATE_NAME))
                if pruning.step != state.global_step:
                    raise ValueError(
                        f"the checkpoint's masks are of step {pruning.step}, "
                        f"its model is of step {state.global_step}"
                    )
        self.pruning = pruning

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the sparsities reached to the log and to the Trainer's history."""
        if self.pruning is None or logs is None:
            return
        reached = sparsities(self.pruning)
        logs.update(reached)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(reached)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the masks' state beside the checkpoint that has just been written."""
        if self.pruning is not None:
            write_beside(self.pruning.state_dict(), args, state, STATE_NAME)

    def report(self) -> PruningReport:
        """What the masks have done so far; prints as a table.

        Raises:
            RuntimeError: training has not begun.
        """
        if self.pruning is None:
            raise RuntimeError("training has not begun: there is nothing to report")
        return self.pruning.report()

    def _schedule(self, total_steps: int, steps_per_epoch: float) -> dict[str, int]:
        """The steps of the schedule; what is not said is derived from ``total_steps``."""
        schedule = {"total_steps": total_steps}
        if self.warm_epochs is not None:
            schedule["start_step"] = round(self.warm_epochs * steps_per_epoch)
        if self.cooldown_epochs is not None:
            schedule["end_step"] = total_steps - round(self.cooldown_epochs * steps_per_epoch)
        start, end = schedule.get("start_step", 0), schedule.get("end_step", total_steps)
        if not start <= end:
            raise ValueError(
                f"warm_epochs={self.warm_epochs} and cooldown_epochs={self.cooldown_epochs} leave "
                f"no step of {total_steps} for the sparsity to grow in"
            )
        return schedule


def sparsities(pruning: Pruning) -> dict[str, float]:
    """``ffn_sparsity``, ``mha_sparsity`` and ``block_sparsity``: the fractions removed of channels,
    of heads, and of the weights in blocks, of what is pruned at all."""
    reached = pruning.sparsity()
    named = {
        "ffn_sparsity": reached.ffn,
        "mha_sparsity": reached.mha,
        "block_sparsity": reached.blocks,
    }
    return {name: value for name, value in named.items() if value is not None}


def _unwrapped(optimizer: Any) -> Optimizer:
    """torch's own optimizer inside accelerate's wrapper, whose step may be skipped."""
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
