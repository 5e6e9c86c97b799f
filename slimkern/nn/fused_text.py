"""What surrounds the layers of a text model, fused: the stack of layers, the mask, the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from slimkern.nn.fused import PER_SEQUENCE, FusedModule, keys_of
from slimkern.ops import Packed, common_slice, encoder_stack


def added_to_scores(keys: Tensor, x: Tensor) -> Tensor:
    """Which keys count, [..., T], as what is added to their scores in the dtype of x; rows begin at
    multiples of 16 bytes."""
    T = keys.shape[-1]
    added = x.new_zeros(*keys.shape[:-1], -(-T // 8) * 8)[..., :T]
    return added.masked_fill_(keys.logical_not(), torch.finfo(x.dtype).min)


def _for_layers(keys: Tensor, x: Tensor) -> Tensor:
    """A mask of keys in the form that costs layers the least: on a GPU what they add to the scores,
    rows at multiples of 16 bytes, as the fastest attention there reads them."""
    return keys if keys.is_cpu or keys.dtype != torch.bool else added_to_scores(keys, x)


# What a stack is given that says nothing to its layers, as long as there is no cache.
_NOT_FOR_LAYERS = frozenset({"return_dict", "position_ids", "cache_position"})
_RETURN_DICT = frozenset({"return_dict"})


def _asks(given: dict[str, Any], unless: frozenset[str]) -> bool:
    """Whether a call asks for something by name, other than by these names. A value may be a tensor
    (labels of a whole batch that is passed on): it has no truth to look at."""
    for name, value in given.items():
        if value is not None and value is not False and name not in unless:
            return True
    return False


def _is_recorded() -> bool:
    """Whether what runs becomes a graph: ops that it knows how to write down, and nothing that
    depends on the values of now."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _has_no_values(x: Tensor) -> bool:
    """Whether what is computed beside x now has its values only later, or never (fake tensors):
    neither may it be looked at, nor kept for other calls."""
    return (
        _is_recorded()
        or type(x) is not Tensor
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _untouched(module: nn.Module) -> bool:
    """Whether calling a module is nothing but its class's forward: no hook looks at it, and no
    other forward was put on the object."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


@cache
def _output(name: str) -> type[Any]:
    """The class of what a model or a stack returns."""
    from transformers import modeling_outputs  # the stacks are its own: it is there already

    made: type[Any] = getattr(modeling_outputs, name)
    return made


class _Stack(FusedModule):
    """Computes its layers in one call, where nothing looks at one of them. Else it hands them a
    mask that is brought into their form once for all of them, and is one for plain layers, too."""

    def _once(
        self, x: Tensor, mask: Tensor | None, given: dict[str, Any], config: Any
    ) -> Tensor | None:
        if given.get("output_attentions", getattr(config, "output_attentions", False)):
            given = {**given, "output_attentions": True}
        self._refuse(given)
        if mask is None:
            return None
        return _for_layers(keys_of(mask), x)

    def packs_of_all(self) -> list[Packed] | None:
        """The packs of all layers, to be computed in one call; None where one of them has to be
        called by itself: it is no fused encoder layer, or something looks at it."""
        if _is_recorded() or _has_any_global_hook():
            return None
        found = []
        for layer in self._modules["layer"]._modules.values():  # type: ignore[union-attr]
            if not isinstance(layer, FusedModule) or layer.training or not _untouched(layer):
                return None
            if layer.packs.block.kind != "encoder_layer":
                return None
            found.append(layer.packs.fresh(layer))
        return found if len({packed.backend for packed in found}) == 1 else None

    def _at_once(
        self,
        x: Tensor,
        mask: Tensor | None,
        given: dict[str, Any],
        make_bias: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """All layers in one call; None where that can't be, or where the layers are given more than
        a mask and a bias, which they may refuse."""
        if _asks(given, _NOT_FOR_LAYERS):
            return None
        packs = self.packs_of_all()
        if packs is None:
            return None
        if mask is not None:
            mask = mask[:, 0, 0].expand(x.shape[0], -1)
        bias = None if make_bias is None else common_slice(make_bias(x), 0, PER_SEQUENCE)[0]
        return encoder_stack(x, packs, mask, bias)


class BertStack(_Stack):
    """The encoder of BERT, RoBERTa, XLM-R, ELECTRA."""

    call = "bert_stack"

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *a: Any, **kw: Any) -> Any:
        """As the plain encoder's."""
        mask = self._once(hidden_states, attention_mask, kw, self.config)
        y = None if a else self._at_once(hidden_states, mask, kw)
        if y is None:
            return super().forward(hidden_states, mask, *a, **kw)
        return _output("BaseModelOutputWithPastAndCrossAttentions")(last_hidden_state=y)


class DistilBertStack(_Stack):
    """The encoder of DistilBERT."""

    call = "distilbert_stack"

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kw: Any) -> Any:
        """As the plain encoder's."""
        config = self.layer[0].attention.config  # type: ignore[index, union-attr]
        mask = self._once(hidden_states, attention_mask, kw, config)
        y = self._at_once(hidden_states, mask, kw)
        if y is None:
            return super().forward(hidden_states, mask, **kw)
        return _output("BaseModelOutput")(last_hidden_state=y)


class MPNetStack(_Stack):
    """The encoder of MPNet."""

    call = "mpnet_stack"

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *a: Any, **kw: Any) -> Any:
        """As the plain encoder's."""
        mask = self._once(hidden_states, attention_mask, kw, None)
        y = None
        if not a and kw.get("return_dict"):
            y = self._at_once(hidden_states, mask, kw, self.compute_position_bias)
        if y is None:
            return super().forward(hidden_states, mask, *a, **kw)
        return _output("BaseModelOutput")(last_hidden_state=y)

    def compute_position_bias(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The bias once for all sequences, [1, heads, T, T], in float32."""
        own: Any = self
        if args or kwargs or _has_no_values(x):
            made: Tensor = super().compute_position_bias(x[:1], *args, **kwargs)  # type: ignore[misc]
            return made.float()
        buckets = _buckets(own.relative_position_bucket, x.shape[1], x.device)
        table: Tensor = own.relative_attention_bias(buckets)
        return table.permute(2, 0, 1)[None].float().contiguous()


@lru_cache(maxsize=4)
def _buckets(bucket: Callable[[Tensor], Tensor], T: int, device: torch.device) -> Tensor:
    """Which row of the table of biases a query and a key share: [T, T], by their distance alone.

    Kept from call to call: for a short sequence it takes as long as a layer.
    """
    with torch.inference_mode(False):
        places = torch.arange(T, device=device)
        return bucket(places[None, :] - places[:, None])


class BertModel(FusedModule):
    """BERT, RoBERTa, XLM-R, ELECTRA: a mask of tokens goes to fused layers as it is, where the
    plain model makes one of four dimensions first."""

    call = "bert_model"
    keeps_name = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the plain model's. Tokens in, hidden states out, and nothing else asked for: then what
        transformers does around its layers, as long as a layer takes, is left out."""
        others = (inputs_embeds, encoder_hidden_states, encoder_attention_mask, past_key_values)
        packs = None
        if input_ids is not None and all(given is None for given in others):
            packs = self._packs_alone(attention_mask, kwargs)
        if packs is None:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        own: Any = self
        x = own.embeddings(  # as the plain model calls it: it may be another's, or have hooks
            input_ids=input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=None,
            past_key_values_length=0,
        )
        keep = _keeps(attention_mask)
        y = encoder_stack(x, packs, None if keep is None else _for_layers(keep, x))
        return _output("BaseModelOutputWithPoolingAndCrossAttentions")(
            last_hidden_state=y, pooler_output=None if own.pooler is None else own.pooler(y)
        )

    def _packs_alone(self, mask: Tensor | None, given: dict[str, Any]) -> list[Packed] | None:
        """The packs of the layers, where a call is embeddings, layers and a pooler alone."""
        config: Any = self.config
        stack = self._modules["encoder"]
        if (
            not hasattr(self, "pooler")  # ELECTRA: it has a projection, and returns another class
            or not isinstance(stack, _Stack)
            or stack.training
            or not _untouched(stack)
            or _asks(given, _RETURN_DICT)
            or not given.get("return_dict", True)
            or not config.return_dict
            or config.is_decoder
            or config.output_hidden_states
            or config.output_attentions
            or getattr(config, "is_causal", None)
            or (mask is not None and mask.dim() != 2)
        ):
            return None
        return stack.packs_of_all()

    def _create_attention_masks(
        self, attention_mask: Any = None, encoder_attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        own: Any = self
        if (
            encoder_attention_mask is not None
            or own.config.is_decoder
            or (attention_mask is not None and attention_mask.dim() != 2)
            or not all(isinstance(layer, FusedModule) for layer in own.encoder.layer)
        ):
            made: tuple[Any, Any] = super()._create_attention_masks(  # type: ignore[misc]
                attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
                **kwargs,
            )
            return made
        keep = _keeps(attention_mask)
        return (None if keep is None else keep[:, None, None, :]), None


def _keeps(mask: Tensor | None) -> Tensor | None:
    """A mask of tokens as bool [B, T]; None where it keeps all of them."""
    if mask is None:
        return None
    keep = mask.bool()
    # What a graph records can't depend on values; elsewhere the plain model looks as well.
    return None if not _has_no_values(keep) and bool(keep.all()) else keep
