"""A Trainer's progress on a run's display."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from slimkern.cli._display import Bar, Display


class ShowProgress(TrainerCallback):
    """Moves a stage's bar with the optimizer's steps, and says what the training does."""

    def __init__(self, bar: Bar, display: Display, statistic: str) -> None:
        self.bar = bar
        self.display = display
        self.statistic = statistic

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        self.bar(state.global_step, state.max_steps)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say the loss and how much has been removed."""
        shown = [("loss", "loss", "{:.4f}"), ("ffn_sparsity", "FFN", "-{:.0%}")]
        shown.append(("mha_sparsity", "heads", "-{:.0%}"))
        logs = state.log_history[-1]
        self.bar.say("  ".join(f"{t} {f.format(logs[k])}" for k, t, f in shown if k in logs))

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the epoch's score."""
        scored = state.log_history[-1] if state.log_history else {}
        if "score" in scored and scored["step"] == state.global_step:
            epoch = scored["epoch"]
            self.display.line(f"  epoch {epoch:g}: dev {self.statistic} {scored['score']:.4f}")
