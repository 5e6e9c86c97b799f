"""Block masks: what their bits mean, round trips, densities, refusals."""

from __future__ import annotations

import pytest
import torch
from block_mask_cases import CASES, IDS, make_mask

from slimkern.ops import BlockMask


def test_the_bits_are_as_documented():
    kept = torch.zeros(2, 10, dtype=torch.bool)
    kept[0, 0] = kept[0, 9] = kept[1, 3] = True
    mask = BlockMask.from_blocks(kept, (4, 1), (7, 10))
    assert mask.bits.tolist() == [[1, 2], [8, 0]]
    assert (mask.block, mask.shape) == ((4, 1), (7, 10))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_blocks_and_elements_agree(case):
    mask = make_mask(case)
    blocks, dense = mask.blocks(), mask.dense()
    assert dense.shape == (case.N, case.K)
    again = BlockMask.from_blocks(blocks, case.block, (case.N, case.K))
    assert torch.equal(again.bits, mask.bits)
    n, k = torch.meshgrid(torch.arange(case.N), torch.arange(case.K), indexing="ij")
    assert torch.equal(dense, blocks[n // case.block[0], k // case.block[1]])
    if dense.numel():
        assert mask.density == pytest.approx(dense.double().mean().item(), abs=1e-15)


def test_bits_beyond_the_last_block_mean_nothing():
    mask = BlockMask(torch.full((3, 1), 0xF8, dtype=torch.uint8), (1, 1), (3, 3))
    assert not mask.dense().any()
    assert mask.density == 0


def test_an_empty_weight_leaves_nothing_out():
    mask = BlockMask.from_blocks(torch.ones(0, 3, dtype=torch.bool), (4, 1), (0, 3))
    assert mask.density == 1
    assert mask.dense().shape == (0, 3)


def test_moving():
    mask = BlockMask.from_blocks(torch.ones(2, 3, dtype=torch.bool), (4, 1), (8, 3))
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert (moved.bits.device.type, moved.block, moved.shape) == ("meta", (4, 1), (8, 3))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BlockMask(torch.ones(2, 1), (4, 1), (8, 3)), TypeError, "bits is torch.float32"),
        (lambda: BlockMask([1], (4, 1), (8, 3)), TypeError, "bits is list; accepted"),
        (
            lambda: BlockMask(torch.ones(2, 2, dtype=torch.uint8), (4, 1), (8, 3)),
            ValueError,
            r"bits has shape \(2, 2\); accepted: \(2, 1\)",
        ),
        (
            lambda: BlockMask(torch.ones(2, 1, dtype=torch.uint8), (0, 1), (8, 3)),
            ValueError,
            r"block is \(0, 1\); accepted",
        ),
        (
            lambda: BlockMask(torch.ones(2, 1, dtype=torch.uint8), (4, 1), (8,)),
            ValueError,
            r"shape is \(8,\); accepted",
        ),
        (
            lambda: BlockMask.from_blocks(torch.ones(2, 3), (4, 1), (8, 3)),
            TypeError,
            "kept has dtype torch.float32; accepted: torch.bool",
        ),
        (
            lambda: BlockMask.from_blocks(torch.ones(3, 3).bool(), (4, 1), (8, 3)),
            ValueError,
            r"kept has shape \(3, 3\); accepted: \(2, 3\)",
        ),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
