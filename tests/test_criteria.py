"""Importance: the definitions, checked against plain sums; the model is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from slimkern.criteria import ScoreKeeper, element_scores, importance, reduce_units
from slimkern.discovery.groups import Group, Member

HIDDEN, WIDTH, HEADS, HEAD_DIM = 6, 10, 3, 2

FFN = Group("fc2", "ffn", WIDTH, (Member("fc1", 1, "producer"),), (Member("fc2", 1, "consumer"),))
MHA = Group(
    "o",
    "mha",
    HEADS,
    (
        Member("q", 2 * HEAD_DIM, "query"),
        Member("k", HEAD_DIM, "key"),
        Member("v", HEAD_DIM, "value"),
    ),
    (Member("o", 2 * HEAD_DIM, "consumer"),),
)


class Net(nn.Module):
    """An FFN, and linears of the shapes of grouped-query attention (2 query heads per KV head)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)
        wide = 2 * HEADS * HEAD_DIM
        self.q, self.k, self.v = (nn.Linear(HIDDEN, n) for n in (wide, wide // 2, wide // 2))
        self.o = nn.Linear(wide, HIDDEN)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = x + self.fc2(torch.relu(self.fc1(self.dropout(x))))
        values = torch.cat([self.k(x), self.v(x)], -1) * self.q(x)
        return self.o(values)


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(5, HIDDEN) for _ in range(3)]


def loss(outputs, batch):
    return outputs.square().mean()


def gradients(net, batch):
    """By hand, in evaluation mode."""
    fresh = copy.deepcopy(net).eval()
    loss(fresh(batch), batch).backward()
    return {n: p.grad for n, p in fresh.named_parameters()}


@pytest.mark.parametrize("reduce_type", ["mean", "sum", "max"])
def test_a_channel_is_its_column_of_the_second_linear(net, reduce_type):
    scores = reduce_units(net.fc2.weight.detach().abs(), FFN.consumers[0], reduce_type)
    columns = net.fc2.weight.detach().abs()
    for u in range(WIDTH):
        column = columns[:, u]
        wanted = {"mean": column.mean(), "sum": column.sum(), "max": column.max()}[reduce_type]
        torch.testing.assert_close(scores[u], wanted)


@pytest.mark.parametrize("reduce_type", ["mean", "sum", "max"])
def test_a_head_is_the_average_of_its_rows_of_q_k_v_and_its_columns_of_the_output(net, reduce_type):
    keeper = ScoreKeeper([MHA], "magnitude", reduce_type)
    scores = keeper.scores({m: net.get_parameter(f"{m}.weight") for m in "qkvo"})["o"]
    take = {"mean": torch.mean, "sum": torch.sum, "max": torch.max}[reduce_type]
    for u in range(HEADS):
        one, two = slice(u * 2, u * 2 + 2), slice(u * 4, u * 4 + 4)
        parts = [net.q.weight[two], net.k.weight[one], net.v.weight[one], net.o.weight[:, two]]
        wanted = sum(take(p.detach().abs()) for p in parts) / 4
        torch.testing.assert_close(scores[u], wanted)


def test_tied_consumers_count_with_their_average(net):
    tied = Group(
        "fc2", "ffn", WIDTH, FFN.producers, (*FFN.consumers, Member("other", 1, "consumer"))
    )
    weights = {"fc2": net.fc2.weight, "other": torch.ones(HIDDEN, WIDTH)}
    scores = ScoreKeeper([tied], "magnitude").scores(weights)["fc2"]
    torch.testing.assert_close(scores, (net.fc2.weight.detach().abs().mean(0) + 1) / 2)


def test_criteria_over_batches(net, batches):
    grads = [gradients(net, b)["fc2.weight"] for b in batches]
    weight = net.fc2.weight.detach()
    wanted = {
        "magnitude": weight.abs().mean(0),
        "gradient": sum(g.abs() for g in grads).mean(0) / 3,
        "snip": sum((g * weight).abs() for g in grads).mean(0) / 3,
        "snip_momentum": sum((g * weight).abs() * 0.9 ** (2 - i) for i, g in enumerate(grads)).mean(
            0
        ),
    }
    for criterion, expected in wanted.items():
        scores = importance(net, [FFN, MHA], criterion, iter(batches), loss)
        assert set(scores) == {"fc2", "o"}
        assert scores["o"].shape == (HEADS,)
        assert scores["fc2"].dtype == torch.float32
        torch.testing.assert_close(scores["fc2"], expected)


def test_the_maximum_of_sums_is_not_the_sum_of_maxima(net, batches):
    keeper = ScoreKeeper([FFN], "snip_momentum", "max")
    weights = {"fc2": net.fc2.weight.detach()}
    grads = [gradients(net, b)["fc2.weight"] for b in batches]
    for grad in grads:
        keeper.observe(weights, {"fc2": grad})
    elements = sum((g * weights["fc2"]).abs() * 0.9 ** (2 - i) for i, g in enumerate(grads))
    torch.testing.assert_close(keeper.scores(weights)["fc2"], elements.amax(0))
    low = ScoreKeeper([FFN], "snip_momentum", "max", low_memory=True)
    low.observe(weights, {"fc2": grads[0]})
    assert low.state["fc2"].dtype == torch.bfloat16


def test_a_scaled_gradient_is_unscaled(net, batches):
    weights, grad = {"fc2": net.fc2.weight.detach()}, gradients(net, batches[0])["fc2.weight"]
    plain, scaled = ScoreKeeper([FFN], "snip"), ScoreKeeper([FFN], "snip")
    plain.observe(weights, {"fc2": grad})
    scaled.observe(weights, {"fc2": grad * 1024}, scale=torch.tensor(1024.0))
    assert torch.equal(plain.state["fc2"], scaled.state["fc2"])


def test_importance_leaves_gradients_flags_and_modes_as_they_were(net, batches):
    net.train()
    net.dropout.eval()
    net.fc2.weight.requires_grad_(False)
    net.fc1.weight.grad = torch.ones_like(net.fc1.weight)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    importance(net, [FFN], "snip", batches, loss)
    assert net.training
    assert not net.dropout.training
    assert not net.fc2.weight.requires_grad
    assert net.fc1.weight.requires_grad
    assert torch.equal(net.fc1.weight.grad, torch.ones_like(net.fc1.weight))
    assert all(p.grad is None for n, p in net.named_parameters() if n != "fc1.weight")
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_state_is_restored_when_the_model_fails(net):
    with pytest.raises(RuntimeError):
        importance(net, [FFN], "snip", [torch.randn(2, HIDDEN + 1)], loss)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())


def test_batches_go_in_by_keyword_by_position_or_alone_and_the_outputs_may_hold_the_loss(batches):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, scale=1.0):
            return type("Out", (), {"loss": self.net(x).square().mean() * scale})

    group = Group(
        "net.fc2", "ffn", WIDTH, (Member("net.fc1", 1, "producer"),),
        (Member("net.fc2", 1, "consumer"),),
    )  # fmt: skip
    model, x = Holder(), batches[0]
    alone = importance(model, [group], "snip", [x])["net.fc2"]
    keyed = importance(model, [group], "snip", [{"x": x, "scale": 2.0}])["net.fc2"]
    placed = importance(model, [group], "snip", [(x, 2.0)])["net.fc2"]
    torch.testing.assert_close(keyed, 2 * alone)
    torch.testing.assert_close(placed, keyed)


def test_bfloat16_weights_score_in_fp32(net, batches):
    half = net.to(torch.bfloat16)
    scores = importance(half, [FFN], "snip", [b.bfloat16() for b in batches], loss)["fc2"]
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()


def test_a_layer_that_is_all_zero_scores_zero(net, batches):
    nn.init.zeros_(net.fc2.weight)
    assert not importance(net, [FFN], "snip", batches, loss)["fc2"].any()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"criterion": "taylor"}, ValueError, "one of magnitude, gradient, snip, snip_momentum, g"),
        ({"criterion": "snip"}, ValueError, "needs batches="),
        ({"criterion": "snip", "batches": []}, ValueError, "held no batch"),
        ({"criterion": "snip", "batches": [torch.ones(1, HIDDEN)]}, ValueError, "have no .loss"),
        (
            {"criterion": "snip", "batches": [torch.ones(1, HIDDEN)], "loss": lambda o, b: o},
            ValueError,
            "must be a scalar",
        ),
        (
            {
                "criterion": "gradient",
                "batches": [torch.ones(1, HIDDEN)],
                "loss": lambda o, b: (o - o.detach()).square().sum(),
            },
            RuntimeError,
            "fc2: all scores are zero, as every gradient so far was",
        ),
        (
            {
                "criterion": "snip",
                "batches": [torch.ones(1, HIDDEN)],
                "loss": lambda o, b: (o * float("inf")).sum(),
            },
            RuntimeError,
            "fc2: scores are not finite",
        ),
    ],
)
def test_what_can_give_no_score_is_an_error(net, arguments, error, words):
    with pytest.raises(error, match=words):
        importance(net, [FFN], **arguments)


def test_a_group_that_the_loss_does_not_reach_is_an_error(net, batches):
    def without_attention(outputs, batch):
        return net.fc2(torch.relu(net.fc1(batch))).sum()

    with pytest.raises(RuntimeError, match="o: no gradient has reached its weights"):
        importance(net, [FFN, MHA], "snip", batches, without_attention)
    with pytest.raises(ValueError, match="a scalar that depends on the weights"):
        importance(net, [MHA], "snip", batches, without_attention)


def test_unknown_names_are_errors(net):
    with pytest.raises(ValueError, match="reduce_type must be one of mean, sum, max, got 'median'"):
        reduce_units(net.fc2.weight, FFN.consumers[0], "median")
    with pytest.raises(ValueError, match="'snip' needs a gradient"):
        element_scores(net.fc2.weight, None, "snip")
