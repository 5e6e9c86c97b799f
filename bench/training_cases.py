"""The training level: one step of masked fine-tuning, at four sparsities.

The encoder has 12 layers of width 384, 12 heads and an FFN of 1536; a step is forward, backward
and AdamW. The share that is masked is told by the label: ``16x48, 80%`` is batch 16 of 48 tokens
with 80 % of the FFN's channels masked, and 60 % of the heads.

Full-size, mask-multiplied and already slim models have parameters of different sizes, so what is
compared is what they share: the loss, gradients of parameters that no mask touches, and gradients
of some kept units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

import slimkern
from bench.work import Outputs, Work
from slimkern.plan import SlimPlan
from slimkern.selection import kept_units

# FFN channels -> heads, as fractions removed: heads are fewer, and dearer to lose.
SPARSITIES = {0.0: 0.0, 0.25: 0.25, 0.5: 0.5, 0.8: 0.6}

Index = tuple[slice | Tensor, ...]


@dataclass(frozen=True)
class Size:
    """An encoder and a batch.

    Attributes:
        layers, width, heads, ffn, vocabulary: of the encoder.
        batch, tokens: of the input.
        multiple_of: kept FFN widths are rounded up to it.
    """

    layers: int = 12
    width: int = 384
    heads: int = 12
    ffn: int = 1536
    vocabulary: int = 1000
    batch: int = 16
    tokens: int = 48
    multiple_of: int = 32

    def kept(self, sparsity: float) -> tuple[int, int]:
        """FFN channels and heads that stay in each layer."""
        return (
            kept_units(self.ffn, sparsity, self.multiple_of),
            kept_units(self.heads, SPARSITIES[sparsity]),
        )


FULL = Size()
SMOKE = Size(layers=2, width=64, heads=4, ffn=128, vocabulary=50, batch=2, tokens=8, multiple_of=4)


@dataclass(frozen=True)
class TrainingWork(Work):
    """A training step. ``build`` gives the dense model, to be masked by ``plan``.

    The outputs of a step are the loss and the gradients that `probes` names, all of before the
    update.

    Attributes:
        size: of the encoder and the batch.
        sparsity: of FFN channels; ``SPARSITIES`` has that of heads.
        optimizer: the step ends with AdamW.
        plan: what stays of the dense model.
        target: [batch, tokens, width]; the loss is the mean square of the distance to it.
        reference: the outputs in double precision.
    """

    size: Size = field(kw_only=True)
    sparsity: float = field(kw_only=True)
    optimizer: bool = field(kw_only=True)
    plan: Callable[[], SlimPlan] = field(kw_only=True)
    target: Callable[[], Tensor] = field(kw_only=True)
    reference: Callable[[], Outputs] = field(kw_only=True)


class Encoder(nn.Module):
    """A BERT of which the last hidden state is taken; ids [B, T] -> [B, T, width]."""

    def __init__(self, size: Size) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=size.ffn,
            max_position_embeddings=size.tokens,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            # BERT's own 0.02 at width 384. Larger weights make the tokens of a deep random model
            # alike, and the gradients of q and k nothing but cancellation.
            initializer_range=0.4 * size.width**-0.5,
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids).last_hidden_state


def training_works(smoke: bool) -> list[TrainingWork]:
    """The steps to measure; ``smoke``: a tiny one at both ends of the sparsities.

    With the optimizer at every sparsity, without it at the highest.
    """
    if smoke:
        return [step(SMOKE, s, optimizer=True, smoke=True) for s in (0.0, 0.8)]
    steps = [step(FULL, s, optimizer=True) for s in SPARSITIES]
    return [*steps, step(FULL, max(SPARSITIES), optimizer=False)]


def step(size: Size, sparsity: float, *, optimizer: bool, smoke: bool = False) -> TrainingWork:
    """One step at a sparsity of ``SPARSITIES``."""
    ffn, heads = size.kept(sparsity)
    name = f"{size.layers} x {size.width} masked step"
    return TrainingWork(
        level="training",
        name=name if optimizer else f"{name}, no optimizer",
        shape=f"{size.batch}x{size.tokens}, {sparsity:.0%}",
        build=partial(build, size),
        inputs=partial(_inputs, size),
        flops=_flops(size, ffn, heads),
        values=_values(size, ffn, heads, optimizer),
        roundings=_roundings(size, ffn, heads),
        stores=24 * size.layers,  # 12 tensors one after the other in a layer, there and back
        backward=True,
        compiled=optimizer and not smoke and sparsity == max(SPARSITIES),
        smoke=smoke,
        size=size,
        sparsity=sparsity,
        optimizer=optimizer,
        plan=partial(_plan, size, sparsity),
        target=partial(_target, size),
        reference=partial(_reference, size, sparsity),
    )


def build(size: Size) -> Encoder:
    """The dense encoder, float32, eval mode; always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder(size).eval()


def _inputs(size: Size) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(size.vocabulary, (size.batch, size.tokens), generator=generator),)


def _target(size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size.batch, size.tokens, size.width, generator=generator)


@lru_cache(maxsize=8)
def _plan(size: Size, sparsity: float) -> SlimPlan:
    """The units of least magnitude go, in every layer the same number."""
    model = build(size)
    found = slimkern.discover(model, _inputs(size))
    scores = slimkern.importance(model, found, criterion="magnitude")
    return slimkern.make_plan(
        found,
        scores,
        ffn_sparsity=sparsity,
        mha_sparsity=SPARSITIES[sparsity],
        multiple_of=size.multiple_of,
    )


def probes(model: nn.Module, plan: SlimPlan, *, slim: bool) -> list[tuple[nn.Parameter, Index]]:
    """Parameters, and the part of each, whose gradients every kind of model has.

    The scale of the embeddings' LayerNorm, the word embeddings and the shift of the last LayerNorm;
    then, of the first and the last layer, the last kept head and the last kept FFN channel: its
    rows and columns of every linear, as views, which cost nothing; and all kept entries of the
    first FFN bias, as a single one may be near zero, where its relative error says nothing.

    Args:
        model: an `Encoder`, dense, masked or slim.
        plan: what stays.
        slim: the model has the kept units only.
    """
    last = [m for m in model.modules() if isinstance(m, nn.LayerNorm)][-1]
    embeddings = model.get_submodule("bert.embeddings")
    found: list[tuple[nn.Parameter, Index]] = [
        (embeddings.get_parameter("LayerNorm.weight"), ()),
        (embeddings.get_parameter("word_embeddings.weight"), ()),
        (last.get_parameter("bias"), ()),
    ]
    for entry in (*plan.entries[:2], *plan.entries[-2:]):
        unit = len(entry.keep) - 1 if slim else entry.keep[-1]
        for member in (*entry.group.producers, *entry.group.consumers):
            linear = model.get_submodule(member.name)
            part = slice(unit * member.unit_size, (unit + 1) * member.unit_size)
            rows = member in entry.group.producers
            found.append((linear.get_parameter("weight"), (part,) if rows else (slice(None), part)))
            if rows and entry.group.kind == "ffn":  # a key's bias has no gradient, exactly
                bias = linear.get_parameter("bias")
                kept = torch.tensor(entry.keep, device=bias.device)
                found.append((bias, () if slim else (kept,)))
    return found


def loss_of(hidden: Tensor, target: Tensor) -> Tensor:
    """Mean square of the distance, in the target's dtype."""
    return (hidden.to(target.dtype) - target).square().mean()


def outputs_of(loss: Tensor, parts: list[tuple[nn.Parameter, Index]]) -> Outputs:
    """The loss and the gradients at ``parts``, after the backward pass."""
    return (loss.detach(), *(_gradient(parameter)[index] for parameter, index in parts))


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError(f"a parameter of shape {tuple(parameter.shape)} got no gradient")
    return parameter.grad


@lru_cache(maxsize=8)
def _reference(size: Size, sparsity: float, device: str = "cpu") -> Outputs:
    """The dense model in double, with the columns that masked units feed set to zero."""
    with torch.inference_mode(False), torch.enable_grad():
        model = build(size).to(device)
        plan = _plan(size, sparsity)
        model.double()
        for entry in plan:
            for member in entry.group.consumers:
                weight = model.get_parameter(f"{member.name}.weight")
                units = weight.detach().unflatten(1, (entry.group.num_units, member.unit_size))
                gone = sorted(set(range(entry.group.num_units)) - set(entry.keep))
                units[:, gone] = 0
        inputs = tuple(tensor.to(device) for tensor in _inputs(size))
        loss = loss_of(model(*inputs), _target(size).to(device).double())
        loss.backward()
        return outputs_of(loss, probes(model, plan, slim=False))


def _flops(size: Size, ffn: int, heads: int) -> float:
    """Of the kept units' matrix products: a forward, and twice that for the gradients."""
    tokens, inner = size.batch * size.tokens, heads * size.width // size.heads
    linears = 2 * tokens * size.width * (4 * inner + 2 * ffn)
    attention = 2 * 2 * tokens * size.tokens * inner
    return 3.0 * size.layers * (linears + attention)


def _values(size: Size, ffn: int, heads: int, optimizer: bool) -> float:
    """Each kept parameter is read and its gradient written; AdamW besides reads and writes both
    of its averages and writes the parameter."""
    inner = heads * size.width // size.heads
    layer = size.width * (4 * inner + 2 * ffn) + 3 * inner + ffn + 6 * size.width
    embeddings = size.width * (size.vocabulary + size.tokens + 2 + 2)
    parameters = size.layers * layer + embeddings
    hidden = size.batch * size.tokens * size.width
    return float(parameters * (7 if optimizer else 2) + hidden + size.batch * size.tokens)


def _roundings(size: Size, ffn: int, heads: int) -> int:
    """The sums one after the other, there and back, and that over tokens of a weight's gradient."""
    inner = heads * size.width // size.heads
    head = size.width // size.heads
    forward = size.width + head + size.tokens + inner + size.width + ffn
    backward = size.width + ffn + size.width + 2 * size.tokens + head + 3 * inner
    return size.layers * (forward + backward) + size.batch * size.tokens
