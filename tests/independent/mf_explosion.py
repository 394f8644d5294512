"""mf-explosion: BN multiplies the squared gradient at every layer, as mean-field theory says.

30 layers of 256, f(BN(W x)) with Gaussian W and Gaussian x, a Gaussian gradient at the end: factor
per layer of ||dL/dh||^2, h before BN, the first 5 layers skipped.
"""

import math

import torch
from plain import QUICK, tell
from torch import nn

WIDTH, DEPTH, DRAWS = 256, 30, 4 if QUICK else 6


def factor(batch, activation):
    x, before = torch.randn(batch, WIDTH), []
    for _ in range(DEPTH):
        dense, norm = nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH, eps=1e-10)
        nn.init.normal_(dense.weight, std=WIDTH**-0.5)
        h = dense(x)
        h.retain_grad()
        before.append(h)
        x = activation(norm(h))
    x.backward(torch.randn(batch, WIDTH))
    first, last = (float(h.grad.square().sum()) for h in (before[5], before[-1]))
    return math.exp(math.log(first / last) / (DEPTH - 6))


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    for batch in (8, 16, 64) if QUICK else (8, 16, 64, 256):
        for name, activation in (("ReLU", nn.ReLU()), ("linear", nn.Identity())):
            found = [factor(batch, activation) for _ in range(DRAWS)]
            tell("mf-explosion", f"{name}, batch {batch}", found, null=1.0)
