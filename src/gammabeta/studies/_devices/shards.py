"""Data parallelism without synchronized statistics, in one process."""

import math

import torch
from torch import Tensor, nn

from gammabeta.layers.ghost import GhostBatchNorm1d
from gammabeta.moments import Moments
from gammabeta.studies._nets import MLP, m2
from gammabeta.studies._train import stream


class ShardNorm1d(GhostBatchNorm1d):
    """BN on several devices: every shard of a batch is normalized by its own statistics.

    The running statistics are those of the first shard: in DistributedDataParallel every rank
    starts a forward pass with the buffers of rank 0.
    """

    def _offer(self, x: Tensor, seen: object) -> None:
        first = x[: self.virtual_batch_size]
        super()._offer(first, Moments.of(first.detach()))


def parallel(pixels: int, seed: int, batch: int, devices: int) -> MLP:
    """The network of the MNIST study, its batches of so many images shared by so many devices."""
    size = math.ceil(batch / devices)

    def norm(width: int) -> nn.Module:
        return ShardNorm1d(width, virtual_batch_size=size)

    return m2(pixels, "relu", norm, stream(seed, "weights"))


def pooled(shards: list[Tensor]) -> Tensor:
    """Variance of all values from those of shards: sum n_k (v_k + mu_k^2) / n - mu^2."""
    counts = torch.tensor([float(len(s)) for s in shards], dtype=torch.float64)[:, None]
    means = torch.stack([s.mean(0) for s in shards])
    variances = torch.stack([s.var(0, unbiased=False) for s in shards])
    weights = counts / counts.sum()
    mean = (weights * means).sum(0)
    return (weights * (variances + means.square())).sum(0) - mean.square()
