"""Block patterns: what their texts mean, exact counts, and selection against plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import slow_blocks, slow_items, slow_lowest

from slimkern.patterns.pattern import block_pattern
from slimkern.patterns.scores import BlockScores, BlockTarget, reduce_blocks
from slimkern.patterns.selection import group_elements, group_scores, lowest, select_items

ANY = block_pattern("1x1")


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("4x1", (4, 1)), ("1x16", (1, 16)), ("32x32", (32, 32)), ("1x1", (1, 1)), ("2:4", (1, 1)),
        ("channelx2", (17, 2)), ("channelx1", (17, 1)), ("1xchannel", (1, 63)),
        ("8xchannel", (8, 63)),
    ],
)  # fmt: skip
def test_a_block_is_outputs_times_inputs(text, block):
    assert block_pattern(text).block((17, 63)) == block


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0x4", "at least one output"), ("4x0", "at least one output"), ("4:2", "0 < N < M"),
        ("0:4", "0 < N < M"), ("4:4", "0 < N < M"), ("channelxchannel", "the whole layer"),
        ("4y1", "accepted: NxM"), ("", "accepted: NxM"), ("4x1 ", "accepted: NxM"),
    ],
)  # fmt: skip
def test_what_is_no_pattern_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        block_pattern(text)


@pytest.mark.parametrize(
    ("text", "sparsity", "items", "gone"),
    [
        ("4x1", 0.29, 100, 29), ("4x1", 0.3, 9, 2), ("1x1", 0.57, 10_000_000, 5_700_000),
        ("1x1", 1 / 3, 3, 1), ("2:4", 0.5, 7, 7), ("1:3", 1 / 3, 1000, 1000), ("2:4", 0.3, 10, 6),
        ("4x1", 0.0, 10, 0),
    ],
)  # fmt: skip
def test_counts_are_exact(text, sparsity, items, gone):
    assert block_pattern(text).items(sparsity, items) == gone


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 4).map(float), min_size=1, max_size=40),
    st.data(),
)
def test_the_lowest_are_exactly_as_many_and_ties_go_by_order(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    gone = lowest(torch.tensor(scores), count)
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    assert gone.nonzero().flatten().tolist() == sorted(order[:count])


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.lists(st.integers(-1, 3).map(float), min_size=1, max_size=30),
        min_size=1,
    ),
    st.integers(0, 98),
    st.sampled_from(["local", "global"]),
    st.integers(0, 50),
    st.integers(50, 100),
)
def test_selection_is_that_of_plain_python(scores, percent, scope, low, high):
    sparsity, least, most = percent / 100, min(low, percent) / 100, max(high, percent) / 100
    gone, notes = select_items(
        {n: torch.tensor(s) for n, s in scores.items()}, ANY, sparsity,
        scope=scope, min_sparsity=least, max_sparsity=most,
    )  # fmt: skip
    cap = {n: slow_items(most, len(s)) for n, s in scores.items()}
    if scope == "local":
        counts = {n: min(cap[n], slow_items(sparsity, len(s))) for n, s in scores.items()}
        expected = {n: slow_lowest({n: scores[n]}, counts[n], {n: 0}, cap)[n] for n in scores}
    else:
        floor = {n: min(cap[n], slow_items(least, len(s))) for n, s in scores.items()}
        total = slow_items(sparsity, sum(map(len, scores.values())))
        expected = slow_lowest(scores, total, floor, cap)
        reached = sum(map(len, expected.values()))
        assert bool(notes) == (reached != total), "what the limits forbid is said, nothing else"
    assert {n: set(g.nonzero().flatten().tolist()) for n, g in gone.items()} == expected


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.integers(0))
@pytest.mark.parametrize("reduce_type", ["mean", "sum", "max"])
def test_blocks_are_reduced_as_by_two_loops(reduce_type, rows, cols, bn, bk, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    elements = torch.rand(rows, cols, dtype=torch.float64, generator=generator)
    expected = torch.tensor(
        slow_blocks(elements.tolist(), (bn, bk), reduce_type), dtype=torch.float64
    )
    torch.testing.assert_close(reduce_blocks(elements, (bn, bk), reduce_type), expected)
    transposed = elements.t().contiguous().t()
    torch.testing.assert_close(reduce_blocks(transposed, (bn, bk), reduce_type), expected)


@settings(deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 4), st.sampled_from(["1:2", "2:4", "3:4", "1:3"]),
    st.integers(0), st.sampled_from(["mean", "sum", "max"]),
)  # fmt: skip
def test_groups_lose_their_lowest_or_nothing(rows, groups, text, seed, reduce_type):
    pattern = block_pattern(text)
    generator = torch.Generator().manual_seed(seed % 2**31)
    elements = torch.randint(0, 4, (rows, groups * pattern.of), generator=generator).float()
    scores = group_scores(elements, pattern, reduce_type)
    gone = torch.rand(len(scores), generator=generator) < 0.5
    dead = group_elements(elements, gone, pattern).view(-1, pattern.of)
    for group, own, goes, score in zip(
        elements.view(-1, pattern.of).tolist(), dead.tolist(), gone.tolist(), scores.tolist()
    ):
        lowest_first = sorted(range(pattern.of), key=lambda i: (group[i], i))[: pattern.zeros]
        least = [group[i] for i in lowest_first]
        assert [i for i, d in enumerate(own) if d] == (sorted(lowest_first) if goes else [])
        means = {"mean": sum(least) / len(least), "sum": sum(least), "max": max(least)}
        assert score == pytest.approx(means[reduce_type])


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("reduce_type", ["mean", "sum", "max"])
def test_momentum_is_a_decaying_sum_of_elements(reduce_type, low_memory):
    target = BlockTarget("a", (17, 63), (4, 5))
    keeper = BlockScores([target], "snip_momentum", reduce_type, low_memory)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(17, 63, generator=generator)
    total = torch.zeros(17, 63, dtype=torch.float64)
    for _ in range(5):
        grad = torch.randn(17, 63, generator=generator)
        keeper.observe({"a": weight}, {"a": grad * 8}, scale=8.0)
        total = 0.9 * total + (weight.double() * grad.double()).abs()
    expected = reduce_blocks(total, (4, 5), reduce_type)
    assert keeper.state["a"].dtype == (torch.bfloat16 if low_memory else torch.float32)
    # Five roundings of what is stored, and those of the sums of up to 20 numbers.
    eps = torch.finfo(keeper.state["a"].dtype).eps
    bound = (5 * eps + 32 * torch.finfo(torch.float32).eps) * expected
    assert ((keeper.scores({"a": weight})["a"] - expected).abs() <= bound).all()


def test_a_transposed_layer_is_scored_as_outputs_times_inputs():
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    stored = BlockScores([BlockTarget("a", (12, 20), (4, 1), transposed=True)], "magnitude")
    plain = BlockScores([BlockTarget("a", (12, 20), (4, 1))], "magnitude")
    expected = plain.scores({"a": weight.t().contiguous()})["a"]
    torch.testing.assert_close(stored.scores({"a": weight})["a"], expected)


def test_weights_of_kept_blocks_are_counted_with_ragged_ones():
    target = BlockTarget("a", (17, 63), (4, 10))
    kept = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    dense = kept.repeat_interleave(4, 0)[:17].repeat_interleave(10, 1)[:, :63]
    assert target.weights(kept) == int(dense.sum())
