"""The whole road on a real pretrained encoder and real sentences: masked = slim = reloaded, and
training goes on with the optimizer that was carried over."""

from __future__ import annotations

import copy

import pytest
import torch

import slimkern
from slimkern.nn import MaskedLinear

transformers = pytest.importorskip("transformers")
F = torch.nn.functional
STEPS = 6


@pytest.fixture(scope="module")
def batches(minilm_dir):
    """Real pairs of sentences with their gold scores, tokenized."""
    from slimkern.cli.fetch import fetch_demo_files, read_stsb

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir)
    rows = read_stsb(fetch_demo_files().train)[:64]
    made = []
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        texts = [r[0] for r in part] + [r[1] for r in part]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        made.append((dict(tokens), torch.tensor([r[2] / 5 for r in part])))
    return made


def _embed(model, tokens):
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def _step(model, optimizer, batch):
    tokens, gold = batch
    first, second = _embed(model, tokens).chunk(2)
    loss = F.mse_loss(F.cosine_similarity(first, second), gold)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _prune(folder, batches):
    """A masked model after a few real steps, and its optimizer."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    configs = slimkern.parse_auto_slim_config(
        model, ffn2_sparsity=0.8, mha_sparsity=0.6, pruning_scope="local", total_steps=STEPS
    )
    pruning = slimkern.prepare_pruning(model, configs, optimizer)
    for step in range(STEPS):
        _step(model, optimizer, batches[step % len(batches)])
    assert pruning.done
    return model, optimizer


def _off(vectors, exact):
    """The largest error of any entry, relative to the largest entry."""
    return float((vectors.double() - exact).abs().max() / exact.abs().max())


def test_masked_slim_and_reloaded_agree_and_training_goes_on(minilm_dir, batches, tmp_path):
    model, optimizer = _prune(minilm_dir, batches)
    with torch.no_grad():
        masked = [_embed(model, tokens) for tokens, _ in batches]
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-5)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it shares tensors

    slim = slimkern.model_slim(model, optimizer=optimizer)
    assert sum(p.numel() for p in slim.parameters()) == 15_034_176
    assert not any(isinstance(m, MaskedLinear) for m in slim.modules())
    for layer in slim.encoder.layer:
        assert layer.attention.self.num_attention_heads == 5
        assert layer.intermediate.dense.out_features == 320
    precise = copy.deepcopy(slim).double()
    with torch.no_grad():
        after = [_embed(slim, tokens) for tokens, _ in batches]
        exact = [_embed(precise, tokens) for tokens, _ in batches]
    for a, b, want in zip(masked, after, exact):
        # Both round the same function; how far one may be off is read off the other.
        assert _off(a, want) <= 4 * _off(b, want) + torch.finfo(torch.float32).eps

    slimkern.save(slim, tmp_path / "slim", source=minilm_dir)
    loaded = slimkern.load(tmp_path / "slim").eval()
    with torch.no_grad():
        for (tokens, _), want in zip(batches, after):
            assert torch.equal(_embed(loaded, tokens), want)

    # The masked twin, trained with a copy of the same optimizer, takes the same steps.
    for batch in batches:
        loss = _step(slim, optimizer, batch)
        assert loss == pytest.approx(_step(twin, twin_optimizer, batch), rel=1e-5)
    assert optimizer.state[slim.encoder.layer[0].output.dense.weight]["exp_avg"].shape == (384, 320)
