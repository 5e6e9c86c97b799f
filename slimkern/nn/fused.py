"""The fused state: modules that compute a whole block in one call, from packed weights.

A fused module is the very object that was there: its class is replaced by one derived from it, so
that parameters, submodules, names in the state dict, hooks and ``isinstance`` stay. It computes in
evaluation mode, without gradients, on the CPU or a GPU; a call that it can't serve raises, and the
message names ``slimkern.unfuse_``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimkern.discovery.block import FOREIGN_ARGUMENTS
from slimkern.nn.packs import OPS, Packs
from slimkern.ops import common_slice

UNFUSE = "slimkern.unfuse_(model) gives back the plain module"
_PER_QUERY = (
    "the attention mask is not the same for every query and head; fused modules take one of keys "
    f"alone ([batch, 1, 1, tokens], or equal rows). {UNFUSE}"
)
PER_SEQUENCE = (
    f"the position bias is not the same for every sequence, as fused modules need it. {UNFUSE}"
)


def keys_of(mask: Tensor) -> Tensor:
    """A mask of four dimensions, [B or 1, heads or 1, T or 1, T], as [B or 1, 1, 1, T].

    Raises:
        ValueError: another shape, or queries or heads that see different keys.
        TypeError: neither bool nor floating.
    """
    if mask.dim() != 4:
        raise ValueError(
            f"the attention mask has shape {tuple(mask.shape)}; fused modules accept "
            f"[batch, 1, tokens or 1, tokens]. {UNFUSE}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"the attention mask has dtype {mask.dtype}; fused modules accept bool and floating. "
            f"{UNFUSE}"
        )
    for dim in (1, 2):
        mask = common_slice(mask, dim, _PER_QUERY)
    return mask


_CALLS: dict[str, type[FusedModule]] = {}


class FusedModule(nn.Module):
    """What all fused modules share. ``fused_from`` is the class that was replaced.

    Attributes:
        packs: of a block; what is not packed has none.
        keeps_name: the class that is made has name and module of the one that is replaced:
            transformers writes them into configurations, and looks up by them what to record.
    """

    fused_from: type[nn.Module]
    call: str
    keeps_name = False
    packs: Packs

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "call" in vars(cls):  # not a class that is made of one of these
            _CALLS[cls.call] = cls

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time: copies and pickles make it again from its parts."""
        parts: Any = super().__reduce_ex__(protocol)
        return (_revive, (self.fused_from, self.call), *parts[2:])

    def _refuse(self, given: dict[str, Any]) -> None:
        """Raise where a call asks for what this module can't give."""
        if self.training:
            raise RuntimeError(
                f"{type(self).__name__} is in training mode and has no gradient: call "
                f"model.eval() for inference; to train, {UNFUSE}"
            )
        for name in given:
            if name in FOREIGN_ARGUMENTS and given[name] is not None and given[name] is not False:
                what = "attention maps" if name == "output_attentions" else name
                raise RuntimeError(
                    f"{type(self).__name__} has no {what} ({name} is given). {UNFUSE}"
                )

    def _pack(self) -> Any:
        """The packed weights of now. A compiled graph reads those that were there: parameters that
        change later are noticed by the next call outside of it."""
        if torch.compiler.is_compiling():
            packed = self.packs.packed
            if packed is None:
                raise RuntimeError("a fused module has no pack yet: call it once before compiling")
            return packed
        return self.packs.fresh(self)

    def _attend(self, x: Tensor, mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """The block on x [B, T, hidden], a mask of four dimensions, a bias [B or 1, h, T, T]."""
        packed = self._pack()
        if mask is not None:
            mask = keys_of(mask)[:, 0, 0]
            if mask.shape[0] != x.shape[0]:
                mask = mask.expand(x.shape[0], -1)
        if bias is not None:
            bias = common_slice(bias, 0, PER_SEQUENCE)[0]
        return OPS[self.packs.block.kind](x, packed, mask, bias)


class BertLayer(FusedModule):
    """BERT, RoBERTa, XLM-R, ELECTRA: returns the hidden states."""

    call = "bert_layer"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """[B, T, hidden] -> [B, T, hidden]; zeros behind the last key that the mask keeps."""
        if encoder_hidden_states is not None or past_key_values is not None:
            kwargs["encoder_hidden_states"] = encoder_hidden_states
            kwargs["past_key_values"] = past_key_values
        self._refuse(kwargs)
        return self._attend(hidden_states, attention_mask)


class BertAttention(BertLayer):
    """Attention of the same families: returns hidden states and no attention map."""

    call = "bert_attention"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's, in a tuple."""
        return super().forward(*args, **kwargs), None


class DistilBertLayer(FusedModule):
    """DistilBERT: returns the hidden states."""

    call = "distilbert_layer"

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """[B, T, hidden] -> [B, T, hidden]; zeros behind the last key that the mask keeps."""
        self._refuse(kwargs)
        return self._attend(hidden_states, attention_mask)


class DistilBertAttention(DistilBertLayer):
    """DistilBERT's attention: returns hidden states and no attention map."""

    call = "distilbert_attention"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's, in a tuple."""
        return super().forward(*args, **kwargs), None


class MPNetLayer(FusedModule):
    """MPNet, layer or attention: returns a tuple of the hidden states alone."""

    call = "mpnet_layer"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor]:
        """[B, T, hidden] -> [B, T, hidden]; zeros behind the last key that the mask keeps."""
        if output_attentions:
            kwargs["output_attentions"] = True
        self._refuse(kwargs)
        return (self._attend(hidden_states, attention_mask, position_bias),)


class MPNetAttention(MPNetLayer):
    """MPNet's attention, called as its layer."""

    call = "mpnet_attention"


class Ffn(FusedModule):
    """An FFN of any module that is called with one tensor."""

    call = "ffn"

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        self._refuse({})
        return OPS["ffn"](x, self._pack())


_CLASSES: dict[tuple[type[nn.Module], str], type[FusedModule]] = {}


def fused_class(base: type[nn.Module], call: str) -> type[FusedModule]:
    """``FusedBertLayer``, derived from ``BertLayer``: one class for each that is replaced."""
    if (base, call) not in _CLASSES:
        names = {"fused_from": base, "__module__": __name__, "__doc__": f"{base.__name__}, fused."}
        name = f"Fused{base.__name__}"
        if _CALLS[call].keeps_name:
            name = base.__name__
            names |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
        made = type(name, (_CALLS[call], base), names)
        _CLASSES.setdefault((base, call), made)  # of two threads' classes, one is used
    return _CLASSES[base, call]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, or that which it had before it was fused."""
    return module.fused_from if isinstance(module, FusedModule) else type(module)


def _revive(base: type[nn.Module], call: str) -> FusedModule:
    kind = fused_class(base, call)
    return kind.__new__(kind)


def install(module: nn.Module, call: str, packs: Packs | None) -> None:
    """Make a module a fused one, in place. Nothing in it can fail."""
    module.__class__ = fused_class(type(module), call)
    if packs is not None:
        module.packs = packs  # type: ignore[assignment]


def release(module: FusedModule) -> nn.Module:
    """The inverse of :func:`install`: the plain module, parameters untouched."""
    vars(module).pop("packs", None)
    module.__class__ = module.fused_from  # type: ignore[assignment]
    return module
