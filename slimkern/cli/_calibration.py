"""What the one-shot road sees of the data: token sequences, drawn by a seed, in batches."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from slimkern.cli._run import Run
from slimkern.training.rows import Encoded, Padding
from slimkern.training.task import tokenize

_BATCH = 64
Texts = Sequence[tuple[str, str | None]]


def calibration_batches(run: Run, texts: Texts | None) -> list[dict[str, Tensor]]:
    """The batches that calibrate a run's model: ``[B, S]`` inputs with their attention mask.

    The texts, or else the training rows, give distinct token sequences; at most
    ``calibration_rows`` of them are drawn, and put in order of length, so that little is padding.

    Args:
        run: a run whose splits are encoded.
        texts: (first, second or ``None``); pairs are read as the run's task reads them.
    """
    asked = run.settings.one_shot
    assert asked is not None, "the gradual road is not calibrated"
    if texts is None:
        rows = run.rows["train"]
        sequences, padding = list(rows.sequences), rows.padding
    else:
        with run.display.stage("tokenize the calibration texts"):
            sequences, padding = _encode(run, texts), Padding.of(run.tokenizer)
    if len(sequences) > asked.calibration_rows:
        sequences = random.Random(asked.seed).sample(sequences, asked.calibration_rows)
    sequences.sort(key=lambda s: -len(s["input_ids"]))
    starts = range(0, len(sequences), _BATCH)
    return [padding.batch(sequences[start : start + _BATCH]) for start in starts]


def _encode(run: Run, texts: Texts) -> list[Encoded]:
    """Every distinct sequence once, in the order of the texts."""
    if run.task.name == "embeddings":
        # A bi-encoder reads one sentence at a time.
        singles = [text for row in texts for text in row if text is not None]
        encoded = tokenize(run.tokenizer, singles, None, run.max_length)
    else:
        firsts, seconds = [first for first, _ in texts], [second or "" for _, second in texts]
        paired = seconds if any(seconds) else None
        encoded = tokenize(run.tokenizer, firsts, paired, run.max_length)
    distinct = {tuple(tuple(ids) for ids in sequence.values()): sequence for sequence in encoded}
    return list(distinct.values())
