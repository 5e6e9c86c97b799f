"""Block patterns trained on the Triton kernels, and on a GPU, end as they do on the CPU."""

from __future__ import annotations

import io

import pytest
import torch
from pattern_cases import PATTERNS, Net, batch, started

import slimkern
from slimkern.patterns.masks import block_masked

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from triton_cases import DEVICES

RUNS = [(pattern, "snip_momentum", {}) for pattern in PATTERNS]
RUNS += [("4x1", kind, {}) for kind in ("magnitude", "snip")]
RUNS += [("4x1", "gradient", {"regrow": True}), ("2:4", "gradient", {"regrow": True})]


def trained(device, backend, pattern, kind, more, dtype=torch.float32):
    """A model, its run and its losses after a few steps and changes of masks."""
    model = Net().to(device, dtype)
    run, optimizer = started(model, pattern, pruning_type=kind, end_step=5, **more)
    losses = []
    for step in range(7):
        for module in block_masked(model).values():
            module.backend = backend
        x = batch(step).to(device, dtype)
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, run, torch.stack(losses).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("pattern", "kind", "more"), RUNS)
def test_masked_training_ends_as_on_the_cpu(pattern, kind, more, device):
    if device == "cpu" and pattern not in ("4x1", "2:4", "32x32"):
        pytest.skip("the interpreter is slow; a GPU runs every pattern")
    want, other, losses = trained("cpu", "reference", pattern, kind, more)
    got, run, seen = trained(device, "triton" if device == "cpu" else None, pattern, kind, more)
    assert run.done
    assert run.sparsity() == other.sparsity()
    torch.testing.assert_close(seen, losses, rtol=1e-4, atol=1e-6)
    masks = {name: module.mask.dense().cpu() for name, module in block_masked(got).items()}
    assert set(masks) == set(block_masked(want))
    for name, module in block_masked(want).items():
        assert torch.equal(masks[name], module.mask.dense()), name
    for (name, a), (_, b) in zip(got.state_dict().items(), want.state_dict().items()):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-3, msg=name)
    slim = slimkern.model_slim(got, [batch(0).to(device)])
    x = batch(9)
    torch.testing.assert_close(slim(x.to(device)).cpu(), want(x), rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_masked_model_moves_and_resumes_between_devices():
    model, run, _ = trained("cuda", None, "4x1", "snip_momentum", {})
    x = batch(9)
    there = model(x.to("cuda")).detach().cpu()
    assert all(bits.device.type == "cpu" for bits in run.state_dict()["blocks"].values())
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    fresh = Net()
    fresh.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    again, _ = started(fresh, "4x1", pruning_type="snip_momentum", end_step=5)
    again.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(fresh(x), there, rtol=1e-4, atol=1e-5)
    assert again.sparsity() == run.sparsity()
    torch.testing.assert_close(model.cpu()(x), there, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), there, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("pattern", ["4x1", "32x32", "2:4"])
def test_under_autocast(pattern, dtype):
    model, _, _ = trained("cuda", None, pattern, "snip_momentum", {})
    x = batch(9).cuda().requires_grad_()
    results = {}
    for backend in (None, "reference"):
        for module in block_masked(model).values():
            module.backend = backend
        model.zero_grad()
        x.grad = None
        with torch.autocast("cuda", dtype):
            y = model(x)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        grads = [parameter.grad for parameter in model.parameters()]
        assert all(grad.dtype == torch.float32 for grad in grads)
        results[backend] = [y.float(), x.grad, *grads]
    for got, want in zip(results[None], results["reference"]):
        torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2 * want.abs().max().item())
