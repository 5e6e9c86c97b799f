"""Encoded rows: every distinct token sequence once, batches padded to their own longest one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

Encoded = dict[str, list[int]]


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
        labels: per row the target.
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

    def by_length(self, batch_size: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """All rows once, longest first: (row indices, batch). For evaluation."""
        lengths = self.lengths()
        order = sorted(range(len(self)), key=lambda i: -lengths[i])
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield indices, self.collate([self[i] for i in indices])


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
