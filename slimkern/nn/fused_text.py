"""What surrounds the layers of a text model, fused: embeddings, stack of layers, attention mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimkern.nn.fused import UNFUSE, FusedModule, keys_of
from slimkern.ops import NormWeights, embeddings


class _Embeddings(FusedModule):
    """Gathers rows of the tables, adds and normalises them in one pass; reads the parameters as
    they are, so that there is nothing to pack. Given ``inputs_embeds``, it is the plain module."""

    def _embed(
        self, ids: Tensor, position_ids: Tensor | None, types: Any, type_ids: Tensor | None
    ) -> Tensor:
        self._refuse({})
        own: Any = self
        norm = own.LayerNorm
        try:
            return embeddings(
                ids,
                own.word_embeddings.weight,
                own.position_embeddings.weight,
                NormWeights(norm.weight, norm.bias, norm.eps),
                types=None if types is None else types.weight,
                type_ids=type_ids,
                position_ids=position_ids,
            )
        except (TypeError, ValueError) as error:
            raise RuntimeError(f"{type(self).__name__}: {error}. {UNFUSE}") from error


class BertEmbeddings(_Embeddings):
    """BERT, ELECTRA: token t has position t."""

    call = "bert_embeddings"

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Any:
        """[B, T] -> [B, T, hidden]."""
        if input_ids is None or inputs_embeds is not None or past_key_values_length:
            return super().forward(
                input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length
            )
        if position_ids is None:
            position_ids = self._places(input_ids)
        return self._embed(input_ids, position_ids, self.token_type_embeddings, token_type_ids)

    def _places(self, ids: Tensor) -> Tensor | None:
        """The position of every token; None: token t has position t."""
        return None


class RobertaEmbeddings(BertEmbeddings):
    """RoBERTa, XLM-R: padding has a position of its own."""

    call = "roberta_embeddings"

    def _places(self, ids: Tensor) -> Tensor | None:
        own: Any = self
        made: Tensor = own.create_position_ids_from_input_ids(ids, own.padding_idx)
        return made


class MPNetEmbeddings(_Embeddings):
    """MPNet: as RoBERTa, without token types."""

    call = "mpnet_embeddings"

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """[B, T] -> [B, T, hidden]."""
        if input_ids is None or inputs_embeds is not None:
            return super().forward(input_ids, position_ids, inputs_embeds, **kwargs)
        if position_ids is None:
            padding: Any = self.padding_idx
            places = input_ids.ne(padding).long()
            position_ids = places.cumsum(1) * places + padding
        return self._embed(input_ids, position_ids, None, None)


class DistilBertEmbeddings(_Embeddings):
    """DistilBERT: as BERT, without token types."""

    call = "distilbert_embeddings"

    def forward(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Any:
        """[B, T] -> [B, T, hidden]."""
        if input_ids is None:
            return super().forward(input_ids, inputs_embeds, position_ids)
        return self._embed(input_ids, position_ids, None, None)


def added_to_scores(keys: Tensor, x: Tensor) -> Tensor:
    """Which keys count, [..., T], as what is added to their scores in the dtype of x; rows begin at
    multiples of 16 bytes."""
    T = keys.shape[-1]
    added = x.new_zeros(*keys.shape[:-1], -(-T // 8) * 8)[..., :T]
    return added.masked_fill_(keys.logical_not(), torch.finfo(x.dtype).min)


class _Stack(FusedModule):
    """Hands a mask to many layers: brought into the form that they take once for all of them.

    What the layers get is a mask for plain ones, too. On a GPU it is what they add to the scores,
    rows at multiples of 16 bytes, as the fastest attention there reads them.
    """

    def _once(
        self, x: Tensor, mask: Tensor | None, given: dict[str, Any], config: Any
    ) -> Tensor | None:
        if given.get("output_attentions", getattr(config, "output_attentions", False)):
            given = {**given, "output_attentions": True}
        self._refuse(given)
        if mask is None:
            return None
        keys = keys_of(mask)
        return keys if keys.is_cpu or keys.dtype != torch.bool else added_to_scores(keys, x)


class BertStack(_Stack):
    """The encoder of BERT, RoBERTa, XLM-R, ELECTRA."""

    call = "bert_stack"

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *a: Any, **kw: Any) -> Any:
        """As the plain encoder's."""
        mask = self._once(hidden_states, attention_mask, kw, self.config)
        return super().forward(hidden_states, mask, *a, **kw)


class DistilBertStack(_Stack):
    """The encoder of DistilBERT."""

    call = "distilbert_stack"

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kw: Any) -> Any:
        """As the plain encoder's."""
        config = self.layer[0].attention.config  # type: ignore[index, union-attr]
        mask = self._once(hidden_states, attention_mask, kw, config)
        return super().forward(hidden_states, mask, **kw)


class MPNetStack(_Stack):
    """The encoder of MPNet."""

    call = "mpnet_stack"

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *a: Any, **kw: Any) -> Any:
        """As the plain encoder's."""
        mask = self._once(hidden_states, attention_mask, kw, None)
        return super().forward(hidden_states, mask, *a, **kw)

    def compute_position_bias(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The bias once for all sequences, [1, heads, T, T], in float32."""
        made: Tensor = super().compute_position_bias(x[:1], *args, **kwargs)  # type: ignore[misc]
        return made.float()


class BertModel(FusedModule):
    """BERT, RoBERTa, XLM-R, ELECTRA: a mask of tokens goes to fused layers as it is, where the
    plain model makes one of four dimensions first."""

    call = "bert_model"
    keeps_name = True

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
        if attention_mask is None:
            return None, None
        keep = attention_mask.bool()
        # What a graph records can't depend on values; elsewhere the plain model looks as well.
        recorded = torch.compiler.is_compiling() or (
            keep.is_cuda and torch.cuda.is_current_stream_capturing()
        )
        if not recorded and bool(keep.all()):
            return None, None
        return keep[:, None, None, :], None
