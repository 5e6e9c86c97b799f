"""Masked training as a GPU does it: a whole model, in the interpreter and on a GPU."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import tiny_models
import torch
from masked_cases import plan_for
from torch.nn import functional as F

import slimkern
from slimkern.auto_slim import model_slim, parse_auto_slim_config, prepare_pruning
from slimkern.masks import carried_masks
from slimkern.ops._registry import prefer_backend
from slimkern.surgery import mask_

pytest.importorskip("transformers")
pytest.importorskip("triton", reason="Triton is not installed on this platform")

from triton_cases import DEVICES

GPU = torch.cuda.is_available()
SMALL = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def tiny_bert(**options):
    model = tiny_models.FAMILIES["bert"]("ForSequenceClassification", **{**SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)  # a course that does not blow up roundings
    return model.train()


def course(model, backend=None, steps=2, autocast=None, device="cpu", **scaling):
    """Losses and parameters of AdamW's steps, masks growing; the pruning that moved them."""
    options = {"pruning_scope": "local", "start_step": 0, "end_step": 1, "pruning_frequency": 1}
    configs = parse_auto_slim_config(
        model, ffn2_sparsity=0.5, mha_sparsity=0.5, round_multiplier=8, **options
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruning = prepare_pruning(model, configs, optimizer)
    scaler = torch.amp.GradScaler(device, **scaling)
    losses = []
    torch.manual_seed(5)
    for step in range(steps):
        given = tiny_models.text_inputs(batch=2, length=5, seed=step)
        given = {name: tensor.to(device) for name, tensor in given.items()}
        labels = torch.tensor([step % 2, 1], device=device)

        chosen = nullcontext() if backend is None else prefer_backend(backend)
        with chosen:
            with torch.autocast(device, autocast, enabled=autocast is not None):
                loss = F.cross_entropy(model(**given).logits.float(), labels)
            scaler.scale(loss).backward()
        losses.append(loss.detach())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return torch.stack(losses), [p.detach().clone() for p in model.parameters()], pruning


@pytest.mark.skipif(GPU, reason="no interpreter where there is a GPU")
def test_a_step_of_training_is_that_of_the_cpu():
    """Forward, backward, AdamW and two mask updates, dropout at the same places.

    Bounded by the rounding of float32 on the way: a step of AdamW is at most the learning rate, in
    the direction of a gradient that is known to some 1e-5 of itself where it is no rounding itself.
    """
    model = tiny_bert()
    want, parameters, pruning = course(copy.deepcopy(model))
    got, others, same = course(model, "triton")
    assert [b.aside for b in slimkern.masked_blocks(model)] == [None]
    assert same.plan() == pruning.plan()
    assert all(len(entry.keep) < entry.group.num_units for entry in same.plan())
    assert ((got - want).abs() / want).max() < 1e-5
    off = torch.cat([(a - b).abs().flatten() for a, b in zip(others, parameters, strict=True)])
    assert off.max() <= 2 * 2 * 1e-3  # two steps in opposite directions: gradients of rounding
    assert (off > 1e-5).double().mean() < 0.01


@pytest.mark.skipif(GPU, reason="no interpreter where there is a GPU")
def test_gradients_of_a_whole_model_are_those_of_the_cpu():
    model = mask_(model := tiny_bert(), plan_for(model))
    given = tiny_models.text_inputs(batch=2, length=5)
    found = []
    for backend in ("cpu", "triton"):
        model.zero_grad()
        torch.manual_seed(7)
        with prefer_backend(backend):
            model(**given).logits.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    largest = max(g.abs().max() for g in found[0])
    for want, got in zip(*found, strict=True):
        scale = torch.maximum(want.abs().max(), 1e-3 * largest)
        # Sums of at most a hundred terms in three chained products: some hundred roundings.
        assert (got - want).abs().max() <= 300 * 2.0**-24 * scale
        assert torch.equal(got == 0, want == 0) or (got - want).abs().max() < 1e-6 * scale


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast_with_a_scaler(dtype, device):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(device)
    want, _, _ = course(copy.deepcopy(model).double(), device=device, enabled=False)
    scaling = {"init_scale": 256.0, "enabled": dtype == torch.float16}
    backend = None if device == "cuda" else "triton"
    got, parameters, pruning = course(model, backend, autocast=dtype, device=device, **scaling)
    assert pruning.step == 2
    assert all(p.dtype == torch.float32 for p in parameters)
    # Three products in a row in dtype, then the classifier: a few of its roundings.
    assert ((got - want).abs() / want).max() <= 16 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_the_whole_road_on_a_gpu(autocast):
    """Prune while training, slim: every mask, block and cut on the device."""
    model = tiny_bert(num_hidden_layers=2).cuda()
    before = copy.deepcopy(model)
    _, _, pruning = course(model, steps=3, autocast=autocast, device="cuda", enabled=False)
    assert pruning.done
    assert len(slimkern.masked_blocks(model)) == 2
    for entry in carried_masks(model):
        for member in entry.group.consumers:
            linear = model.get_submodule(member.name)
            dead = torch.ones(linear.in_features, dtype=torch.bool, device="cuda")
            dead[linear.cols] = False
            assert (linear.weight[:, dead] == 0).all()
    given = {n: t.cuda() for n, t in tiny_models.text_inputs().items()}
    dense = before.eval()
    dense.load_state_dict(model.state_dict())
    with torch.no_grad():
        want = dense(**given).logits
        masked = model.eval()(**given).logits
        slim = model_slim(model)(**given).logits
    for got in (masked, slim):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert all(p.is_cuda for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_graph_holds_a_step_of_training():
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = mask_(model, plan_for(model)).cuda()
    ids = tiny_models.text_inputs()["input_ids"].cuda()

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            y = model.bert(input_ids=ids).last_hidden_state
        y.float().square().sum().backward()
        return [p.grad for p in model.bert.encoder.parameters()]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = [g.clone() for g in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
