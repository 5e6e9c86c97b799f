"""A masked training step against eager's dense step: `python bench/masked_step.py`.

Model: the encoder of all-MiniLM-L6-v2's shape (6 layers of width 384, 12 heads, FFN 1536), random
weights, fp32. The step is forward, backward and a fused AdamW. The two candidates run in turns; a
check that the masked model equals the zeroed dense model comes first.
"""

from __future__ import annotations

import argparse
import copy

import torch
from transformers import BertConfig, BertModel

import slimkern
from slimkern.machine import machine_line
from slimkern.timing import time_interleaved


def build() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


def step_of(model: BertModel, ids: torch.Tensor):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> torch.Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            loss = model(input_ids=ids).last_hidden_state.pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def masked_pair(dense: BertModel, ffn: float, heads: float) -> tuple[BertModel, BertModel]:
    """A masked copy, and a dense copy with the same zeros."""
    masked = copy.deepcopy(dense)
    found = slimkern.discover(masked)
    scores = slimkern.importance(masked, found, criterion="magnitude")
    plan = slimkern.make_plan(found, scores, ffn_sparsity=ffn, mha_sparsity=heads)
    slimkern.mask_(masked, plan)
    zeroed = copy.deepcopy(dense)
    zeroed.load_state_dict(masked.state_dict())
    return masked, zeroed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine_line())
    dense = build()
    ids = torch.randint(0, 1000, (args.batch, args.tokens))
    print("  FFN heads  dense ms masked ms  masked/dense: min (median)")
    for ffn, heads in ((0, 0), (0.05, 0.08), (0.25, 0.25), (0.5, 0.5), (0.8, 0.6)):
        masked, zeroed = masked_pair(dense, ffn, heads)

        def check(outputs: dict[str, object]) -> None:
            a, b = (float(outputs[n]) for n in ("dense", "masked"))  # type: ignore[arg-type]
            if abs(a - b) > 1e-5 * abs(a):
                raise AssertionError(f"losses differ: dense {a}, masked {b}")

        times = time_interleaved(
            {"dense": step_of(zeroed, ids), "masked": step_of(masked, ids)},
            check=check,
            rounds=args.rounds,
            threads=args.threads,
        )
        d, m = times["dense"], times["masked"]
        print(
            f"{ffn:5.2f} {heads:5.2f} {d.minimum * 1e3:9.1f} {m.minimum * 1e3:9.1f} "
            f"{m.minimum / d.minimum:18.3f} ({m.median / d.median:.3f})"
        )


if __name__ == "__main__":
    main()
