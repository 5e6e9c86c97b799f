"""The kinds of masked blocks: how each family calls its layers and its attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slimkern.nn.masked_block import Drops, MaskedBlock


class BertLayer(MaskedBlock):
    """BERT, RoBERTa, XLM-R, ELECTRA: returns the hidden states."""

    call = "bert_layer"
    drops: Drops = ("attention.self.dropout", "attention.output.dropout", "output.dropout")

    def _config(self) -> Any:
        return self.attention.self.config  # type: ignore[union-attr]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """[B, T, hidden] -> [B, T, hidden]."""
        more = (encoder_hidden_states, encoder_attention_mask, past_key_values)
        if any(given is not None for given in more) or not self._takes(kwargs, attention_mask):
            return super().forward(hidden_states, attention_mask, *more, **kwargs)
        y = self._attend(hidden_states, attention_mask)
        part = self.masked_block.ffn
        assert part is not None
        return self._feed(y, part, self._drop(2))


class BertAttention(MaskedBlock):
    """Attention of the same families: returns hidden states and no attention map."""

    call = "bert_attention"
    drops: Drops = ("self.dropout", "output.dropout", None)

    def _config(self) -> Any:
        return self.self.config  # type: ignore[union-attr]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the plain attention's, with no attention map."""
        more = (encoder_hidden_states, encoder_attention_mask, past_key_values)
        if any(given is not None for given in more) or not self._takes(kwargs, attention_mask):
            return super().forward(hidden_states, attention_mask, *more, **kwargs)
        return self._attend(hidden_states, attention_mask), None


class DistilBertLayer(MaskedBlock):
    """DistilBERT: returns the hidden states."""

    call = "distilbert_layer"
    drops: Drops = ("attention.dropout", None, "ffn.dropout")

    def _config(self) -> Any:
        return self.attention.config  # type: ignore[union-attr]

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """[B, T, hidden] -> [B, T, hidden]."""
        if not self._takes(kwargs, attention_mask):
            return super().forward(hidden_states, attention_mask, **kwargs)
        y = self._attend(hidden_states, attention_mask)
        part = self.masked_block.ffn
        assert part is not None
        return self._feed(y, part, self._drop(2))


class DistilBertAttention(MaskedBlock):
    """DistilBERT's attention: returns hidden states and no attention map."""

    call = "distilbert_attention"
    drops: Drops = ("dropout", None, None)

    def _config(self) -> Any:
        return self.config

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As the plain attention's, with no attention map."""
        if not self._takes(kwargs, attention_mask):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self._attend(hidden_states, attention_mask), None


class MPNetLayer(MaskedBlock):
    """MPNet: returns a tuple of the hidden states alone."""

    call = "mpnet_layer"
    drops: Drops = ("attention.attn.dropout", "attention.dropout", "output.dropout")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """[B, T, hidden] -> [B, T, hidden], in a tuple."""
        if output_attentions or not self._takes(kwargs, attention_mask):
            return super().forward(
                hidden_states, attention_mask, position_bias, output_attentions, **kwargs
            )
        y = self._attend(hidden_states, attention_mask, position_bias)
        part = self.masked_block.ffn
        return (y if part is None else self._feed(y, part, self._drop(2)),)


class MPNetAttention(MPNetLayer):
    """MPNet's attention, called as its layer."""

    call = "mpnet_attention"
    drops: Drops = ("attn.dropout", "dropout", None)


class Ffn(MaskedBlock):
    """An FFN of any module that is called with one tensor."""

    call = "ffn"

    def aside(self) -> str | None:
        """Also where something is dropped: it is not known where."""
        for name, part in self.named_modules():
            if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
                return f"{name} drops, and it is not known where"
        return super().aside()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[..., hidden] -> [..., hidden]."""
        part = self.masked_block.ffn
        if args or kwargs or part is None or not self._takes({}):
            return super().forward(x, *args, **kwargs)
        return self._feed(x, part, 0.0)
