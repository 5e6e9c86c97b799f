"""The processes that train one model together: what they agree on, what they add up.

Where ``torch.distributed`` is not initialised, or a process is alone in its group, everything here
returns at once. Messages are text and numbers; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_SHOWN = 300  # characters of a value in an error message


@dataclass(frozen=True)
class Ranks:
    """The processes of a group, seen from one of them. What is called on one is called on all.

    Attributes:
        group: the process group; ``None`` where the process is alone.
        rank: this process's place in it.
        size: how many they are.
    """

    group: Any = None
    rank: int = 0
    size: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is no other process to agree with."""
        return self.size == 1

    def together(self, doing: str) -> Together:
        """A context whose end is an error on every rank where it is one on any.

        Nothing in it may wait for other ranks where it can fail on one alone.

        Args:
            doing: what is done in it, for the error on the other ranks.
        """
        return Together(self, doing)

    def agree(self, what: str, values: Mapping[str, Any]) -> None:
        """Hold values that must be the same on every rank against each other.

        Args:
            what: what they describe, for the message.
            values: name -> anything whose ``str`` tells it apart.

        Raises:
            RuntimeError: they differ; on every rank, naming the values and the ranks.
        """
        if self.alone:
            return
        told = {name: str(value) for name, value in values.items()}
        text = json.dumps(told, sort_keys=True)
        if len(set(self._gather(hashlib.sha256(text.encode()).digest()))) == 1:
            return
        first, *others = (json.loads(t) for t in self._gather(text.encode()))
        lines = [
            f"  {name}: {_short(first.get(name), other.get(name))} (ranks 0 and {rank})"
            for rank, other in enumerate(others, 1)
            for name in sorted({*first, *other})
            if first.get(name) != other.get(name)
        ]
        raise RuntimeError("\n".join([f"the ranks disagree on {what}:", *lines[:8]]))

    @torch.no_grad()
    def mean(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over the ranks of tensors of the same names and shapes, in one message.

        Every rank gets the same bits: the sum is made once, and dealt out.
        """
        if self.alone or not tensors:
            return dict(tensors)
        device = message_device(self.group, next(iter(tensors.values())).device)
        flat = torch.cat([t.detach().float().flatten().to(device) for t in tensors.values()])
        dist.all_reduce(flat, group=self.group)
        parts = (flat / self.size).split([t.numel() for t in tensors.values()])
        named = zip(tensors.items(), parts)
        return {n: part.view(t.shape).to(t.device, t.dtype) for (n, t), part in named}

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank."""
        if self.alone:
            return flag
        count = torch.tensor(int(flag), device=message_device(self.group))
        dist.all_reduce(count, group=self.group)
        return bool(count)

    def first(self, text: str) -> str:
        """The text that rank 0 gave."""
        return (
            text
            if self.alone
            else self._gather(text.encode() if not self.rank else b"")[0].decode()
        )

    @torch.no_grad()
    def spread_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with rank 0's, of the same shapes and dtypes."""
        if self.alone:
            return
        source = dist.get_global_rank(self.group, 0)
        for tensor in tensors:
            sent = tensor.to(message_device(self.group, tensor.device)).contiguous()
            dist.broadcast(sent, source, group=self.group)
            if sent is not tensor:
                tensor.copy_(sent)

    def _gather(self, message: bytes) -> list[bytes]:
        """Every rank's message, in the order of ranks."""
        device = message_device(self.group)
        size = torch.tensor([len(message)], device=device)
        sizes = [torch.zeros_like(size) for _ in range(self.size)]
        dist.all_gather(sizes, size, group=self.group)
        lengths = [int(s) for s in sizes]
        own = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        own[: len(message)] = torch.tensor(list(message), dtype=torch.uint8)
        own = own.to(device)
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own, group=self.group)
        return [bytes(m[:n].tolist()) for m, n in zip(every, lengths)]


class Together:
    """What :meth:`Ranks.together` returns."""

    def __init__(self, ranks: Ranks, doing: str) -> None:
        self.ranks, self.doing = ranks, doing

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tell the other ranks of an error here, and raise for one of theirs.

        Raises:
            RuntimeError: another rank had an error.
        """
        # An interrupt ends this process, and a failed message leaves nobody to tell.
        if self.ranks.alone or (kind is not None and not _can_be_told(kind)):
            return
        if not self.ranks.any(error is not None):
            return
        told = "" if kind is None else f"{kind.__name__}: {error}"
        every = self.ranks._gather(told.encode())
        if error is None:
            rank = next(r for r, text in enumerate(every) if text)
            raise RuntimeError(f"{self.doing} failed on rank {rank}: {every[rank].decode()}")


def ranks_of(group: Any = None) -> Ranks:
    """The processes of ``group``, by default all there are.

    Raises:
        ValueError: a group is given and ``torch.distributed`` is not initialised, or this process
            is not in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError("process_group= is given, but torch.distributed is not initialised")
        return Ranks()
    group = dist.group.WORLD if group is None else group
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("process_group= is a group that this process is not in")
    return Ranks(group, rank, size)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel`` and what ``torch.compile`` returned.

    Raises:
        ValueError: it is wrapped by FSDP1, whose parameters are no longer those of layers.
    """
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif any(c.__name__ == "FullyShardedDataParallel" for c in type(model).__mro__):
            raise ValueError(
                "the model is wrapped in FullyShardedDataParallel, which flattens the parameters "
                "of its layers: use torch.distributed.fsdp.fully_shard (FSDP2), or "
                "DistributedDataParallel"
            )
        else:
            return model


def wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` around a model, itself perhaps compiled; or ``None``."""
    while "_orig_mod" in model._modules:
        model = model._modules["_orig_mod"]  # type: ignore[assignment]
    return model if isinstance(model, DistributedDataParallel) else None


def retire_(wrapper: DistributedDataParallel) -> None:
    """Let a wrapper raise when it is called: its buckets are of weights that are gone."""

    def refuse(module: nn.Module, args: Any) -> None:
        raise RuntimeError(
            "this DistributedDataParallel would reduce gradients of weights that the model no "
            "longer has: it was slimmed. Wrap what model_slim returned anew"
        )

    wrapper.register_forward_pre_hook(refuse)


def _can_be_told(kind: type[BaseException]) -> bool:
    return issubclass(kind, Exception) and not issubclass(kind, dist.DistError)


def message_device(group: Any, wanted: torch.device | None = None) -> torch.device:
    """Where a message of a group may lie: ``wanted`` if a backend serves it, or the CPU, or the
    accelerator in use (NCCL has no other)."""
    served = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    if wanted is not None and wanted.type in served:
        return wanted
    if "cpu" in served:
        return torch.device("cpu")
    return torch.device(served[0], torch.get_device_module(served[0]).current_device())


def _short(first: str | None, other: str | None) -> str:
    """Two texts from the place on where they differ."""
    a, b = first or "", other or ""
    start = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    start = max(0, start - _SHOWN // 4)
    parts = (repr(("..." if start else "") + t[start : start + _SHOWN]) for t in (a, b))
    return " and ".join(parts)
