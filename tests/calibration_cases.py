"""What the tests of calibration share: batches of several shapes, and awkward models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tiny_models import FAMILIES, VOCAB, randomize
from torch import Tensor, nn

from slimkern import discover
from slimkern.calibration.batches import Batch, read_batches
from slimkern.calibration.record import record

ENCODERS = [*FAMILIES, "torch"]


def texts(
    shapes: Iterable[tuple[int, int]] = ((3, 9), (2, 6), (4, 11)),
    side: str = "right",
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Token ids and masks, with padding on one side."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for rows, length in shapes:
        ids = torch.randint(2, VOCAB, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(rows):
            padding = slice(length - row, None) if side == "right" else slice(0, row)
            mask[row, padding] = 0
        ids = ids.where(mask.bool(), torch.ones_like(ids))
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def vectors(rows: int = 200, width: int = 10, count: int = 2, dtype: Any = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(rows, width, generator=generator, dtype=dtype).chunk(count))


def torch_encoder(dtype: torch.dtype = torch.float32) -> nn.Module:
    """torch's own encoder, norms first. Its attention calls no module for its projections."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, norm_first=True, batch_first=True)
    norm = nn.LayerNorm(12)
    return randomize(nn.TransformerEncoder(layer, 3, norm, enable_nested_tensor=False)).to(dtype)


def encoder(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return torch_encoder(dtype) if name == "torch" else FAMILIES[name](dtype=dtype)


def batches_of(name: str, side: str = "right") -> list[dict[str, Tensor]]:
    """Batches of three shapes, with padding."""
    made = texts(side=side)
    if name != "torch":
        return made
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "src": torch.randn(*batch["input_ids"].shape, 12, generator=generator),
            "src_key_padding_mask": batch["attention_mask"] == 0,
        }
        for batch in made
    ]


def prepared(model: nn.Module, batches: Any) -> tuple[list[Batch], list[str]]:
    """Batches as calibration holds them, and the names of the second linears in order."""
    held = read_batches(model, batches)
    names = {m.name for g in discover(model, held[0].example) for m in g.consumers}
    return held, sorted(names, key=record(model, held[0], names).position)


@torch.no_grad()
def whole(
    model: nn.Module, batches: list[Batch], sites: list[str]
) -> dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]]:
    """Input and output of every site and what the next norm gets, from whole forwards."""
    found: dict[tuple[str, int], list[Tensor]] = {}
    place = {"index": 0, "last": ""}

    def linear(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            place["last"] = name
            found[name, place["index"]] = [args[0].clone(), output.clone()]

        return hook

    def norm(module: nn.Module, args: Any) -> None:
        seen = found.get((place["last"], place["index"]))
        if seen is not None and len(seen) == 2:
            seen.append(args[0].clone())

    handles = [model.get_submodule(n).register_forward_hook(linear(n)) for n in sites]
    handles += [
        m.register_forward_pre_hook(norm) for m in model.modules() if isinstance(m, nn.LayerNorm)
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for index, batch in enumerate(batches):
        place.update(index=index, last="")
        batch.call(model)
    torch.backends.mha.set_fastpath_enabled(fast)
    for handle in handles:
        handle.remove()
    return {key: tuple(values) for key, values in found.items()}  # type: ignore[misc]


class Blocks(nn.Module):
    """``norm``, FFN and a residual, three times, as ``join`` says; every block's dropout between.

    ``join(self, x, h)`` gives the new residual stream from the old one and the FFN's output.
    """

    def __init__(self, join: Any, inplace: bool = False, hidden: int = 10, width: int = 24) -> None:
        super().__init__()
        self.join = join
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))
        self.first = nn.ModuleList(nn.Linear(hidden, width) for _ in range(3))
        self.second = nn.ModuleList(nn.Linear(width, hidden) for _ in range(3))
        self.act, self.drop = nn.ReLU(inplace=inplace), nn.Dropout(0.2, inplace=inplace)
        self.after, self.out = nn.LayerNorm(hidden), nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        for norm, first, second in zip(self.norms, self.first, self.second):
            x = norm(x)
            x = self.join(self, x, self.drop(second(self.act(first(x)))))
        return self.out(self.after(x))


def blocks(join: Any, **options: Any) -> Blocks:
    torch.manual_seed(0)
    return randomize(Blocks(join, **options))  # type: ignore[return-value]
