"""Parameter counts of the reference recipes, on random weights of the real sizes.

What the counts prove (targets met exactly, rounding of what remains, one bias more or less) can't
be seen on tiny models; each case trains one step on a handful of tokens.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

from slimkern.auto_slim import model_slim, parse_auto_slim_config, prepare_pruning

transformers = pytest.importorskip("transformers")

BERTS = {
    "bge-small": (384, 12, 12, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}


def build(size, head, layers=None, **fields):
    """Random weights without the price of a real initialisation: one block of noise, repeated."""
    hidden, all_layers, heads, width = BERTS[size]
    config = transformers.BertConfig(
        hidden_size=hidden, num_hidden_layers=layers or all_layers, num_attention_heads=heads,
        intermediate_size=width, **fields,
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, f"BertFor{head}")(config)
    model.to_empty(device="cpu")
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(noise)):
                part = flat[start : start + len(noise)]
                part.copy_(noise[: len(part)])
            if "LayerNorm.weight" in name:
                flat.fill_(1.0)
        for name, buffer in model.named_buffers():
            buffer.copy_(torch.arange(buffer.numel()) if "position" in name else torch.tensor(0))
    return model.eval()


def count(model):
    return sum(p.numel() for p in model.parameters())


def count_with_all_layers(model, size):
    """What the model would count with as many layers as its size has: they are alike."""
    parts = [count(layer) for layer in model.bert.encoder.layer]
    assert len(set(parts)) == 1
    return count(model) + (BERTS[size][1] - len(parts)) * parts[0]


def tokens(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (1, 8), generator=generator)


def prune(model, ffn, mha, **values):
    """One training step, at the end of which both targets are reached."""
    configs = parse_auto_slim_config(
        model, ffn2_sparsity=ffn, mha_sparsity=mha, pruning_scope="local", end_step=1, **values
    )
    linears = [p for n, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in n]
    optimizer = torch.optim.SGD(linears, lr=1e-3)
    model.get_input_embeddings().weight.requires_grad_(False)  # its gradient is not needed
    pruning = prepare_pruning(model, configs, optimizer)
    outputs = model(tokens(model)).to_tuple()
    sum(o.square().sum() for o in outputs).backward()
    optimizer.step()
    assert pruning.done
    model.zero_grad()
    return pruning


@pytest.mark.parametrize(
    ("size", "head", "ffn", "mha", "before", "after"),
    [
        ("bge-small", "SequenceClassification", 0.8, 0.6, 33_360_385, 18_002_305),
        ("base", "SequenceClassification", 0.8, 0.6, 109_483_009, 48_096_001),
        ("base", "QuestionAnswering", 0.9, 0.0, 108_893_186, 58_135_298),
        ("base", "QuestionAnswering", 0.0, 0.7, 108_893_186, 90_000_386),
        ("base", "QuestionAnswering", 0.9, 0.6, 108_893_186, 41_604_098),
        ("large", "QuestionAnswering", 0.8, 0.7, 334_094_338, 104_327_170),
    ],
)
def test_parameter_counts_of_the_reference_recipes(size, head, ffn, mha, before, after):
    fields = {"num_labels": 1} if head == "SequenceClassification" else {}
    model = build(size, head, layers=2, **fields)  # the scope is local: each has its own target
    assert count_with_all_layers(model, size) == before
    prune(model, ffn, mha)
    assert count_with_all_layers(model, size) == before  # masked, at full size
    model_slim(model)
    assert count_with_all_layers(model, size) == after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slimmed_equals_masked_to_rounding(dtype):
    model = build("bge-small", "SequenceClassification", num_labels=1).to(dtype)
    dense = copy.deepcopy(model)
    prune(model, 0.8, 0.6)
    dense.load_state_dict(model.state_dict())
    x = tokens(model)
    with torch.no_grad():
        exact, eager = copy.deepcopy(dense).double()(x).logits, dense(x).logits
        masked, slim = model(x).logits, model_slim(model)(x).logits
    # Another order of summation: as good as independent roundings of the longest sums.
    sums = torch.finfo(dtype).eps * math.sqrt(12 * 1536) * exact.abs().max()
    allowed = (eager.double() - exact).abs().max() + sums
    for outputs in (masked, slim):
        assert (outputs.double() - exact).abs().max() <= allowed


def test_without_rounding_308_channels_stay():
    model = build("bge-small", "SequenceClassification", num_labels=1)
    pruning = prune(model, 0.8, 0.6, round_multiplier=1)
    model_slim(model)
    kept = {g.kept for g in pruning.report().groups if g.kind == "ffn"}
    assert kept == {308}
    widths = {m.in_features for n, m in model.named_modules() if n.endswith("output.dense")}
    assert widths == {308, 5 * 32}
