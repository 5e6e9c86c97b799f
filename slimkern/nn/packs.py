"""The packed weights of one fused module, and when they have to be made again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from slimkern.discovery.block import AttentionPart, Block, FfnPart, NormPart
from slimkern.ops import (
    AttentionWeights,
    EncoderLayerWeights,
    FfnWeights,
    LinearWeights,
    NormWeights,
    Packed,
    attention_block,
    choose_math,
    encoder_layer,
    ffn,
    pack_attention_block,
    pack_encoder_layer,
    pack_ffn,
)
from slimkern.ops._native import isa as current_isa
from slimkern.ops._packed import HARDWARE, PACKED_BACKENDS

Weights = EncoderLayerWeights | AttentionWeights | FfnWeights

OPS: dict[str, Callable[..., Tensor]] = {
    "encoder_layer": encoder_layer,
    "attention_block": attention_block,
    "ffn": ffn,
}
_PACKERS: dict[str, Callable[..., Packed]] = {
    "encoder_layer": pack_encoder_layer,
    "attention_block": pack_attention_block,
    "ffn": pack_ffn,
}
_version = attrgetter("_version")
_address = Tensor.data_ptr


def weights_of(module: nn.Module, block: Block) -> Any:
    """The weights of a block, as the ops' references and packs take them; nothing is copied."""
    attention = None if block.attention is None else _attention(module, block.attention)
    forward = None if block.ffn is None else _ffn(module, block.ffn)
    if attention is not None and forward is not None:
        return EncoderLayerWeights(attention, forward)
    return attention if forward is None else forward


def _plain(module: nn.Module, name: str, *kinds: type[nn.Module]) -> Any:
    """A part that computes what its parameters say, and nothing else.

    Raises:
        TypeError: another module has taken its place: an adapter's, a quantised one.
    """
    part = module.get_submodule(name)
    if type(part) not in kinds:
        accepted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} is now {type(part).__name__}; accepted: {accepted}")
    return part


def _linear(module: nn.Module, name: str) -> LinearWeights:
    linear = _plain(module, name, nn.Linear)
    return LinearWeights(linear.weight, linear.bias)


def _norm(module: nn.Module, part: NormPart | None) -> NormWeights | None:
    if part is None:
        return None
    norm = _plain(module, part.name, nn.LayerNorm, nn.RMSNorm)
    return NormWeights(norm.weight, getattr(norm, "bias", None), part.eps, part.kind)


def _attention(module: nn.Module, part: AttentionPart) -> AttentionWeights:
    query, key, value, output = (
        _linear(module, name) for name in (part.query, part.key, part.value, part.output)
    )
    return AttentionWeights(
        query, key, value, output, part.head_dim, part.scale,
        post=_norm(module, part.post), residual=part.residual,
    )  # fmt: skip


def _ffn(module: nn.Module, part: FfnPart) -> FfnWeights:
    up = None if part.up is None else _linear(module, part.up)
    return FfnWeights(
        _linear(module, part.fc1), _linear(module, part.fc2), up, part.activation,
        _norm(module, part.pre), _norm(module, part.post), part.residual,
    )  # fmt: skip


class _Made:
    """A pack, and the modules and parameters that it was made of as they were then.

    What it was made of has changed when another object holds a place, when a parameter's memory is
    another (``.to``, ``.data =``), or when torch counts a write to it (an optimizer's step,
    ``load_state_dict``). Not counted, by torch either, are writes through ``.data``, and those to
    parameters that were made under ``torch.inference_mode``.
    """

    __slots__ = ("addresses", "held", "isa", "packed", "parameters", "versions")

    def __init__(self, module: nn.Module, block: Block, precision: str) -> None:
        self.isa = current_isa()
        weights = weights_of(module, block)
        places = _modules_down_to(module, (*block.linears(), *block.norms()))
        for part in [store[key] for store, key in places]:
            places += [(part._parameters, key) for key in part._parameters]
        self.held = tuple((store, key, store[key]) for store, key in places)
        self.parameters = tuple(o for _, _, o in self.held if isinstance(o, Tensor))
        counted = not any(p.is_inference() for p in self.parameters)
        self.versions = list(map(_version, self.parameters)) if counted else None
        self.addresses = list(map(_address, self.parameters))
        first = self.parameters[0]
        backend = PACKED_BACKENDS.choose(None, first.device)
        math = choose_math(first.dtype, precision, HARDWARE[backend])
        self.packed = _PACKERS[block.kind](weights, math=math, backend=backend)

    def holds(self) -> bool:
        """Whether the parameters and the kernels in use are those of the pack."""
        try:
            for store, key, held in self.held:
                if store[key] is not held:
                    return False
        except KeyError:  # a parametrization keeps its parameter elsewhere
            return False
        return (
            (self.versions is None or list(map(_version, self.parameters)) == self.versions)
            and list(map(_address, self.parameters)) == self.addresses
            and self.isa == current_isa()
        )


def _modules_down_to(module: nn.Module, names: Iterable[str]) -> list[tuple[Any, str]]:
    """Where the submodules on the way to ``names`` are held: the parent's store, and the key."""
    found: dict[str, tuple[Any, str]] = {}
    for name in names:
        owner, path = module, ""
        for key in name.split("."):
            path = f"{path}.{key}"
            found[path] = (owner._modules, key)
            owner = getattr(owner, key)
    return list(found.values())


class Packs:
    """The pack of a fused module: made once, and again after its parameters have changed.

    A pack is never written to, so that threads may use it at the same time; where two find at once
    that it is stale, both make one, and one of them stays. Copies and pickles have no pack: it is
    made when they are first called.

    Attributes:
        block: what is packed; its name is that in the model.
        precision: ``highest``, ``high`` or ``medium``.
    """

    __slots__ = ("_made", "block", "precision")

    def __init__(self, block: Block, precision: str) -> None:
        self.block, self.precision = block, precision
        self._made: _Made | None = None

    def __getstate__(self) -> tuple[Block, str]:
        return self.block, self.precision

    def __setstate__(self, state: tuple[Block, str]) -> None:
        self.block, self.precision = state
        self._made = None

    @property
    def packed(self) -> Packed | None:
        """The pack as it was last made, stale or not."""
        return None if self._made is None else self._made.packed

    def fresh(self, module: nn.Module) -> Packed:
        """The pack of the parameters as they are now.

        Raises:
            RuntimeError: they can't be packed: on no one device that has kernels, another dtype.
        """
        made = self._made
        if made is None or not made.holds():
            made = self._made = self._make(module)
        return made.packed

    def _make(self, module: nn.Module) -> _Made:
        try:
            with torch.inference_mode(False), torch.no_grad():
                return _Made(module, self.block, self.precision)
        except (TypeError, ValueError) as error:
            raise RuntimeError(
                f"{self.block.name or 'the model'} is fused, and its weights can't be packed any "
                f"more: {error}. slimkern.unfuse_(model) gives back the plain module"
            ) from error
