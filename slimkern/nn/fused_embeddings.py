"""Embeddings of text models, fused: gathered, added and normalised in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slimkern.nn.fused import UNFUSE, FusedModule
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
