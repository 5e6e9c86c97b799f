"""What a model is calibrated on: batches of many makes, and which of their tokens are real."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimkern.discovery.inputs import Inputs, prepare, tensors_in, without_extras


@dataclass(frozen=True)
class Batch:
    """One forward's arguments.

    Attributes:
        inputs: the arguments; they go to the model's device when they are used.
        mask: which tokens are real, ``[B, S]`` bool; ``None``: all of them.
    """

    inputs: Inputs
    mask: Tensor | None

    @property
    def example(self) -> Any:
        """The arguments as :func:`slimkern.discover` takes them."""
        return self.inputs.args or self.inputs.kwargs

    @property
    def entries(self) -> int:
        """Numbers in all its tensors together, padding included."""
        return sum(t.numel() for t in tensors_in((self.inputs.args, self.inputs.kwargs)))

    def head(self, rows: int) -> Batch:
        """The first rows; all of them where its tensors have not one number of rows in common."""
        args, kwargs = self.inputs.args, self.inputs.kwargs
        lengths = {len(t) if t.dim() else 0 for t in tensors_in((args, kwargs))}
        if len(lengths) != 1 or not all(
            isinstance(v, Tensor) or next(tensors_in(v), None) is None
            for v in (*args, *kwargs.values())
        ):
            return self
        cut = replace(
            self.inputs,
            args=tuple(v[:rows] if isinstance(v, Tensor) else v for v in args),
            kwargs={k: v[:rows] if isinstance(v, Tensor) else v for k, v in kwargs.items()},
        )
        return Batch(cut, None if self.mask is None else self.mask[:rows])

    def call(self, model: nn.Module) -> Any:
        """Run ``model`` on this batch."""
        args, kwargs = self.inputs.materialize(None)
        return model(*args, **kwargs)

    def real(self, activations: Tensor) -> Tensor:
        """The rows of real tokens: ``[B, S, n]``, or ``[..., n]``, to ``[T, n]``."""
        if self.mask is not None and activations.shape[:-1] == self.mask.shape:
            return activations[self.mask.to(activations.device)]
        return activations.flatten(0, -2)

    def real_outputs(self, outputs: Any) -> Tensor:
        """What a model makes of real tokens, ``[T, n]``: the first tensor of floating-point numbers
        in its outputs. ``[B, S, n]``, ``[B, S]`` with one number per token, or ``[B, n]``.

        Raises:
            ValueError: there is none.
        """
        first = next((t for t in tensors_in(outputs) if t.is_floating_point()), None)
        if first is None:
            raise ValueError("the model's outputs hold no floating-point tensor")
        if first.dim() < 2:
            return first.reshape(-1, 1)
        per_token = self.mask is not None and first.shape == self.mask.shape
        return self.real(first.unsqueeze(-1) if per_token else first)

    @property
    def tokens(self) -> int:
        """Real tokens of the batch; where no mask tells, entries of its first tensor but the last
        dimension (all of them for whole numbers, such as token ids)."""
        if self.mask is not None:
            return int(self.mask.sum())
        values = (*self.inputs.args, *self.inputs.kwargs.values())
        first = next((v for v in values if isinstance(v, Tensor)), None)
        if first is None:
            return 0
        return first.numel() // (first.shape[-1] if first.is_floating_point() else 1)


def read_batches(
    model: nn.Module,
    batches: Any,
    *,
    tokenizer: Any = None,
    max_length: int = 128,
    batch_size: int = 64,
) -> list[Batch]:
    """The calibration batches of a model, from whatever the user has at hand.

    Args:
        model: whose inputs they are.
        batches: an iterable of batches (a data loader: mappings, tuples, lists or tensors; labels
            and columns that the forward does not name are left out), one mapping of tensors or one
            tensor, cut into batches along the first dimension, or texts.
        tokenizer: for texts: a callable of transformers' kind.
        max_length: tokens of a text after which it is cut off.
        batch_size: rows per batch where texts or tensors are cut into batches. Texts are put in
            order of length first, so that little of a batch is padding.

    Returns:
        the batches, in order.

    Raises:
        TypeError: not an iterable of batches, or texts without a tokenizer.
        ValueError: there is no batch or no real token, or ``batch_size`` is under 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    found = [_batch(model, raw) for raw in _raw(batches, tokenizer, max_length, batch_size)]
    if not found:
        raise ValueError("batches holds no batch: there is nothing to calibrate on")
    if all(batch.mask is not None and not batch.mask.any() for batch in found):
        raise ValueError("batches holds padding alone: there is nothing to calibrate on")
    return found


def _raw(batches: Any, tokenizer: Any, max_length: int, batch_size: int) -> Iterable[Any]:
    if isinstance(batches, str):
        raise TypeError("batches must be an iterable of texts or batches, got one string")
    if isinstance(batches, Tensor):
        return batches.split(batch_size) if len(batches) else []
    if isinstance(batches, Mapping):
        return _cut(batches, batch_size)
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches or texts, a tensor or a mapping of tensors, "
            f"got {type(batches).__name__}"
        )
    items = list(batches)
    texts = [item for item in items if isinstance(item, str)]
    if not texts:
        return items
    if len(texts) < len(items):
        raise TypeError(f"batches mixes {len(texts)} texts with {len(items) - len(texts)} others")
    if tokenizer is None:
        raise TypeError("batches holds texts: give the model's tokenizer= with them")
    return _tokenized(texts, tokenizer, max_length, batch_size)


def _cut(tensors: Mapping[str, Any], batch_size: int) -> list[dict[str, Tensor]]:
    """A mapping of tensors of one length as mappings of ``batch_size`` rows."""
    lengths = {k: len(v) if isinstance(v, Tensor) and v.dim() else None for k, v in tensors.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise TypeError(f"batches is a mapping; values must be tensors of one length: {lengths}")
    rows = next(iter(lengths.values())) or 0
    return [
        {key: value[start : start + batch_size] for key, value in tensors.items()}
        for start in range(0, rows, batch_size)
    ]


def _tokenized(
    texts: Sequence[str], tokenizer: Any, max_length: int, batch_size: int
) -> list[dict[str, Tensor]]:
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: -len(ids[i]))
    return [
        dict(
            tokenizer(
                [texts[i] for i in order[start : start + batch_size]],
                truncation=True,
                max_length=max_length,
                padding=True,
                return_tensors="pt",
            )
        )
        for start in range(0, len(order), batch_size)
    ]


def _batch(model: nn.Module, raw: Any) -> Batch:
    wanted = without_extras(model, dict(raw) if isinstance(raw, Mapping) else raw)
    if isinstance(raw, (list, tuple)) and any(isinstance(item, str) for item in raw):
        raise TypeError(
            "batches holds lists of texts: give the texts themselves, one after another"
        )
    inputs = prepare(model, wanted)
    return Batch(inputs, _real_tokens(raw) if isinstance(raw, Mapping) else None)


def _real_tokens(raw: Mapping[str, Any]) -> Tensor | None:
    """Which tokens are no padding, as the masks of transformers and of torch's encoder say it."""
    mask, padding = raw.get("attention_mask"), raw.get("src_key_padding_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        added = mask.dtype.is_floating_point and bool((mask < 0).any())  # 0 and -inf, not 1 and 0
        return mask == 0 if added else mask != 0
    if isinstance(padding, Tensor) and padding.dim() == 2:
        return padding == 0  # True, or -inf: padding
    return None


def spread_over(batches: Sequence[Batch], tokens: int) -> list[int]:
    """Indices of batches, evenly spread, that hold about ``tokens`` real tokens; all where fewer.

    Evenly spread, so that batches in order of length are represented short and long.
    """
    total = sum(batch.tokens for batch in batches)
    if total <= tokens:
        return list(range(len(batches)))
    count = max(1, round(len(batches) * tokens / total))
    step = len(batches) / count
    return sorted({min(len(batches) - 1, int((i + 0.5) * step)) for i in range(count)})


def real_rows(batch: Batch, activations: Tensor, layer: str) -> Tensor:
    """:meth:`Batch.real`, refusing what is not finite.

    Raises:
        ValueError: an activation is NaN or infinite; the message names the layer.
    """
    rows = batch.real(activations)
    # The sum is a cheap look; it may overflow where each number is finite.
    if not rows.sum().isfinite() and not rows.isfinite().all():
        bad = int((~torch.isfinite(rows)).any(1).sum())
        raise ValueError(
            f"{layer!r}: {bad} of {len(rows)} tokens have activations that are NaN or infinite; "
            f"the layer can't be calibrated on them"
        )
    return rows
