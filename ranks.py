"""Several processes, one job: what `torchrun --nproc_per_node=N train.py …` needs. In a single process nothing here does anything.

All ranks walk through the same stages with the same random numbers. They share out the shards of rollouts; of a training batch
each takes every N-th sequence, divides its loss by what the whole batch weighs, or an average one, and the gradients are summed: the same update as
that of one rank, up to rounding.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist


def join(folder, device):
    """Meet the other ranks, if torchrun started this process, each on a GPU of its own unless `device` is "cpu".
    All but the first talk to a file in `folder`."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3))  # of an evaluation, or a rank's shards
    if rank():
        file = Path(folder, f"rank{rank()}.log")
        file.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout = sys.stderr = open(file, "a", buffering=1)


def leave():
    if dist.is_initialized():
        # the first one has the table to make; a rank that left before it has been seen to abort at its exit, after which torchrun stops all
        dist.barrier()
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(items):
    """This rank's part of a list."""
    return items[rank()::ranks()]


def summed(value):
    """A metric of `optim.optimise` that is a sum over all ranks, of which this rank has its part: (sum, count).
    The first rank has one of every batch, and counts."""
    return value, int(rank() == 0)


def wait():
    """Until all ranks are here."""
    if ranks() > 1:
        dist.barrier()


def first_says(value):
    """The first rank's value."""
    if ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cuda") if dist.get_backend() == "nccl" else None)
    return box[0]


def everyones(value):
    """The values of all ranks, in order."""
    if ranks() == 1:
        return [value]
    box = [None] * ranks()
    dist.all_gather_object(box, value)
    return box


def sum_gradients(model, *flags):
    """Sum the gradients over the ranks, in place. -> for each flag whether it is set on any rank"""
    if ranks() == 1:
        return flags
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients] + [gradients[0].new_tensor(flags)])
    dist.all_reduce(flat)
    for p, g in zip(parameters, flat.split([*(p.numel() for p in parameters), len(flags)])):
        p.grad = g.view_as(p).clone()
    return [bool(flag) for flag in flat[-len(flags):]]
