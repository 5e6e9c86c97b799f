"""Masked fine-tuning in several processes, and the slim model at the end.

    torchrun --nproc-per-node 2 examples/train_parallel.py --output slim            # DDP
    torchrun --nproc-per-node 2 examples/train_parallel.py --output slim --shard    # FSDP2

The task is made up (does the first token come again?), so that nothing is downloaded; ``--model``
takes a folder or a hub name. One process (``python examples/train_parallel.py``) trains on the same
batches and ends with the same masks.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, BertConfig

import slimkern


def make_model(name):
    """The dense model: the same weights on every rank."""
    torch.manual_seed(0)
    if name is not None:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    config = BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=32, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


def batch_of(step, rows, rank, size, device):
    """This rank's rows of the step's global batch."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(4, 64, (rows, 12), generator=generator)
    again = torch.rand(rows, generator=generator) < 0.5
    ids[again, 7] = ids[again, 0]
    labels = (ids[:, 1:] == ids[:, :1]).any(1).long()
    share = slice(rank * rows // size, (rank + 1) * rows // size)
    return {"input_ids": ids[share].to(device), "labels": labels[share].to(device)}


def sharded(model):
    """The model in the slices of fully_shard, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.base_model.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def plain(model, options):
    """What model_slim takes: the module itself, or on rank 0 a whole copy of a sharded one."""
    if not options.shard:
        return model
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)  # every rank takes part
    if dist.get_rank():
        return None
    copy = make_model(options.model)
    copy.load_state_dict(state)
    return copy


def main(arguments=None):
    """Train, slim, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub name; a small random BERT by default")
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=32, help="per step, of all processes together")
    parser.add_argument("--output", default="slim-parallel")
    options = parser.parse_args(arguments)

    gpu, several = torch.cuda.is_available(), "RANK" in os.environ
    if several:
        dist.init_process_group("nccl" if gpu else "gloo")
    elif options.shard:
        parser.error("--shard needs torchrun")
    rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    device = torch.device("cpu")
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    model = make_model(options.model).to(device)
    configs = slimkern.parse_auto_slim_config(
        model, ffn2_sparsity=0.75, mha_sparsity=0.5, pruning_scope="local",
        total_steps=options.steps,
    )  # fmt: skip
    if options.shard:
        model = trained = sharded(model)
    else:
        trained = DistributedDataParallel(model) if several else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    pruning = slimkern.prepare_pruning(model, configs, optimizer)  # by every rank, after sharding

    for step in range(options.steps):
        loss = trained(**batch_of(step, options.rows, rank, size, device)).loss
        loss.backward()
        optimizer.step()  # every rank's masks move here, and are the same
        optimizer.zero_grad()
        if rank == 0 and (step + 1) % 50 == 0:
            reached = pruning.sparsity()
            print(f"step {step + 1}: loss {loss:.3f}, removed {reached.total:.1%}", flush=True)

    small = plain(model, options)
    if small is not None:
        small = slimkern.slim_(small, pruning.plan())
        slimkern.save(small, options.output)  # rank 0 writes, whoever calls
    if several:
        dist.barrier()  # now every rank may load it
    small = slimkern.load(options.output)
    width = small.base_model.encoder.layer[0].output.dense.in_features
    print(f"rank {rank}: FFN of {width} channels, saved to {options.output}", flush=True)
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
