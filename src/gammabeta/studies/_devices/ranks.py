"""Training in real processes that talk over gloo, as `python -m` with a folder.

The folder holds `job.pt`; each rank leaves `K-rank.pt`. One interpreter imports torch, the ranks
are forked from it, where the system can.
"""

import datetime
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from gammabeta.layers._running import RunningMoments
from gammabeta.models.synchronization import sync_statistics
from gammabeta.studies._nets import MLP, m2
from gammabeta.studies._train import stream

Found = dict[str, Tensor]
_SECONDS = 120


def steps(net: MLP, batches: list[tuple[Tensor, Tensor]], rate: float, *, ranks: int = 1) -> Found:
    """Plain SGD: output and gradients of the first step, parameters and buffers of the last.

    With several ranks as DistributedDataParallel does it: a forward pass starts with the buffers of
    rank 0, gradients are averaged.
    """
    found: Found = {}
    named = dict(net.named_parameters())
    net.train()
    for x, labels in batches:
        if ranks > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)
        logits = net(x)
        gradients = torch.autograd.grad(cross_entropy(logits, labels), list(named.values()))
        if ranks > 1:
            for gradient in gradients:
                dist.all_reduce(gradient.div_(ranks))
        if not found:
            found["output"] = logits.detach().clone()
            found |= {f"gradient of {n}": g for n, g in zip(named, gradients, strict=True)}
            found |= {f"first {n}": b.clone() for n, b in net.named_buffers()}
        with torch.no_grad():
            for parameter, gradient in zip(named.values(), gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
    return found | {f"last {name}": value.clone() for name, value in net.state_dict().items()}


def native(net: MLP) -> MLP:
    """The network with PyTorch's own arithmetic: every rank would compile the kernels anew."""
    for layer in net.layers:
        if isinstance(layer, RunningMoments):
            layer.backend = "native"
    return net


def run(job: dict[str, Any]) -> dict[int, dict[str, list[Found]]]:
    """What each rank found, by the number of ranks and whether statistics are synchronized.

    Args:
        job: `pixels`, `seed`, `rate`, `images` (steps, batch, pixels), `labels` (steps, batch), all
            floats in the dtype of the training; `sizes`: numbers of ranks, which divide the batch.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(job, Path(folder) / "job.pt")
        one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", __name__, folder],
            capture_output=True,
            text=True,
            env={**os.environ, **one},
            timeout=_SECONDS * 2,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"The ranks must all finish, but:\n{done.stderr[-4000:]}")
        found: dict[int, dict[str, list[Found]]] = {}
        for size in job["sizes"]:
            ranks = [torch.load(Path(folder) / f"{size}-{rank}.pt") for rank in range(size)]
            found[size] = {mode: [each[mode] for each in ranks] for mode in ranks[0]}
        return found


def _rank(rank: int, size: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    job = torch.load(Path(folder) / "job.pt")
    wait = datetime.timedelta(seconds=_SECONDS)
    meet = (Path(folder) / f"meet-{size}").as_uri()
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size, timeout=wait)
    batches = [
        (x.chunk(size)[rank], y.chunk(size)[rank])
        for x, y in zip(job["images"], job["labels"], strict=True)
    ]
    found = {}
    for mode in ("synchronized", "local"):
        net = native(m2(job["pixels"], "relu", True, stream(job["seed"], "weights")))
        net.to(job["images"].dtype)
        if mode == "synchronized":
            sync_statistics(net)
        found[mode] = steps(net, batches, job["rate"], ranks=size)
    torch.save(found, Path(folder) / f"{size}-{rank}.pt")
    dist.destroy_process_group()


def main(folder: str) -> None:
    """Start the ranks of each number, one number after another."""
    ways = multiprocessing.get_all_start_methods()
    # A first step imports it, which would take each rank a second: once, before they are forked.
    importlib.import_module("torch._dynamo")
    multiprocessing.set_start_method("fork" if "fork" in ways else "spawn")
    for size in torch.load(Path(folder) / "job.pt")["sizes"]:
        ranks = [
            multiprocessing.Process(target=_rank, args=(rank, size, folder)) for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"{size} ranks: exit codes {[process.exitcode for process in ranks]}")


if __name__ == "__main__":
    main(sys.argv[1])
