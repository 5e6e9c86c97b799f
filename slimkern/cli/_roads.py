"""The two roads from a dense teacher to the report."""

from __future__ import annotations

from typing import Any

from slimkern.cli._finish import complete, finish_gradual, finish_one_shot
from slimkern.cli._gradual import train_gradual
from slimkern.cli._one_shot import cut, family_variants, healed, main_variant
from slimkern.cli._run import Run
from slimkern.cli._run_folder import GRADUAL
from slimkern.report.schema import Results
from slimkern.training.task import Texts


def slim_model(run: Run, texts: Texts | None, title: str, **described: Any) -> Results:
    """Slim the run's dense model by its method, check, save, evaluate, time, write the report.

    Args:
        run: the run, its splits encoded and its dense teacher made.
        texts: what calibrates the one-shot road; ``None``: the rows that it is healed on.
        title, **described: as of :func:`slimkern.cli._finish.complete`.

    Raises:
        InterruptedRunError: Ctrl-C; the same run goes on from there.
        RunError: a check failed.
    """
    if run.settings.method == GRADUAL:
        models, checked = finish_gradual(run, train_gradual(run))
    else:
        cut(run, texts)
        variants = [main_variant(run), *family_variants(run)]
        models, checked = finish_one_shot(run, healed(run, variants))
    return complete(run, title, models, checked, **described)
