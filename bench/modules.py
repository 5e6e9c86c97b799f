"""The modules that are measured: plain PyTorch and Hugging Face's, as their users have them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values, in eval mode; returns the module.

    Weights have variance 1 / fan-in, so that every activation is about 1 in size and every part
    matters to the output: a wrong part is then seen in it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.normal_(generator=generator)
        if parameter.dim() > 1:
            parameter.mul_(1.0 if "embeddings" in name else parameter.shape[-1] ** -0.5)
        else:
            parameter.mul_(0.1).add_(1.0 if name.endswith("Norm.weight") else 0.0)
    return module.eval()


class IndexedLinear(nn.Module):
    """A linear with full-size weights of which only some rows or columns take part.

    ``y = x @ weight[rows][:, cols]ᵀ + bias[rows]``, as a user writes it.

    Attributes:
        weight, bias: [N, K] and [N].
        rows, cols: kept indices, int64, sorted; or None for all.
    """

    rows: Tensor | None
    cols: Tensor | None

    def __init__(self, N: int, K: int, rows: Tensor | None, cols: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(N, K))
        self.bias = nn.Parameter(torch.empty(N))
        self.register_buffer("rows", rows)
        self.register_buffer("cols", cols)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., R]."""
        weight, bias = self.weight, self.bias
        if self.rows is not None:
            weight, bias = weight[self.rows], bias[self.rows]
        if self.cols is not None:
            weight = weight[:, self.cols]
        return F.linear(x, weight, bias)


class BlockMaskedLinear(nn.Module):
    """A linear whose weight is multiplied by a mask, as a user writes it.

    Attributes:
        weight, bias: [N, K] and [N].
        mask: [N, K] of zeros and ones.
        block: (rows, columns) of the blocks that the mask keeps or not.
    """

    mask: Tensor

    def __init__(self, N: int, K: int, block: tuple[int, int], kept: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(N, K))
        self.bias = nn.Parameter(torch.empty(N))
        self.block = block
        rows = kept.repeat_interleave(block[0], 0)[:N]
        self.register_buffer("mask", rows.repeat_interleave(block[1], 1)[:, :K].float())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return F.linear(x, self.weight * self.mask, self.bias)


class Ffn(nn.Module):
    """BERT's: ``LayerNorm(x + fc2(gelu(fc1(x))))`` with the GELU of the error function."""

    def __init__(self, H: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(H, width), nn.Linear(width, H)
        self.LayerNorm = nn.LayerNorm(H, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        return self.LayerNorm(x + self.fc2(F.gelu(self.fc1(x))))


class Attention(nn.Module):
    """Hugging Face's BertAttention on SDPA: projections, attention, residual and LayerNorm."""

    def __init__(self, H: int, heads: int) -> None:
        super().__init__()
        from transformers.models.bert.modeling_bert import BertAttention

        self.attention = BertAttention(bert_config(H, heads, 1, 1))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """x [B, T, H] and a mask [B, T], 0 where there is padding -> [B, T, H]."""
        return self.attention(x, attention_mask[:, None, None, :].bool())[0]


class Layer(nn.Module):
    """Hugging Face's BertLayer on SDPA, without padding."""

    def __init__(self, H: int, heads: int, width: int) -> None:
        super().__init__()
        from transformers.models.bert.modeling_bert import BertLayer

        self.layer = BertLayer(bert_config(H, heads, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H] -> [B, T, H]."""
        return self.layer(x)


class Encoder(nn.Module):
    """A whole encoder of Hugging Face's; ``model`` is the BertModel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Both int64 [B, T] -> last hidden state [B, T, H]; without a mask nothing is padding."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def bert_config(H: int, heads: int, width: int, layers: int, vocabulary: int = 30522) -> Any:
    """A BertConfig on SDPA."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=H,
        num_attention_heads=heads,
        intermediate_size=width,
        num_hidden_layers=layers,
        attn_implementation="sdpa",
    )


def random_encoder(config: Any) -> Encoder:
    """An encoder with random weights."""
    from transformers import BertModel

    return Encoder(randomize(BertModel(config, add_pooling_layer=False))).eval()


def trained_encoder(folder: str) -> Encoder:
    """An encoder with the weights of a folder."""
    from transformers import BertModel
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = BertModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    finally:
        if shown:
            logging.enable_progress_bar()
    model.pooler = None  # its output is not asked for; loading without it warns of its weights
    return Encoder(model).eval()
