"""Encoded rows: every distinct token sequence once, batches padded to their own longest one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

Encoded = dict[str, list[int]]
NO_SCORE = math.nan
NO_CLASS = -100  # what torch's cross-entropy ignores


@dataclass(frozen=True)
class Padding:
    """The value that fills each of a tokenizer's outputs, and the side that is filled."""

    values: dict[str, int]
    left: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> Padding:
        """What a transformers tokenizer pads with.

        Raises:
            ValueError: it has no padding token.
        """
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token")
        values = {"input_ids": tokenizer.pad_token_id, "token_type_ids": 0, "attention_mask": 0}
        return cls(values, tokenizer.padding_side == "left")

    def batch(self, sequences: Sequence[Encoded]) -> dict[str, Tensor]:
        """``[B, S]`` tensors, ``S`` the longest sequence, with an ``attention_mask``."""
        length = max(len(s["input_ids"]) for s in sequences)
        result = {
            name: torch.full((len(sequences), length), self.values[name], dtype=torch.int64)
            for name in (*sequences[0], "attention_mask")
        }
        for i, sequence in enumerate(sequences):
            n = len(sequence["input_ids"])
            place = slice(length - n, length) if self.left else slice(0, n)
            result["attention_mask"][i, place] = 1
            for name, ids in sequence.items():
                result[name][i, place] = torch.tensor(ids, dtype=torch.int64)
        return result


class EncodedRows(Dataset[dict[str, Any]]):
    """Rows of one or two token sequences with a label, tokenized once.

    Attributes:
        sequences: the distinct token sequences; a row names them by index, so that what the teacher
            says about a sequence is computed once however often it occurs.
        rows: per row the indices of its sequences (one for a cross-encoder, two for embeddings).
        labels: per row the target: a score, or the index of a class. ``NO_SCORE`` (NaN) and
            ``NO_CLASS`` (-100) mark a row without a label, which only a teacher can teach.

    Rows of one kind are joined with ``+``; sequences that both have are kept once.
    """

    def __init__(
        self,
        encoded: Sequence[tuple[Encoded, ...]],
        labels: Sequence[float] | Sequence[int],
        padding: Padding,
    ) -> None:
        if len(encoded) != len(labels):
            raise ValueError(f"{len(encoded)} rows have {len(labels)} labels")
        self.padding = padding
        self.labels = list(labels)
        self.sequences: list[Encoded] = []
        self.rows: list[tuple[int, ...]] = []
        seen: dict[tuple[tuple[int, ...], ...], int] = {}
        for row in encoded:
            indices = []
            for sequence in row:
                key = tuple(tuple(ids) for ids in sequence.values())
                if key not in seen:
                    seen[key] = len(self.sequences)
                    self.sequences.append(sequence)
                indices.append(seen[key])
            self.rows.append(tuple(indices))

    def __add__(self, more: EncodedRows) -> EncodedRows:  # type: ignore[override]
        """These rows, then ``more``; the indices of the sequences of these do not change.

        Raises:
            TypeError: ``more`` is something else than rows.
            ValueError: the rows differ in tokenizer, in sequences per row, or in kind of label.
        """
        if not isinstance(more, EncodedRows):
            raise TypeError(f"rows can't be joined with a {type(more).__name__}")
        kinds = {
            "padding": (self.padding, more.padding),
            "sequences per row": (len(self.rows[0]), len(more.rows[0])),
            "type of label": (type(self.labels[0]).__name__, type(more.labels[0]).__name__),
        }
        for name, (ours, theirs) in kinds.items():
            if ours != theirs:
                raise ValueError(f"rows can't be joined: their {name} is {ours} and {theirs}")
        encoded = [tuple(r.sequences[i] for i in row) for r in (self, more) for row in r.rows]
        return EncodedRows(encoded, [*self.labels, *more.labels], self.padding)

    @property
    def labelled(self) -> int:
        """How many rows have a label."""
        return sum(map(is_labelled, self.labels))

    def require_labels(self, purpose: str) -> None:
        """Refuse rows without labels.

        Raises:
            ValueError: there are some; the message says how many, and what wanted labels.
        """
        without = len(self) - self.labelled
        if without:
            raise ValueError(f"{without} of {len(self)} rows have no label; {purpose} needs all")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"sequences": self.rows[index], "labels": self.labels[index]}

    def lengths(self) -> list[int]:
        """Tokens of each row's longest sequence."""
        tokens = [len(s["input_ids"]) for s in self.sequences]
        return [max(tokens[i] for i in row) for row in self.rows]

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of ``B`` rows: all first sequences, then all second ones.

        Returns the padded inputs ``[B * parts, S]``, ``labels`` ``[B]`` and ``sequences``
        ``[B * parts]``, the index of each sequence.
        """
        parts = len(items[0]["sequences"])
        indices = [item["sequences"][part] for part in range(parts) for item in items]
        batch = self.padding.batch([self.sequences[i] for i in indices])
        batch["sequences"] = torch.tensor(indices)
        labels = [item["labels"] for item in items]
        dtype = torch.float32 if isinstance(labels[0], float) else torch.int64
        batch["labels"] = torch.tensor(labels, dtype=dtype)
        return batch

    def sequences_by_length(self, batch_size: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """All sequences once, longest first: (indices of sequences, padded inputs)."""
        order = sorted(
            range(len(self.sequences)), key=lambda i: -len(self.sequences[i]["input_ids"])
        )
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield indices, self.padding.batch([self.sequences[i] for i in indices])

    def by_length(self, batch_size: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """All rows once, longest first: (row indices, batch). For evaluation."""
        lengths = self.lengths()
        order = sorted(range(len(self)), key=lambda i: -lengths[i])
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield indices, self.collate([self[i] for i in indices])


def is_labelled(label: float | int) -> bool:
    """Whether a row's label is one, and not ``NO_SCORE`` or ``NO_CLASS``."""
    return not math.isnan(label) if isinstance(label, float) else label != NO_CLASS


class LengthGroupedSampler(Sampler[int]):
    """A shuffle in which the rows of one batch have similar lengths, so that padding is rare.

    Rows are shuffled, cut into stretches of ``batch_size * batches_per_group``, each sorted by
    length and cut into batches; the batches are shuffled again. The order is a function of ``seed``
    and the epoch alone, so that a resumed run sees the rows that the interrupted one would have.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int = 0, batches_per_group: int = 20
    ) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.stretch = batch_size * batches_per_group
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self), generator=random)
        stretches = [s[self.lengths[s].argsort(stable=True)] for s in order.split(self.stretch)]
        batches = [b for s in stretches for b in s.split(self.batch_size)]
        # A short batch inside the epoch would shift all that follow: it goes to the end.
        full = [b for b in batches if len(b) == self.batch_size]
        short = [b for b in batches if len(b) < self.batch_size]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=random)]
        return iter(torch.cat([*shuffled, *short]).tolist())
