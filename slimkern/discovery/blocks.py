"""Which modules of a model are whole blocks, and where their parts are.

Encoder layers and attention of the families that are known by class: how their forwards are called
is written down here, one small reader per kind. FFNs by what they own: two linears, or three where
one gates, at most one norm, and a forward of one tensor. A description is a proposal: `slimkern.
fuse_` takes it only where it computes, in float64, what the module computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from slimkern.discovery.block import ATTENTIONS, AttentionPart, Block, FfnPart, NormPart

_BERTS = {"bert": "Bert", "roberta": "Roberta", "xlm_roberta": "XLMRoberta", "electra": "Electra"}


class UnfitError(Exception):
    """A module is of a known kind, but not as it can be fused; says why."""


def proposals(name: str, module: nn.Module) -> tuple[Block, ...]:
    """What a module may be as a block, the likeliest first; nothing where it is none.

    Args:
        name: the module's dotted name.
        module: is only read.

    Raises:
        UnfitError: it is of a known kind, but not as it can be fused.
    """
    kind = _qualified(type(module))
    if kind in _READERS:
        made: tuple[Block, ...] = (_READERS[kind](name, module),)
    else:
        for base in type(module).__mro__[1:]:
            if _qualified(base) in _READERS:
                raise UnfitError(
                    f"{type(module).__name__} is a class of its own, derived from {base.__name__}: "
                    "its forward may be another"
                )
        made = tuple(_ffns(name, module))
    for block in made[:1]:
        _check_parts(module, block)
    return made


def embeds_text(module: nn.Module) -> str | None:
    """How a module is called that makes hidden states of token ids; None: it is none that is known.

    Raises:
        UnfitError: it is of a known kind, but not as it can be fused.
    """
    call = _EMBEDDINGS.get(_qualified(type(module)))
    if call is None:
        return None
    own: Any = module
    tables = [m for m in module.children() if type(m) is nn.Embedding]
    if any(table.max_norm is not None for table in tables):
        raise UnfitError("an embedding has a max_norm, which changes its table on the way")
    known = len(tables) + 2  # the norm and the dropout
    if type(own.LayerNorm) is not nn.LayerNorm or own.LayerNorm.bias is None:
        raise UnfitError("LayerNorm is no plain LayerNorm with a bias")
    if len(list(module.children())) != known:
        raise UnfitError("it has parts that are not known")
    kinds = getattr(module, "token_type_ids", None)
    if kinds is not None and not kinds.is_meta and bool(kinds.any()):
        raise UnfitError("its token_type_ids are not zeros")
    _check_calls(module)
    return call


def passes_masks_on(module: nn.Module) -> str | None:
    """How a module is called that hands one attention mask to many layers; None: it is none."""
    return _STACKS.get(_qualified(type(module)))


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _check_parts(module: nn.Module, block: Block) -> None:
    """Refuse parts that are no plain modules, and code that a fused module would pass by."""
    for name in (*block.linears(), *block.norms()):
        part = module.get_submodule(name)
        allowed = (nn.Linear,) if name in block.linears() else (nn.LayerNorm, nn.RMSNorm)
        if type(part) not in allowed:
            raise UnfitError(f"{name} is no plain {allowed[0].__name__}, but {type(part).__name__}")
        for leaf in ("weight", "bias"):
            if hasattr(part, leaf) and leaf not in part._parameters:
                raise UnfitError(f"{name}.{leaf} is parametrized or no parameter")
    _check_calls(module)


def _check_calls(module: nn.Module) -> None:
    """Refuse code on the module and its parts that would not be run."""
    for name, part in module.named_modules():
        if "forward" in vars(part):
            raise UnfitError(f"the forward of {name or 'the module'} was replaced on the object")
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if name and not all(map(_is_silent, hooks)):
            raise UnfitError(f"{name} has a forward hook, which would not be called")


def _is_silent(hook: Any) -> bool:
    """Whether it is a hook of transformers, which records attention maps where they are asked for:
    they are refused then."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def _norm(name: str, module: Any) -> NormPart:
    eps = getattr(module, "eps", None)
    if eps is None:
        raise UnfitError(f"{name} is no norm with an eps")
    return NormPart(name, eps, "rms" if isinstance(module, nn.RMSNorm) else "layer")


def _not_a_decoders(module: Any) -> None:
    if getattr(module, "is_decoder", False) or getattr(module, "is_causal", False):
        raise UnfitError(
            "it is a decoder's: keys of the future and a cache are not known to the blocks"
        )


def _check_implementation(config: Any) -> None:
    found = config._attn_implementation
    if found not in ATTENTIONS:
        accepted = " and ".join(ATTENTIONS)
        raise UnfitError(f"its attention implementation is {found!r}; accepted: {accepted}")


def _bert_attention(name: str, module: Any) -> Block:
    if module.is_cross_attention:
        raise UnfitError("it is cross-attention")
    inner, norm = module.self, module.output.LayerNorm
    _not_a_decoders(inner)
    _check_implementation(inner.config)
    part = AttentionPart(
        "self.query", "self.key", "self.value", "output.dense", inner.attention_head_size,
        inner.scaling, _norm("output.LayerNorm", norm),
    )  # fmt: skip
    return Block(name, "attention_block", "bert_attention", part)


def _bert_layer(name: str, module: Any) -> Block:
    _not_a_decoders(module)
    attention = _inside("attention", _bert_attention(name, module.attention))
    ffn = FfnPart(
        "intermediate.dense", "output.dense",
        post=_norm("output.LayerNorm", module.output.LayerNorm),
    )  # fmt: skip
    return Block(name, "encoder_layer", "bert_layer", attention, ffn)


def _distilbert_attention(name: str, module: Any) -> Block:
    _not_a_decoders(module)
    _check_implementation(module.config)
    part = AttentionPart(
        "q_lin", "k_lin", "v_lin", "out_lin", module.attention_head_size, module.scaling,
        post=None, residual=False,
    )  # fmt: skip
    return Block(name, "attention_block", "distilbert_attention", part)


def _distilbert_layer(name: str, module: Any) -> Block:
    norm = _norm("sa_layer_norm", module.sa_layer_norm)
    attention = _inside("attention", _distilbert_attention(name, module.attention), norm)
    ffn = FfnPart("ffn.lin1", "ffn.lin2", post=_norm("output_layer_norm", module.output_layer_norm))
    return Block(name, "encoder_layer", "distilbert_layer", attention, ffn)


def _mpnet_attention(name: str, module: Any) -> Block:
    d = module.attn.attention_head_size
    part = AttentionPart(
        "attn.q", "attn.k", "attn.v", "attn.o", d, d**-0.5, _norm("LayerNorm", module.LayerNorm)
    )
    return Block(name, "attention_block", "mpnet_attention", part)


def _mpnet_layer(name: str, module: Any) -> Block:
    attention = _inside("attention", _mpnet_attention(name, module.attention))
    ffn = FfnPart(
        "intermediate.dense", "output.dense",
        post=_norm("output.LayerNorm", module.output.LayerNorm),
    )  # fmt: skip
    return Block(name, "encoder_layer", "mpnet_layer", attention, ffn)


def _inside(prefix: str, block: Block, norm: NormPart | None = None) -> AttentionPart:
    """The attention of a block as part of a module that has the block's under ``prefix``."""
    part = block.attention
    assert part is not None
    query, key, value, output = (
        f"{prefix}.{n}" for n in (part.query, part.key, part.value, part.output)
    )
    post = norm
    if part.post is not None:
        post = NormPart(f"{prefix}.{part.post.name}", part.post.eps, part.post.kind)
    return AttentionPart(query, key, value, output, part.head_dim, part.scale, post)


def _readers() -> tuple[dict[str, Callable[[str, Any], Block]], dict[str, str], dict[str, str]]:
    """Class -> what reads a block of it; class -> how a stack of such layers is called, or the
    model around it; class -> how its embeddings are called."""
    found: dict[str, Callable[[str, Any], Block]] = {}
    stacks: dict[str, str] = {}
    embeddings: dict[str, str] = {}
    for family, prefix in _BERTS.items():
        place = f"transformers.models.{family}.modeling_{family}.{prefix}"
        found[f"{place}Layer"], found[f"{place}Attention"] = _bert_layer, _bert_attention
        stacks[f"{place}Encoder"], stacks[f"{place}Model"] = "bert_stack", "bert_model"
        kind = "roberta" if "roberta" in family else "bert"
        embeddings[f"{place}Embeddings"] = f"{kind}_embeddings"
    place = "transformers.models.distilbert.modeling_distilbert."
    found[f"{place}TransformerBlock"] = _distilbert_layer
    found[f"{place}DistilBertSelfAttention"] = _distilbert_attention
    stacks[f"{place}Transformer"] = "distilbert_stack"
    embeddings[f"{place}Embeddings"] = "distilbert_embeddings"
    place = "transformers.models.mpnet.modeling_mpnet.MPNet"
    found[f"{place}Layer"], found[f"{place}Attention"] = _mpnet_layer, _mpnet_attention
    stacks[f"{place}Encoder"] = "mpnet_stack"
    embeddings[f"{place}Embeddings"] = "mpnet_embeddings"
    return found, stacks, embeddings


_READERS, _STACKS, _EMBEDDINGS = _readers()


def _ffns(name: str, module: nn.Module) -> Iterator[Block]:
    """An FFN by what the module owns, with every place that its norm and x may have."""
    linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    norms = {n: m for n, m in module.named_modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))}
    owners = {n.rpartition(".")[0] for n, _ in module.named_parameters()}
    if len(linears) not in (2, 3) or len(norms) > 1 or owners - {*linears, *norms}:
        return
    if not _takes_one_tensor(module):
        return
    *first, fc2 = linears
    hidden, width = linears[first[0]].in_features, linears[first[0]].out_features
    if any((linears[n].in_features, linears[n].out_features) != (hidden, width) for n in first):
        return
    if linears[fc2].in_features != width:
        return
    if linears[fc2].out_features != hidden:
        out = linears[fc2].out_features
        raise UnfitError(f"an FFN from {hidden} to {out} features; accepted: as many out as in")
    norm = next((_norm(n, m) for n, m in norms.items()), None)
    places: list[tuple[NormPart | None, NormPart | None]] = [(None, None)]
    if norm is not None:
        places = [(None, norm), (norm, None)]
    orders: list[tuple[str, str | None]] = [(first[0], None)]
    if len(first) == 2:
        orders = [(first[0], first[1]), (first[1], first[0])]
    for fc1, up in orders:
        for pre, post in places:
            for residual in (norm is not None, norm is None):
                yield Block(name, "ffn", "ffn", None, FfnPart(fc1, fc2, up, pre, post, residual))


def _takes_one_tensor(module: nn.Module) -> bool:
    """Whether there is a forward, and it does with one positional argument."""
    if type(module).forward is nn.Module.forward:
        return False
    try:
        inspect.signature(module.forward).bind(None)
    except (TypeError, ValueError):
        return False
    return True
