"""What each rank of tests/test_sync.py runs: real processes over gloo, results into a file."""

import copy
import pickle
import time
import warnings
from datetime import timedelta
from pathlib import Path

import ranks
import torch
import torch.distributed as dist
from torch import nn

import gammabeta as gb


def cut(x: torch.Tensor, sizes: list[int], rank: int) -> torch.Tensor:
    start = sum(sizes[:rank])
    return x[start : start + sizes[rank]]


def inputs(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (16, 3, 4)):
    generator = torch.Generator().manual_seed(5)
    make = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    x, residual, target = make(*shape) * 3 + 2, make(*shape), make(*shape)
    mask = torch.rand(shape[0], *shape[2:], generator=generator) > 0.3
    return x.to(dtype), residual.to(dtype), target.to(dtype), mask


def step(layer, x, residual, target, mask=None, twice=True):
    """Output, first and second derivatives of a sum loss, and the buffers after it."""
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    y = layer(x, residual, mask) if isinstance(layer, gb.BatchNormAct1d) else layer(x, mask)
    loss = (torch.sin(y) * target).sum()
    operands = [x, layer.weight, layer.bias]
    if isinstance(layer, gb.BatchNormAct1d):
        operands.append(residual)
    first = torch.autograd.grad(loss, operands, create_graph=twice)
    found = {"y": y, "dx": first[0], "dweight": first[1], "dbias": first[2]}
    if len(first) == 4:
        found["dresidual"] = first[3]
    if twice:
        again = sum((g * torch.cos(g)).sum() for g in first[:1])
        second = torch.autograd.grad(again, [x, layer.weight])
        found |= {"ddx": second[0], "ddweight": second[1]}
    found |= {name: b.clone() for name, b in layer.named_buffers()}
    return {name: value.detach() for name, value in found.items()}


def make_layer(act: bool, dtype=torch.float64):
    torch.manual_seed(1)
    layer = (gb.BatchNormAct1d(3, act="silu") if act else gb.BatchNorm1d(3)).to(dtype)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.uniform_(-1, 1)
    return layer


def laws(rank: int, size: int, sizes: list[int]) -> dict:
    found = {}
    for act in (False, True):
        for masked in (False, True):
            x, residual, target, mask = inputs()
            layer = make_layer(act)
            gb.sync_statistics(layer)
            parts = [cut(t, sizes, rank) for t in (x, residual, target)]
            part = cut(mask, sizes, rank) if masked else None
            found[f"act={act} mask={masked}"] = step(layer, *parts, part)
    x, residual, target, _ = inputs(torch.bfloat16)
    layer = make_layer(False, torch.bfloat16)
    gb.sync_statistics(layer)
    found["bfloat16"] = step(
        layer, *(cut(t, sizes, rank) for t in (x, residual, target)), None, False
    )

    # channels-last, as a convolution hands it on
    x, _, target, _ = inputs(torch.float32, (16, 3, 4, 4))
    layer = gb.BatchNorm2d(3)
    gb.sync_statistics(layer)
    last = cut(x, sizes, rank).contiguous(memory_format=torch.channels_last)
    found["channels-last"] = step(layer, last, last, cut(target, sizes, rank), None, False)

    layer = make_layer(False)
    gb.sync_statistics(layer)
    compiled = torch.compile(layer, backend="aot_eager")
    x, *_ = inputs()
    found["compiled"] = {"y": compiled(cut(x, sizes, rank)).detach()}

    # more channels than one message holds
    x, _, target, _ = inputs(shape=(16, 1500))
    layer = gb.BatchNorm1d(1500).double()
    gb.sync_statistics(layer)
    found["many channels"] = step(
        layer, cut(x, sizes, rank), cut(x, sizes, rank), cut(target, sizes, rank), None, False
    )
    return found


def training(rank: int, size: int, sizes: list[int]) -> dict:
    """Five steps inside DistributedDataParallel; it averages gradients over the ranks."""
    x, _, _, _ = inputs(shape=(16, 3))
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 3), gb.BatchNorm1d(3), nn.Linear(3, 1)).double()
    gb.sync_statistics(model)
    data_parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(data_parallel.parameters(), 0.1)
    part = cut(x, sizes, rank)
    for _ in range(5):
        optimizer.zero_grad()
        # the mean loss of the whole batch, times the ranks that the gradients are averaged over
        (data_parallel(part) ** 2).sum().mul(size / len(x)).backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def error_of(action) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def faults(rank: int, size: int) -> dict:
    found = {}
    one, two = gb.BatchNorm1d(3), gb.BatchNorm1d(3)
    model = nn.ModuleDict({"one": one, "two": two})
    gb.sync_statistics(model)
    x = torch.randn(4, 3)
    found["different layers"] = error_of(lambda: (one if rank == 0 else two)(x))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twin = pickle.loads(pickle.dumps(one))
    found["pickled"] = [str(w.message) for w in caught]
    found["pickled group"] = twin._group
    # one sample over all ranks, and none
    for policy in ("error", "running"):
        layer = gb.BatchNorm1d(3, on_single=policy)
        gb.sync_statistics(layer)
        found[f"single {policy}"] = error_of(lambda: layer(torch.full((int(rank == 0), 3), 7.0)))  # noqa: B023
        found[f"after single {policy}"] = int(layer.num_batches_tracked)
    layer(torch.empty(0, 3))
    found["after nothing"] = int(layer.num_batches_tracked)
    # blocks that are synchronized one by one have no names
    blocks = [gb.BatchNorm1d(3), gb.BatchNorm1d(3)]
    for block in blocks:
        gb.sync_statistics(block)
    found["nameless"] = error_of(lambda: blocks[int(rank == 0)](x))
    copied = copy.deepcopy(one)
    found["copied"] = copied._group is not None and copied._group.group is one._group.group
    gb.unsync_statistics(model)
    found["local"] = one(x).detach().mean().abs().item() < 1e-6 and one._group is None
    return found


def absent(rank: int, size: int) -> dict:
    """The last rank does not call: the others end in the group's own timeout."""
    group = dist.new_group(timeout=timedelta(seconds=5))
    layer = gb.BatchNorm1d(3)
    gb.sync_statistics(layer, group)
    start = time.monotonic()
    message = "" if rank == size - 1 else error_of(lambda: layer(torch.randn(4, 3)))
    seconds = time.monotonic() - start
    dist.barrier()
    return {"message": message, "seconds": seconds}


def channels(rank: int, size: int) -> dict:
    group = dist.new_group(timeout=timedelta(seconds=5))
    layer = gb.BatchNorm1d(3 + rank)
    gb.sync_statistics(layer, group)
    start = time.monotonic()
    message = error_of(lambda: layer(torch.randn(4, 3 + rank)))
    return {"message": message, "seconds": time.monotonic() - start}


def main(rank: int, size: int, folder: str, sizes: list[int]) -> None:
    warnings.simplefilter("ignore")
    ranks.meet(rank, size, folder)
    found = {"laws": laws(rank, size, sizes), "training": training(rank, size, sizes)}
    found |= {"faults": faults(rank, size), "absent": absent(rank, size)}
    if size == 2:
        found["channels"] = channels(rank, size)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
