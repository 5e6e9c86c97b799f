"""Activations of many batches: in memory while they fit, in files of a temporary folder after."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor


class _File(NamedTuple):
    path: Path
    device: str
    orders: dict[str, list[int]]  # dimensions of each tensor, the one of the largest stride first


class Store:
    """Named tensors under keys. Used as a context manager; the files are gone at its end.

    Args:
        memory: bytes that may stay in memory.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.held = 0  # bytes in memory
        self._tensors: dict[Hashable, dict[str, Tensor]] = {}
        self._files: dict[Hashable, _File] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tensors.clear()
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors`` under ``key``, in place of what was there. They are not copied."""
        self.drop(key)
        size = _bytes(tensors)
        if self.held + size <= self.memory:
            self._tensors[key] = dict(tensors)
            self.held += size
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="slimkern-")
        self._written += 1
        path = Path(self._folder.name) / f"{self._written}.safetensors"
        orders = {name: _order(tensor) for name, tensor in tensors.items()}
        parts = {n: t.detach().permute(orders[n]).contiguous().cpu() for n, t in tensors.items()}
        # Copies, as a file holds no two tensors that lie in the same memory.
        save_file({name: tensor.clone() for name, tensor in parts.items()}, path)
        device = str(next(iter(tensors.values())).device) if tensors else "cpu"
        self._files[key] = _File(path, device, orders)

    def get(self, key: Hashable) -> dict[str, Tensor]:
        """What was put under ``key``, on the device that it was on, its dimensions in the order in
        memory that they had: what is computed from it rounds alike.

        Raises:
            KeyError: nothing was.
        """
        if key in self._tensors:
            return dict(self._tensors[key])
        file = self._files[key]
        found = load_file(file.path, device=file.device)
        # Copies, as a mapped file lies at odd addresses, for which matrix products round otherwise.
        return {
            name: tensor.clone().permute(_inverse(file.orders[name]))
            for name, tensor in found.items()
        }

    def drop(self, key: Hashable) -> None:
        """Forget what is under ``key``, if anything is."""
        if key in self._tensors:
            self.held -= _bytes(self._tensors.pop(key))
        elif key in self._files:
            self._files.pop(key).path.unlink()


def _order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=lambda dim: -tensor.stride()[dim])


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
