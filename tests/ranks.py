"""Several processes over gloo, forked from one server that has imported PyTorch once."""

import multiprocessing
import os
import time

import kernels
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

# All of it costs each process three seconds; nothing here starts threads, which no fork survives.
SHARED = (
    *("torch", "torch._dynamo", "torch.nn.parallel", "torch.optim", "pytest"),
    *("gammabeta.layers.batch_norm", "gammabeta.layers.renorm", "gammabeta.models.synchronization"),
    *("gammabeta.models.calibration", "gammabeta.probes.recorder", "gammabeta._check"),
)


def start(work, size, *words):
    """``work(rank, *words)`` in so many processes, begun and not waited for."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        multiprocessing.get_context(method).set_forkserver_preload(list(SHARED))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        return start_processes(work, words, size, join=False, daemon=True, start_method=method)
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def end(group, seconds=200):
    """Wait for all of them; what one of them raises is raised here."""
    limit = time.monotonic() + seconds
    while not group.join(timeout=seconds):
        assert time.monotonic() < limit, "the ranks do not end"


def meet(rank, size, folder):
    """Make the group; called by each rank."""
    torch.set_num_threads(1)
    kernels.share()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
