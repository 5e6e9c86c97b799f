"""What can't be calibrated is refused with the place; the user's model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibration_cases import Blocks, batches_of, blocks, texts, torch_encoder, vectors
from tiny_models import FAMILIES, randomize
from torch import Tensor, nn

from slimkern import one_shot
from slimkern.calibration.batches import read_batches
from slimkern.calibration.store import Store
from slimkern.calibration.walk import Walk
from slimkern.copies import sharing_copy
from slimkern.discovery import discover


class Inner(nn.Module):
    """Runs ``hide(self, x)``."""

    def __init__(self, hide: Any) -> None:
        super().__init__()
        self.hide = hide
        self.register_buffer("state", torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.hide(self, x)


class Hiding(nn.Module):
    """``hide(inner, x)`` runs inside of a module, ``seek(inner, x)`` after each of three FFNs."""

    def __init__(self, hide: Any, seek: Any) -> None:
        super().__init__()
        self.inner, self.seek = Inner(hide), seek
        self.body = nn.ModuleList(
            nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 10)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for body in self.body:
            x = self.seek(self.inner, x + body(x))
        return torch.tanh(x)


def keep_attribute(inner: Inner, x: Tensor) -> Tensor:
    inner.kept = 2 * x
    return x + 1


def write_buffer(inner: Inner, x: Tensor) -> Tensor:
    inner.state.copy_(x[0])
    return x + 1


def change_by_another_name(inner: Inner, x: Tensor) -> Tensor:
    inner.state.view(2, 5).add_(x[0].view(2, 5))
    return x + 1


def keep_number(inner: Inner, x: Tensor) -> Tensor:
    inner.scale = float(x.abs().max())
    return x + 1


@pytest.mark.parametrize(
    ("hide", "seek"),
    [
        (keep_attribute, lambda inner, x: x + inner.kept),
        (write_buffer, lambda inner, x: x + inner.state),
        (change_by_another_name, lambda inner, x: x + inner.state),
    ],
)
def test_a_forward_that_hides_a_tensor(hide, seek):
    with pytest.raises(ValueError, match="'inner' makes a tensor that is used later, and does not"):
        one_shot(randomize(Hiding(hide, seek)), vectors(), 0.5, round_multiplier=4)


def test_a_forward_that_hides_a_number():
    model = randomize(Hiding(keep_number, lambda inner, x: x * inner.scale))
    with pytest.raises(ValueError, match="its result depends on more than"):
        one_shot(model, vectors(), 0.5, round_multiplier=4)


def test_outputs_that_share_memory_and_are_changed_later():
    class Views(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x * 1
            return x, x[:5]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.views, self.body = Views(), blocks(lambda m, x, h: x + h)

        def forward(self, x: Tensor) -> Tensor:
            x, part = self.views(x)
            y = self.body(x)
            part.mul_(2)
            return y + self.body.out(x)

    with pytest.raises(ValueError, match="'views' returned tensors that share memory"):
        one_shot(randomize(Model()), vectors(), 0.5, round_multiplier=4)


def test_a_layer_that_is_called_twice():
    class Twice(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            self.second[0](self.first[0](x))
            return super().forward(x)

    model = blocks(lambda m, x, h: x + h)
    groups = discover(model, vectors()[0]).groups
    model.__class__ = Twice
    batches = read_batches(model, vectors())
    with Store(0) as store, pytest.raises(ValueError, match=r"'second\.0' is called 2 times"):
        Walk(model, sharing_copy(model), groups, batches, store, 100)


@pytest.mark.parametrize("options", [{"ffn2_sparsity": 0.5}, {"target_macs": 1e9}], ids=str)
@pytest.mark.parametrize("sequential", [True, False])
def test_activations_that_are_not_finite_name_the_layer(options, sequential):
    model = FAMILIES["bert"]()
    model.encoder.layer[1].output.LayerNorm.weight.data[3] = float("nan")
    with pytest.raises(
        ValueError, match=r"'encoder\.layer\.2\..*output\.dense': .* NaN or infinite"
    ):
        one_shot(model, texts(), round_multiplier=8, sequential=sequential, **options)


def test_padding_may_be_anything():
    """What a model makes of padding is no token: not even NaN there is looked at."""
    batches = batches_of("torch")
    model = torch_encoder()
    plan = one_shot(model, batches, 0.5, round_multiplier=4).plan
    for batch in batches:
        batch["src"][batch["src_key_padding_mask"]] = 1e6
    assert one_shot(model, batches, 0.5, round_multiplier=4).plan == plan


class _StopError(Exception):
    pass


@pytest.mark.parametrize("stage", [0, 3, 5])
def test_the_model_is_left_as_it_was(stage):
    """Also where an error ends it in the middle."""
    model = FAMILIES["bert"]()
    model.train()
    model.encoder.layer[1].eval()
    own = model.pooler.forward
    model.pooler.forward = own  # somebody's own override
    handle = model.embeddings.register_forward_hook(lambda m, args, output: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {id(t) for t in (*model.parameters(), *model.buffers())}
    modes = [m.training for m in model.modules()]
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    registered, fast = hooks(), torch.backends.mha.get_fastpath_enabled()

    def progress(name: str, done: int, total: int) -> None:
        if (name, done) == ("slim and repair", stage):
            raise _StopError

    def fails_inside(*args: Any) -> None:
        raise _StopError

    with pytest.raises(_StopError):
        one_shot(model, texts(), 0.5, 0.5, round_multiplier=8, progress=progress)
    broken = model.encoder.layer[2].output.LayerNorm.register_forward_pre_hook(fails_inside)
    with pytest.raises(_StopError):
        one_shot(model, texts(), 0.5, 0.5, round_multiplier=8)
    broken.remove()
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert model.pooler.__dict__["forward"] is own
    assert hooks() == registered
    assert [m.training for m in model.modules()] == modes
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == tensors
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    handle.remove()
