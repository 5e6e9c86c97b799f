"""What masked blocks share: attention and FFN in few passes, on the kept units alone.

A masked block is the very object that was there: its class is replaced by one derived from it, so
that parameters, submodules, names in the state dict, hooks on it and ``isinstance`` stay. Inside
are the masked linears, which hold what is kept. Where a call asks for something that the block
does not compute (attention maps, a cache), or a module inside has a hook, the class that was there
computes it, linear by linear; :meth:`MaskedBlock.aside` says so.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as _module

from slimkern.discovery.block import (
    ATTENTIONS,
    FOREIGN_ARGUMENTS,
    AttentionPart,
    Block,
    FfnPart,
    NormPart,
)
from slimkern.nn.masked import MaskedLinear
from slimkern.ops._weights import AttentionWeights, FfnWeights, LinearWeights, NormWeights
from slimkern.ops.masked_attention import Kept, masked_attention
from slimkern.ops.masked_ffn import masked_ffn

Drops = tuple[str | None, str | None, str | None]
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
    "_global_backward_pre_hooks",
)  # fmt: skip


# call -> the class of its blocks; each kind enters itself.
KINDS: dict[str, type[MaskedBlock]] = {}


class MaskedBlock(nn.Module):
    """What all masked blocks share.

    Attributes:
        masked_from: the class that was replaced.
        call: how its forward is called, as `slimkern.discovery.block.Block` has it.
        drops: names of the dropouts of attention weights, after the attention, after the FFN.
        masked_block: what it is made of.
    """

    masked_from: type[nn.Module]
    call: str
    drops: Drops = (None, None, None)
    masked_block: Block

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "call" in vars(cls):  # not the classes made at run time, fully_shard's among them
            KINDS[cls.call] = cls

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time: copies and pickles make it again from its parts."""
        parts: Any = super().__reduce_ex__(protocol)
        return (_revive, (self.masked_from, self.call), *parts[2:])

    def aside(self) -> str | None:
        """Why the plain forward would compute the next call, or None where the block does."""
        if any(getattr(_module, name) for name in _GLOBAL_HOOKS):
            return "hooks are registered for all modules"
        block = self.masked_block
        for name in block.linears():
            part = self.get_submodule(name)
            if type(part) not in (nn.Linear, MaskedLinear) or "weight" not in part._parameters:
                return f"{name} is no plain linear any more"
        dtype = self.get_submodule(block.linears()[0]).weight.dtype
        for name in block.norms():
            norm = self.get_submodule(name)
            if type(norm) not in (nn.LayerNorm, nn.RMSNorm):
                return f"{name} is no plain norm any more"
            if norm.weight is not None and norm.weight.dtype != dtype:
                return f"{name} has another dtype than the linears"
        for name in filter(None, self.drops):
            if type(self.get_submodule(name)) not in (nn.Dropout, nn.Identity):
                return f"{name} is no plain dropout"
        config = self._config()
        if getattr(config, "output_attentions", False):
            return "attention maps are asked for"
        attention = getattr(config, "_attn_implementation", None)
        if block.attention is not None and attention not in (None, *ATTENTIONS):
            return f"its attention implementation is {attention!r} now"
        return _hooked(self, "")

    def _config(self) -> Any:
        return None

    def _takes(self, given: dict[str, Any], mask: Tensor | None = None) -> bool:
        """Whether the block computes a call with these arguments, and this attention mask."""
        for name in given:
            if name in FOREIGN_ARGUMENTS and given[name] is not None and given[name] is not False:
                return False
        if self.aside() is not None:
            return False
        # Flash attention has masks of tokens, flex attention some that are no tensors.
        return mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)

    def _drop(self, which: int) -> float:
        """The probability of one of ``drops``, as it is now."""
        name = self.drops[which]
        if name is None:
            return 0.0
        dropout = self.get_submodule(name)
        return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _linear(self, name: str) -> LinearWeights:
        linear: Any = self.get_submodule(name)
        return LinearWeights(linear.weight, linear.bias)

    def _norm(self, part: NormPart | None) -> NormWeights | None:
        if part is None:
            return None
        norm: Any = self.get_submodule(part.name)
        return NormWeights(norm.weight, getattr(norm, "bias", None), norm.eps, part.kind)

    def _kept(self, name: str, side: str) -> Tensor | None:
        kept: Tensor | None = getattr(self.get_submodule(name), side, None)
        return kept

    def _attend(self, x: Tensor, mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """Attention on x [B, T, hidden]; ``mask`` of four dimensions, ``bias`` per head."""
        part = self.masked_block.attention
        assert part is not None
        kept = self._kept_heads(part)
        if bias is not None:
            if kept.output is not None and bias.shape[1] > 1:
                heads = kept.output[:: part.head_dim] // part.head_dim
                bias = bias.index_select(1, heads)
            mask = bias if mask is None else bias + mask
        weights = AttentionWeights(
            self._linear(part.query), self._linear(part.key), self._linear(part.value),
            self._linear(part.output), part.head_dim, part.scale, post=self._norm(part.post),
            residual=part.residual,
        )  # fmt: skip
        return masked_attention(
            x, weights, kept, mask, attention_dropout=self._drop(0), dropout=self._drop(1),
            backend=getattr(self.get_submodule(part.output), "backend", None),
        )  # fmt: skip

    def _kept_heads(self, part: AttentionPart) -> Kept:
        cols = self._kept(part.output, "cols")
        if cols is not None and getattr(self.get_submodule(part.output), "gather", False):
            return Kept(cols, cols, cols, cols)  # what lies between is taken care of here
        query, key, value = (self._kept(n, "rows") for n in (part.query, part.key, part.value))
        return Kept(query, key, value, cols)

    def _feed(self, x: Tensor, part: FfnPart, drop: float) -> Tensor:
        """The FFN on x [..., hidden]."""
        keep = self._kept(part.fc2, "cols")
        post = self._norm(part.post)
        whole = post is not None and post.kind == "layer" and part.residual
        whole = whole and post is not None and post.weight is not None and post.bias is not None
        weights = FfnWeights(
            self._linear(part.fc1), self._linear(part.fc2), activation=part.activation,
            post=post if whole else None, residual=part.residual and part.pre is None,
        )  # fmt: skip
        inner = x if part.pre is None else self.get_submodule(part.pre.name)(x)
        backend = getattr(self.get_submodule(part.fc2), "backend", None)
        y = masked_ffn(inner, weights, keep, dropout=drop, backend=backend)
        if part.residual and part.pre is not None:
            y = x + y
        if part.post is not None and not whole:
            y = self.get_submodule(part.post.name)(y)
        return y


def _hooked(module: nn.Module, prefix: str) -> str | None:
    """Which module inside has a hook, or a forward of its own; None: none has."""
    for key, child in module._modules.items():
        if child is None:
            continue
        name = f"{prefix}.{key}" if prefix else key
        if "forward" in child.__dict__:
            return f"the forward of {name} was replaced on the object"
        for kind in _HOOKS:
            if any(not _is_silent(hook) for hook in getattr(child, kind).values()):
                return f"{name} has a hook"
        found = _hooked(child, name)
        if found is not None:
            return found
    return None


def _is_silent(hook: Any) -> bool:
    """Whether it is a hook of transformers, which records attention maps where they are asked for:
    the plain forward makes them then."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


_CLASSES: dict[tuple[type[nn.Module], str], type[MaskedBlock]] = {}


def masked_class(base: type[nn.Module], call: str) -> type[MaskedBlock]:
    """``MaskedBertLayer``, derived from ``BertLayer``: one class for each that is replaced."""
    names = {"masked_from": base, "__module__": __name__, "__doc__": f"{base.__name__}, masked."}
    if (base, call) not in _CLASSES:
        made = type(f"Masked{base.__name__}", (KINDS[call], base), names)
        _CLASSES.setdefault((base, call), made)  # of two threads' classes, one is used
    return _CLASSES[base, call]


def _revive(base: type[nn.Module], call: str) -> MaskedBlock:
    kind = masked_class(base, call)
    return kind.__new__(kind)


def install_block(module: nn.Module, block: Block) -> None:
    """Make a module a masked block, in place. Nothing in it can fail."""
    module.__class__ = masked_class(type(module), block.call)
    module.masked_block = block  # type: ignore[assignment]


def release_block(module: MaskedBlock) -> nn.Module:
    """The inverse of :func:`install_block`: the plain module, parameters untouched."""
    vars(module).pop("masked_block", None)
    module.__class__ = module.masked_from  # type: ignore[assignment]
    return module


def release_unmasked_blocks(model: nn.Module) -> None:
    """Blocks in which no linear is masked any more become plain modules."""
    for block in [m for m in model.modules() if isinstance(m, MaskedBlock)]:
        # A class that fully_shard made of a block's is kept: it computes densely what is dense.
        if "masked_from" not in vars(type(block)):
            continue
        if not any(isinstance(m, MaskedLinear) for m in block.modules()):
            release_block(block)
