"""The dense teacher's answers, computed once per sequence and kept for all epochs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from slimkern.training.rows import EncodedRows
from slimkern.training.task import Batch, Outputs, Task

DEFAULT_MEMORY = 4 * 2**30
Progress = Callable[[int, int], None]


class Teacher:
    """Gives the dense model's outputs for a batch.

    A teacher's answer to a sequence never changes, so one pass over the training sequences (sorted
    by length, without gradients) replaces a dense forward in every training step. Hidden states are
    kept in float16: a relative error of 5e-4 in a target that the student misses by far more. Where
    they need more than ``memory`` bytes, or do not fit the range of float16, only the pass is saved
    for vectors, and hidden states are computed in each step.

    Args:
        model: the dense model; put into evaluation mode and frozen.
        task: what it was trained for.
        rows: the training rows.
        hidden_states: whether hidden states are wanted.
        memory: bytes that the stored hidden states may take.
        batch_size: sequences per forward of the pass.
        progress: called with (sequences done, sequences in all).
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        rows: EncodedRows,
        hidden_states: bool = True,
        memory: int = DEFAULT_MEMORY,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.task = task
        self.hidden_states = hidden_states
        self._sequences = rows.sequences
        self._tokens: Tensor | None = None
        lengths = [len(s["input_ids"]) for s in rows.sequences]
        self._starts = torch.tensor([0, *np.cumsum(lengths).tolist()])
        self._vectors = self._collect(rows, lengths, memory, batch_size, progress)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored hidden states; 0 where they are computed in each step."""
        return 0 if self._tokens is None else self._tokens.numel() * self._tokens.element_size()

    def knows(self, rows: EncodedRows) -> bool:
        """Whether the rows name sequences by the same indices as those the teacher has seen."""
        return rows.sequences is self._sequences or rows.sequences == self._sequences

    @torch.no_grad()
    def outputs(self, batch: Batch) -> Outputs:
        """The dense outputs of a batch, as :meth:`Task.run` gives them.

        Raises:
            ValueError: the batch does not say which sequences it holds.
        """
        if "sequences" not in batch:
            raise ValueError(
                "the batch has no 'sequences', by which a Teacher finds its answers: take batches "
                "from EncodedRows.collate, or give the dense model itself as the teacher"
            )
        indices = batch["sequences"]
        if self.hidden_states and self._tokens is None:
            return self.task.run(self.model.to(indices.device), batch, hidden_states=True)
        device = indices.device
        vectors = self._vectors[indices.cpu()].to(device)
        if self._tokens is None:
            return Outputs(vectors)
        pieces = [self._tokens[self._starts[i] : self._starts[i + 1]] for i in indices.tolist()]
        return Outputs(vectors, torch.cat(pieces).to(device))

    @torch.no_grad()
    def _collect(
        self,
        rows: EncodedRows,
        lengths: list[int],
        memory: int,
        batch_size: int,
        progress: Progress | None,
    ) -> Tensor:
        """The pass over all sequences: returns their vectors, and stores their hidden states."""
        device = next(self.model.parameters()).device
        vectors: Tensor | None = None
        keep = self.hidden_states
        done = 0
        for indices, batch in rows.sequences_by_length(batch_size):
            batch = {name: value.to(device) for name, value in batch.items()}
            outputs = self.task.run(self.model, batch, hidden_states=keep)
            if vectors is None:
                vectors = torch.empty(len(lengths), outputs.vectors.shape[-1])
            vectors[indices] = outputs.vectors.float().cpu()
            keep = keep and self._store(outputs.tokens, indices, lengths, memory)
            done += len(indices)
            if progress is not None:
                progress(done, len(lengths))
        assert vectors is not None, "rows are never empty"
        return vectors

    def _store(
        self, tokens: Tensor | None, indices: list[int], lengths: list[int], memory: int
    ) -> bool:
        """Keep a batch's hidden states; False where they can't be kept at all."""
        assert tokens is not None
        if self._tokens is None:
            layers, size = tokens.shape[1:]
            if sum(lengths) * layers * size * 2 > memory:
                return False
            self._tokens = torch.empty(sum(lengths), layers, size, dtype=torch.float16)
        half = tokens.to(torch.float16).cpu()
        if not half.isfinite().all():
            self._tokens = None
            return False
        place = 0
        for i in indices:
            self._tokens[self._starts[i] : self._starts[i + 1]] = half[place : place + lengths[i]]
            place += lengths[i]
        return True
