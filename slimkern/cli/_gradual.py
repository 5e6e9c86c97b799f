"""The gradual road of a run: masks grow while the model is trained."""

from __future__ import annotations

from torch import nn
from transformers import set_seed

from slimkern.cli._run import Run
from slimkern.training import DistillTrainer, SlimCallback, disable_dropout

STAGE = "slim while distilling"


def train_gradual(run: Run) -> nn.Module:
    """Grow the masks while distilling, and return the best masked model.

    Raises:
        InterruptedRunError: Ctrl-C; a checkpoint lies in the run's folder.
    """
    settings = run.settings
    assert settings.slim is not None
    set_seed(settings.slim.seed)
    assert run.slimming_rows is not None
    weights = settings.weights
    teacher = run.teacher(weights.hidden > 0) if weights.needs_teacher else None
    model = run.load(str(run.teacher_folder))
    slim = SlimCallback(
        ffn2_sparsity=settings.ffn2_sparsity,
        mha_sparsity=settings.mha_sparsity,
        warm_epochs=settings.warm_epochs,
        cooldown_epochs=settings.cooldown_epochs,
        **settings.pruning,
    )
    scratch = run.folder / "training" / "slim"
    best = run.keep_best(scratch, lambda: slim.pruning is not None and slim.pruning.done)
    trainer = DistillTrainer(
        model if settings.slim.dropout else disable_dropout(model),
        run.task,
        run.slimming_rows,
        settings.slim.arguments(scratch),
        weights,
        teacher,
        callbacks=[slim, best],
    )
    run.train(trainer, model, STAGE, best)
    assert slim.pruning is not None, "training has begun"
    for note in slim.pruning.notes:
        run.display.line(f"note: {note}")
    run.history = trainer.state.log_history
    slim.pruning.remove()
    run.forget_teacher()
    return model.cpu()
