"""Several processes that train as one: `torchrun --nproc_per_node=2 train.py`.

Each process (rank) embeds its share of the batch, gathers the states of all W, computes the loss of
the *whole* batch, and sends its own items' part of the gradient back through its model. Summed over
the ranks, that is exactly the gradient of one process with the whole batch: see the equation in
train.py. (Official code: a rank differentiates its own columns of the gathered matrix only, and
averages; its targets never learn from other ranks' queries.) Without torchrun all is the identity.
"""

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(minutes=30)  # a rank silent for so long counts as dead


def start(device_name):
    """Join the other processes, until this one ends, if torchrun started it; -> the device, each
    rank its own GPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return pick_device(device_name)
    if device_name in ("", "cuda") and torch.cuda.is_available():
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    atexit.register(stop)
    return device


def pick_device(name):
    """The torch device of that name; cuda or else cpu for "". ValueError if it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def stop():
    """Leave the group, so that the other ranks need not wait for this one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def _together(collective, *args, **options):
    """Run a collective; a rank that has died becomes a ConnectionError that says so."""
    try:
        return collective(*args, **options)
    except RuntimeError as error:  # gloo: connection closed; both: timed out
        reason = str(error).splitlines()[0][:120]
        raise ConnectionError(f"another process of this run has died or hangs: {reason}") from error


def gather(tensor):
    """(n, ...) of each rank -> (W * n, ...), rank by rank, without gradient."""
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    _together(dist.all_gather, parts, tensor.detach().contiguous())
    return torch.cat(parts)


def own_part(tensor):
    """(W * n, ...) -> the n rows that `gather` took from this rank."""
    return tensor.chunk(world_size())[rank()]


def sum_gradients(weights):
    """Add up each weight's `.grad` over the ranks, in place."""
    if world_size() > 1:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for work in [_together(dist.all_reduce, g, async_op=True) for g in gradients]:
            _together(work.wait)


def gather_objects(value):
    """Any picklable value of each rank -> the list of all W; so it waits for every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    _together(dist.all_gather_object, values, value)
    return values
