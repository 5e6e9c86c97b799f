"""Nested state as a pair of files, tensors in safetensors and the rest in JSON; nothing pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSOR, _PAIRS = "__tensor__", "__pairs__"


def write_state(state: Any, folder: Path, name: str) -> None:
    """Write ``state`` to ``folder/name.json`` and ``folder/name.safetensors``.

    Each file is written under another name and moved into its place; the JSON comes last and is
    what says that the state is complete.

    Args:
        state: mappings, lists, tuples, numbers, strings, ``None`` and tensors, nested at will.
            Mappings with keys that are no strings come back as they were, tuples as lists.
        folder: an existing folder.
        name: the files' common stem.

    Raises:
        TypeError: something in the state can be neither a tensor nor JSON.
    """
    tensors: dict[str, Tensor] = {}
    plain = _flatten(state, "state", tensors)
    text = json.dumps(plain, allow_nan=True)
    # Clones: safetensors refuses tensors that share memory.
    ready = {key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}
    _replace(folder / f"{name}.safetensors", lambda path: save_file(ready, path))
    _replace(folder / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))


def read_state(folder: Path, name: str) -> Any:
    """The inverse of :func:`write_state`.

    Raises:
        FileNotFoundError: one of the two files is missing; the message names it.
        ValueError: a file is damaged; the message names it.
    """
    for suffix in ("json", "safetensors"):
        if not (folder / f"{name}.{suffix}").is_file():
            raise FileNotFoundError(f"{folder / name}.{suffix} is missing: nothing to resume from")
    try:
        tensors = load_file(folder / f"{name}.safetensors")
        plain = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return _restore(plain, tensors)
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{folder / name}.* is damaged: {error!r}") from error


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) for k in value) and not {_TENSOR, _PAIRS} & set(value):
            return {k: _flatten(v, f"{path}.{k}", tensors) for k, v in value.items()}
        pairs = list(value.items())
        return {_PAIRS: [[k, _flatten(v, f"{path}.{k}", tensors)] for k, v in pairs]}
    if isinstance(value, (list, tuple)):
        return [_flatten(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}; accepted: tensors and JSON's types")


def _restore(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _PAIRS in value:
            return {k: _restore(v, tensors) for k, v in value[_PAIRS]}
        return {k: _restore(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_restore(v, tensors) for v in value]
    return value


def _replace(path: Path, write: Any) -> None:
    """Write beside ``path``, then move into place: a reader sees the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
