"""mf-orthogonal: with orthogonal weights BN networks need not explode.

60 linear layers of 64 with BN, orthogonal and Gaussian weights: factor per layer of the squared
gradient norm, the first 5 layers skipped; and Gaussian minus orthogonal.
"""

import math

import torch
from plain import QUICK, tell
from torch import nn

WIDTH, DEPTH, DRAWS = 64, 60, 4 if QUICK else 6


def factor(batch, start):
    x, before = torch.randn(batch, WIDTH), []
    for _ in range(DEPTH):
        dense, norm = nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH, eps=1e-10)
        start(dense.weight)
        h = dense(x)
        h.retain_grad()
        before.append(h)
        x = norm(h)
    x.backward(torch.randn(batch, WIDTH))
    first, last = (float(h.grad.square().sum()) for h in (before[5], before[-1]))
    return math.exp(math.log(first / last) / (DEPTH - 6))


def gaussian(weight):
    nn.init.normal_(weight, std=WIDTH**-0.5)


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(2)
    for batch in (8, 16, 64):
        own = [factor(batch, nn.init.orthogonal_) for _ in range(DRAWS)]
        other = [factor(batch, gaussian) for _ in range(DRAWS)]
        gaps = [b - a for a, b in zip(own, other, strict=True)]
        tell("mf-orthogonal", f"linear, batch {batch}: orthogonal", own, null=0.0)
        tell("mf-orthogonal", f"linear, batch {batch}: Gaussian - orthogonal", gaps)
