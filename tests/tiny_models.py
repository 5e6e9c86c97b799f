"""Tiny random models: every family that slimkern knows, and plain modules, some of them awkward.

Hidden size, number of heads, head size, FFN width, layers and vocabulary are all different, so that
no size can stand in for another. Weights are large enough for every part to matter to the output.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, HEADS, HEAD_DIM, FFN, LAYERS, VOCAB = 48, 4, 12, 80, 3, 99

# Heads that the families have in common (ELECTRA's ForMaskedLM and the like included).
TASKS = (
    "Model",
    "ForSequenceClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForTokenClassification",
)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values (biases and norms too); eval mode. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


def _hugging_face(prefix: str, config: str, **sizes: Any) -> Callable[..., Any]:
    def build(
        task: str = "Model",
        attention: str | None = None,
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> Any:
        import transformers

        settings = {"vocab_size": VOCAB, "pad_token_id": 1, **sizes, **overrides}
        made = getattr(transformers, config)(**settings)
        cls = getattr(transformers, prefix + task)
        torch.manual_seed(0)
        extra = {} if attention is None else {"attn_implementation": attention}
        return randomize(cls._from_config(made, **extra)).to(dtype)

    return build


_SIZES = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 40,
}

# name -> builder(task="Model", attention=None | "eager" | "sdpa", dtype=..., **config overrides)
FAMILIES: dict[str, Callable[..., Any]] = {
    "bert": _hugging_face("Bert", "BertConfig", **_SIZES),
    "roberta": _hugging_face("Roberta", "RobertaConfig", **_SIZES),
    "xlm-roberta": _hugging_face("XLMRoberta", "XLMRobertaConfig", **_SIZES),
    "electra": _hugging_face("Electra", "ElectraConfig", **_SIZES, embedding_size=20),
    "distilbert": _hugging_face(
        "DistilBert", "DistilBertConfig", dim=HIDDEN, n_heads=HEADS, hidden_dim=FFN,
        n_layers=LAYERS, max_position_embeddings=40,
    ),
    "mpnet": _hugging_face("MPNet", "MPNetConfig", **_SIZES),
}  # fmt: skip

# Families that discovery reads only in part, or refuses.
OTHERS: dict[str, Callable[..., Any]] = {
    "albert": _hugging_face("Albert", "AlbertConfig", **_SIZES, embedding_size=20),
    "gpt2": _hugging_face(
        "GPT2", "GPT2Config", n_embd=HIDDEN, n_head=HEADS, n_inner=FFN, n_layer=LAYERS,
        n_positions=40, bos_token_id=0, eos_token_id=1,
    ),
    "llama": _hugging_face("Llama", "LlamaConfig", **_SIZES, num_key_value_heads=HEADS),
    "t5": _hugging_face(
        "T5", "T5Config", d_model=HIDDEN, num_heads=HEADS, d_kv=HEAD_DIM, d_ff=FFN,
        num_layers=LAYERS, decoder_start_token_id=0,
    ),
    "gptj": _hugging_face(
        "GPTJ", "GPTJConfig", n_embd=HIDDEN, n_head=HEADS, n_inner=FFN, n_layer=LAYERS,
        n_positions=40, rotary_dim=4, bos_token_id=0, eos_token_id=1,
    ),
    "xlm": _hugging_face(
        "XLM", "XLMConfig", emb_dim=HIDDEN, n_heads=HEADS, n_layers=LAYERS,
        max_position_embeddings=40,
    ),
    "bart": _hugging_face(
        "Bart", "BartConfig", d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=FFN,
        decoder_ffn_dim=FFN, max_position_embeddings=40,
    ),
    "deberta": _hugging_face(
        "DebertaV2", "DebertaV2Config", **_SIZES, relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),
    "modernbert": _hugging_face("ModernBert", "ModernBertConfig", **_SIZES),
    "vit": _hugging_face(
        "ViT", "ViTConfig", **{k: v for k, v in _SIZES.items() if "position" not in k},
        image_size=16, patch_size=8,
    ),
}  # fmt: skip


def text_inputs(batch: int = 3, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Token ids and an attention mask with padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, length - row :] = 0
    return {"input_ids": ids.where(mask.bool(), torch.ones_like(ids)), "attention_mask": mask}


def mlp(*widths: int, act: nn.Module | None = None) -> nn.Sequential:
    """Linears of the given widths with an activation between."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), act or nn.GELU()]
    torch.manual_seed(0)
    return randomize(nn.Sequential(*layers[:-1]))  # type: ignore[return-value]


class Gated(nn.Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, hidden: int = 10, width: int = 24) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, width), nn.Linear(hidden, width)
        self.down = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Between(nn.Module):
    """``second(middle(first(x)))`` with any ``middle``, given the module itself and the input."""

    def __init__(
        self,
        middle: Callable[[Between, Tensor, Tensor], Any],
        hidden: int = 10,
        width: int = 24,
        second: int | None = None,
        **children: Any,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(hidden, width)
        self.second = nn.Linear(second or width, hidden)
        self.middle = middle
        for name, child in children.items():
            if isinstance(child, Tensor) and not isinstance(child, nn.Parameter):
                self.register_buffer(name, child)
            else:
                setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.middle(self, self.first(x), x))
