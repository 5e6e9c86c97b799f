"""What a block of a model is made of: frozen descriptions, of which fused modules are made.

Names of parts are dotted names inside the block's own module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BlockKind = Literal["encoder_layer", "attention_block", "ffn"]
# Arguments that layers pass down to attention, and that no block of ours computes with.
FOREIGN_ARGUMENTS = frozenset({
    "output_attentions", "encoder_hidden_states", "encoder_attention_mask", "past_key_values",
    "is_causal", "cu_seq_lens_q", "cu_seq_lens_k", "cache", "softcap",
})  # fmt: skip

# Implementations of attention, by transformers' names, that blocks compute.
ATTENTIONS = ("eager", "sdpa")


@dataclass(frozen=True)
class NormPart:
    """A norm: its module, what it adds to the variance, and ``layer`` or ``rms``."""

    name: str
    eps: float
    kind: str = "layer"


@dataclass(frozen=True)
class AttentionPart:
    """``post(x + output(softmax(scale q kᵀ + masks) v))``.

    Attributes:
        query, key, value, output: linears.
        head_dim: entries of a head; the number of heads is that of the weights.
        scale: of the scores.
        post: a norm, or None.
        residual: whether x is added.
    """

    query: str
    key: str
    value: str
    output: str
    head_dim: int
    scale: float
    post: NormPart | None
    residual: bool = True


@dataclass(frozen=True)
class FfnPart:
    """``post(x + fc2(a(fc1(pre(x)))))``; gated with ``up``: ``fc2(a(fc1(.)) * up(.))``.

    Attributes:
        fc1, fc2, up: linears; ``up`` is None where nothing is gated.
        pre, post: norms, or None.
        residual: whether x is added.
        activation: its name, or an empty string where it is still to be found out.
    """

    fc1: str
    fc2: str
    up: str | None = None
    pre: NormPart | None = None
    post: NormPart | None = None
    residual: bool = True
    activation: str = ""


@dataclass(frozen=True)
class Block:
    """A module that computes attention, an FFN, or one after the other.

    Attributes:
        name: the module's dotted name in the model.
        kind: ``encoder_layer``, ``attention_block`` or ``ffn``.
        call: how its forward is called and what it returns: ``bert_layer``, ``ffn`` and the like.
        attention, ffn: its parts; None where it has no such part.
    """

    name: str
    kind: BlockKind
    call: str
    attention: AttentionPart | None = None
    ffn: FfnPart | None = None

    def linears(self) -> list[str]:
        """The names of all linears."""
        a, f = self.attention, self.ffn
        named = [] if a is None else [a.query, a.key, a.value, a.output]
        if f is not None:
            named += [f.fc1, f.fc2] if f.up is None else [f.fc1, f.up, f.fc2]
        return named

    def norms(self) -> list[str]:
        """The names of all norms."""
        a, f = self.attention, self.ffn
        parts = [] if a is None else [a.post]
        parts += [] if f is None else [f.pre, f.post]
        return [part.name for part in parts if part is not None]
