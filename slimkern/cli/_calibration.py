"""What the one-shot road sees of the data: token sequences, drawn by a seed, in batches."""

from __future__ import annotations

import random

from torch import Tensor

from slimkern.cli._run import Run
from slimkern.training.task import Texts

_BATCH = 64


def calibration_batches(run: Run, texts: Texts | None) -> list[dict[str, Tensor]]:
    """The batches that calibrate a run's model: ``[B, S]`` inputs with their attention mask.

    The texts, or else the rows of the slimming, give distinct token sequences; at most
    ``calibration_rows`` of them are drawn, and put in order of length, so that little is padding.

    Args:
        run: a run whose splits are encoded.
        texts: (first, second or ``None``); read as the run's task reads them.
    """
    asked, rows = run.settings.one_shot, run.slimming_rows
    assert asked is not None, "the gradual road is not calibrated"
    if texts is not None:
        with run.display.stage("tokenize the calibration texts"):
            rows = run.task.encode_texts(texts, run.tokenizer, run.max_length)
    assert rows is not None, "there are texts, or rows of a training"
    sequences = list(rows.sequences)
    if len(sequences) > asked.calibration_rows:
        sequences = random.Random(asked.seed).sample(sequences, asked.calibration_rows)
    sequences.sort(key=lambda s: -len(s["input_ids"]))
    starts = range(0, len(sequences), _BATCH)
    return [rows.padding.batch(sequences[start : start + _BATCH]) for start in starts]
