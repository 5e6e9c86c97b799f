"""Healing: bringing a slim model back to its dense one, at the slim model's price."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from slimkern.training.callbacks import AverageWeights
from slimkern.training.distillation import DistillationWeights
from slimkern.training.task import Task
from slimkern.training.trainer import TrainingSettings, disable_dropout

SHORT, LONG = 2.0, 6.0
"""Epochs up to which, and from which on, the rate and the task's weight stay as they are."""
SHORT_RATE, LONG_RATE = 3e-4, 6e-4
_EVERY = 4  # steps between two updates of the average: at 0.998 a step, the same average
_NORM = re.compile(r"Norm(\d?d)?$", re.IGNORECASE)


@dataclass(frozen=True)
class HealingSettings(TrainingSettings):
    """The settings of a training whose model is slim already; every default is for this.

    AdamW (fused), 32 rows a step, 5 % warm-up, linear decay to zero, no dropout. The numbers were
    found with a six-layer encoder on STS-benchmark, where a longer training did better with a
    higher rate and less of the task's own loss: :meth:`for_epochs` follows that.

    Attributes:
        freeze: what is not trained, as of :func:`freeze_`; everything else is, embeddings and norms
            included.
        average: decay per step of :class:`slimkern.training.AverageWeights`; ``None``: no average.
            The default looks back over 500 steps: on the demo's data it was ahead of the weights
            themselves in every epoch, most of all in the first ones.
    """

    epochs: float = LONG
    learning_rate: float = LONG_RATE
    dropout: bool = False
    freeze: tuple[str, ...] = ()
    average: float | None = 0.998

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_names(self.freeze)

    @classmethod
    def for_epochs(cls, epochs: float = LONG, **changes: Any) -> HealingSettings:
        """The defaults for a training of this length, with ``changes`` to any other setting.

        The rate is 3e-4 up to 2 epochs, 6e-4 from 6 on, and on a line between them.
        """
        rate = SHORT_RATE + (LONG_RATE - SHORT_RATE) * _length(epochs)
        return cls(**{"epochs": epochs, "learning_rate": rate, **changes})

    def weights(self, task: Task) -> DistillationWeights:
        """How much each part of the loss counts: the task's defaults, fit to the length.

        The weight of the task's own loss falls from its default to half of it between 2 and 6
        epochs: for embeddings task 1 to 0.5, hidden 3, embedding 1, similarity 10.
        """
        usual = task.default_weights
        return replace(usual, task=usual.task * (1 - 0.5 * _length(self.epochs)))

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freeze and turn dropout off as the settings say; returns the model.

        Raises:
            ValueError: as :func:`freeze_`.
        """
        freeze_(model, self.freeze)
        return model if self.dropout else disable_dropout(model)

    def averaging(self) -> AverageWeights | None:
        """The callback that averages the weights, for the Trainer and ``KeepBest``; or ``None``."""
        return None if self.average is None else AverageWeights(self.average, every=_EVERY)


def freeze_(model: nn.Module, what: Sequence[str]) -> nn.Module:
    """Exclude kinds of parameters from training (``requires_grad`` is cleared); returns the model.

    Accepted kinds:

    - ``embeddings``: the tables of ``nn.Embedding`` and ``nn.EmbeddingBag`` modules. An output
      layer that is tied to a table freezes with it.
    - ``norms``: weights and biases of normalization layers: modules whose class, or a class it is
      derived from, has a name that ends in ``Norm``, ``Norm1d``, ``Norm2d`` or ``Norm3d``
      (``nn.LayerNorm``, ``nn.RMSNorm``, ``LlamaRMSNorm``, ``LayerNorm2d``, ...). Only parameters of
      the module itself count, not those of modules inside it.

    Raises:
        ValueError: a kind is unknown, the model has no parameter of a kind, or none is left.
    """
    _check_names(what)
    for kind in what:
        found = [
            parameter
            for module in model.modules()
            if _KINDS[kind](module)
            for parameter in module.parameters(recurse=False)
        ]
        if not found:
            raise ValueError(f"freeze is {tuple(what)}, but the model has no {kind}")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze is {tuple(what)}, which leaves nothing to train in this model")
    return model


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _is_norm(module: nn.Module) -> bool:
    return any(_NORM.search(cls.__name__) for cls in type(module).__mro__)


_KINDS = {"embeddings": _is_table, "norms": _is_norm}


def _check_names(what: Sequence[str]) -> None:
    if isinstance(what, str):
        raise ValueError(f"freeze is {what!r}; accepted: a sequence of names, as ({what!r},)")
    unknown = [name for name in what if name not in _KINDS]
    if unknown:
        raise ValueError(f"freeze has {unknown[0]!r}; accepted: {', '.join(_KINDS)}")


def _length(epochs: float) -> float:
    """0 for a short training, 1 for a long one, a line between."""
    return min(max((epochs - SHORT) / (LONG - SHORT), 0.0), 1.0)
