"""Inputs for the one forward that discovery needs: the user's, or ones a model asks for itself."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_LABELS = ("labels", "label")
_DEPTH = 6


@dataclass(frozen=True)
class Inputs:
    """The arguments of a forward, and the device and dtype that the model wants them in."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device
    dtype: torch.dtype | None

    def materialize(self, mode: FakeTensorMode | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fresh copies on the model's device: fake ones under ``mode``, real ones without."""
        return self._copy(self.args, mode), self._copy(self.kwargs, mode)

    def _copy(self, data: Any, mode: FakeTensorMode | None) -> Any:
        if isinstance(data, Tensor):
            dtype = self.dtype if data.is_floating_point() else None
            if mode is None or isinstance(data, FakeTensor):
                return data.detach().to(self.device, dtype or data.dtype, copy=True)
            with mode:
                shape, kind = tuple(data.shape), dtype or data.dtype
                return torch.empty(shape, dtype=kind, device=self.device)
        if isinstance(data, Mapping):
            return {k: self._copy(v, mode) for k, v in data.items()}
        if isinstance(data, tuple) and hasattr(data, "_fields"):
            return type(data)(*(self._copy(v, mode) for v in data))
        if isinstance(data, (list, tuple)):
            return type(data)(self._copy(v, mode) for v in data)
        return data


def tensors_in(data: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    """The tensors in nested containers, dataclasses and plain objects."""
    if isinstance(data, Tensor):
        yield data
    elif depth and data is not None and not isinstance(data, (str, bytes, int, float, nn.Module)):
        if isinstance(data, Mapping):
            children = list(data.values())
        elif isinstance(data, (list, tuple, set, frozenset)):
            children = list(data)
        elif dataclasses.is_dataclass(data):
            children = [getattr(data, f.name) for f in dataclasses.fields(data)]
        else:
            children = list(getattr(data, "__dict__", {}).values())
        for child in children:
            yield from tensors_in(child, depth - 1)


def prepare(model: nn.Module, example_inputs: Any) -> Inputs:
    """Arguments for ``model`` out of a tensor, tuple, list or mapping, or derived when None.

    Labels are left out where the forward does without them, surplus items of a batch that is a
    tuple or list (its targets) too, and a model with a key/value cache is told to keep none.

    Raises:
        ValueError: nothing was given and nothing can be derived, or it is of another type.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    device = first.device if first is not None else torch.device("cpu")
    dtype = first.dtype if first is not None else None
    if example_inputs is None:
        example_inputs = _derived(model)
    signature = inspect.signature(model.forward)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = {k: v for k, v in example_inputs.items() if not _is_label(k, signature)}
    elif isinstance(example_inputs, (tuple, list)):
        args = _fitting(tuple(example_inputs), signature)
    else:
        raise ValueError(
            f"example_inputs: expected a tensor, a tuple or list of arguments or a mapping of "
            f"keyword arguments, got {type(example_inputs).__name__}"
        )
    if "use_cache" in signature.parameters and len(args) < 2:
        kwargs.setdefault("use_cache", False)
    return Inputs(args, kwargs, device, dtype)


def without_extras(model: nn.Module, batch: Any) -> Any:
    """A batch without the columns of its dataset that ``model.forward`` does not name."""
    if not isinstance(batch, Mapping):
        return batch
    names = inspect.signature(model.forward).parameters
    if not any(key in names for key in batch):
        return batch  # a forward with **kwargs, or one that takes the mapping itself
    return {key: value for key, value in batch.items() if key in names}


def _is_label(key: str, signature: inspect.Signature) -> bool:
    parameter = signature.parameters.get(key)
    return key in _LABELS and (parameter is None or parameter.default is None)


def _fitting(batch: tuple[Any, ...], signature: inspect.Signature) -> tuple[Any, ...]:
    """The longest prefix of a batch that the forward accepts."""
    for n in range(len(batch), 0, -1):
        try:
            signature.bind(*batch[:n])
        except TypeError:
            continue
        return batch[:n]
    return batch


def _derived(model: nn.Module) -> dict[str, Any]:
    """Inputs for a model with a Hugging Face configuration.

    Raises:
        ValueError: the model has none, or asks for an input of an unknown kind.
    """
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise ValueError(
            f"example_inputs: needed for {type(model).__name__}, whose inputs can't be derived "
            "(it has no Hugging Face config): pass a tensor, tuple or dict as for its forward"
        )
    names = inspect.signature(model.forward).parameters
    if main == "input_ids":
        ids = torch.zeros(2, 7, dtype=torch.long)
        inputs = {"input_ids": ids}
        if "attention_mask" in names:
            inputs["attention_mask"] = torch.ones_like(ids)
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = torch.zeros(2, 5, dtype=torch.long)
        return inputs
    size = getattr(config, "image_size", None)
    if main == "pixel_values" and size is not None:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {main: torch.zeros(2, getattr(config, "num_channels", 3), height, width)}
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping) and main in dummy:
        return dict(dummy)
    raise ValueError(
        f"example_inputs: needed for {type(model).__name__}, whose main input {main!r} "
        "can't be derived"
    )
