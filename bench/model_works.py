"""Works of levels layer and model: encoder layers and whole encoders, dense and slim."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from bench import counts
from bench.check import seed_of
from bench.modules import Encoder, Layer, bert_config, random_encoder, randomize, trained_encoder
from bench.op_works import attended, lengths, normal, right_padding
from bench.slims import SlimBuild
from bench.work import Work

Shape = tuple[int, int]
SHAPES: tuple[Shape, ...] = ((8, 128), (32, 32), (1, 128), (1, 16))


@dataclass(frozen=True)
class Size:
    """An encoder's sizes; ``trained`` has the weights of all-MiniLM-L6-v2."""

    name: str
    H: int
    heads: int
    width: int
    layers: int
    vocabulary: int = 30522
    trained: bool = False


MINILM = Size("MiniLM-L6", 384, 12, 1536, 6, trained=True)
BGE_SMALL = Size("bge-small shape", 384, 12, 1536, 12)
BGE_BASE = Size("bge-base shape", 768, 12, 3072, 12)
TINY = Size("tiny", 39, 3, 77, 2, vocabulary=101)

# Widths of twelve layers as a budget over a whole model leaves them; the totals are those of 320
# channels and 5 heads in each.
UNEVEN_FFN = (301, 448, 352, 403, 512, 371, 320, 289, 256, 231, 196, 161)
UNEVEN_HEADS = (4, 7, 6, 7, 8, 6, 5, 5, 4, 3, 3, 2)


@dataclass(frozen=True)
class Cut:
    """What a slim variant of an encoder keeps, per layer; ``name`` follows the size's."""

    name: str
    ffn: tuple[int, ...]
    heads: tuple[int, ...]


def even(name: str, size: Size, ffn: int, heads: int) -> Cut:
    """The same widths in every layer."""
    return Cut(name, (ffn,) * size.layers, (heads,) * size.layers)


def layer_works(smoke: bool) -> list[Work]:
    """One encoder layer, dense and slim."""
    if smoke:
        return layer_at(TINY, None, ((3, 9),), smoke=True)
    works = layer_at(BGE_SMALL, None, SHAPES)
    return works + layer_at(BGE_SMALL, (320, 5), SHAPES)


def model_works(smoke: bool) -> list[Work]:
    """Whole encoders."""
    if smoke:
        works = model_at(TINY, None, ((3, 9),), smoke=True)
        return works + model_at(TINY, Cut("slim", (31, 17), (1, 2)), ((3, 9),), smoke=True)
    short: tuple[Shape, ...] = ((8, 128), (1, 16))
    works = []
    for cut in (None, even("slim", MINILM, 320, 5)):
        works += model_at(MINILM, cut, SHAPES, compiled=short, padded=((8, 128),))
    slim = even("slim", BGE_SMALL, 320, 5)
    works += model_at(BGE_SMALL, None, SHAPES)
    works += model_at(BGE_SMALL, slim, SHAPES, compiled=((8, 128),))
    works += model_at(BGE_SMALL, even("slim 308", BGE_SMALL, 308, 5), SHAPES)
    works += model_at(BGE_SMALL, Cut("slim uneven", UNEVEN_FFN, UNEVEN_HEADS), SHAPES)
    for cut in (None, even("slim", BGE_BASE, 640, 5)):
        works += model_at(BGE_BASE, cut, ((8, 128), (1, 128)))
    return works


def _build_layer(size: Size) -> nn.Module:
    return randomize(Layer(size.H, size.heads, size.width))


def _hidden(batch: int, tokens: int, H: int) -> tuple[Tensor, ...]:
    return (normal("layer", batch, tokens, H),)


def layer_at(
    size: Size, kept: tuple[int, int] | None, shapes: tuple[Shape, ...], smoke: bool = False
) -> list[Work]:
    """A layer of ``size``, or cut to (FFN width, heads), without padding."""
    build: Callable[[], nn.Module] = partial(_build_layer, size)
    width, heads = kept or (size.width, size.heads)
    cut = kept and SlimBuild(build, partial(_hidden, 2, 8, size.H), (width,), (heads,))
    whole = layer_at(size, None, shapes, smoke) if cut else [None] * len(shapes)
    works = []
    for (B, T), before in zip(shapes, whole):
        count = counts.layer(B, T, size.H, heads, size.H // size.heads, width)
        works.append(
            Work(
                level="layer",
                name=f"layer {size.H}, FFN {width}, {heads} heads" + (" slim" if cut else ""),
                shape=f"{B}x{T}",
                build=cut or build,
                inputs=partial(_hidden, B, T, size.H),
                **counts.figures(count, 2 * B * T * size.H),
                compiled=(B, T) == (8, 128),
                smoke=smoke,
                tags=frozenset({"layer", *(("slim",) if cut else ())}),
                dense=build if cut else None,
                plan=cut.plan if cut else None,
                before=before,
            )
        )
    return works


@lru_cache(maxsize=1)
def _pristine(size: Size) -> Encoder:
    """The dense encoder that copies are made of; weights are read or drawn once."""
    if not size.trained:
        config = bert_config(size.H, size.heads, size.width, size.layers, size.vocabulary)
        return random_encoder(config)
    from slimkern.cli.fetch import fetch_demo_files

    return trained_encoder(str(fetch_demo_files().model_dir))


def _build_model(size: Size) -> nn.Module:
    return copy.deepcopy(_pristine(size))


def _tokens(size: Size, padded: bool, batch: int, tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed_of(f"{size.name} {batch}x{tokens}"))
    low = min(1000, size.vocabulary // 2)  # below are padding, unused and special tokens
    ids = torch.randint(low, size.vocabulary, (batch, tokens), generator=generator)
    mask = right_padding(batch, tokens) if padded else torch.ones_like(ids)
    return ids * mask, mask


def model_at(
    size: Size,
    cut: Cut | None,
    shapes: tuple[Shape, ...],
    compiled: tuple[Shape, ...] = (),
    padded: tuple[Shape, ...] = (),
    smoke: bool = False,
) -> list[Work]:
    """An encoder of ``size``, or cut; ``padded`` shapes have sentences of several lengths."""
    build: Callable[[], nn.Module] = partial(_build_model, size)
    made = cut and SlimBuild(build, partial(_tokens, size, False, 2, 8), cut.ffn, cut.heads)
    kept = cut or even("dense", size, size.width, size.heads)
    places = [*((False, s) for s in shapes), *((True, s) for s in padded)]
    whole = model_at(size, None, shapes, padded=padded) if cut else [None] * len(places)
    return [
        Work(
            level="model",
            name=f"{size.name} {kept.name}",
            shape=f"{B}x{T}" + pad * " padded",
            build=made or build,
            inputs=partial(_tokens, size, pad, B, T),
            **_model_figures(size, kept, B, T, pad),
            compiled=(B, T) in compiled and not pad,
            smoke=smoke,
            tags=frozenset({"model", *(("slim",) if made else ()), *(("padded",) if pad else ())}),
            dense=build if made else None,
            plan=made.plan if made else None,
            before=before,
            attended=partial(attended, B, T) if pad else None,
        )
        for (pad, (B, T)), before in zip(places, whole)
    ]


def _model_figures(size: Size, kept: Cut, B: int, T: int, pad: bool) -> dict[str, float | int]:
    def of(batch: int, tokens: int) -> counts.Count:
        count = counts.embeddings(batch, tokens, size.H)
        for width, heads in zip(kept.ffn, kept.heads):
            count += counts.layer(batch, tokens, size.H, heads, size.H // size.heads, width)
        return count

    count = counts.unpadded(of(B, T), of, lengths(B, T)) if pad else of(B, T)
    return counts.figures(count, B * T * (size.H + 2))
