"""noise-structure: what a batch's statistics do to a sample outside of it is additive and
multiplicative noise, Var((mu - mu_B) / sigma_B) = 1 / (m - 3) and Var(sigma / sigma_B) by the chi
distribution.

A layer that takes over each batch's statistics (momentum 1), one channel for each batch, then in
eval mode: what it makes of 0 is the additive part, what it makes of 1 minus that the other one.
"""

import math

import torch
from plain import QUICK, tell
from scipy.stats import chi
from torch import nn

DRAWS, VALUES = 6, 200_000 if QUICK else 1_000_000


def noise(m):
    count = VALUES // m
    layer = nn.BatchNorm1d(count, momentum=1.0, eps=1e-12, affine=False)
    with torch.no_grad():
        layer(torch.randn(m, count))
        out = layer.eval()(torch.tensor([[0.0], [1.0]]).expand(2, count))
    # eval mode divides by the unbiased estimate, training mode by the biased one
    out = out * math.sqrt(m / (m - 1))
    return float(out[0].var()), float((out[1] - out[0]).var())


def theory(m):
    """The variance of sqrt(m) / chi with m - 1 degrees of freedom, by integration."""
    inverse, square = (chi(m - 1).expect(lambda c, k=k: c**-k) for k in (1, 2))
    return 1 / (m - 3), m * (square - inverse**2)


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(5)
    for m in (8, 32, 128, 512):
        wanted, found = theory(m), [noise(m) for _ in range(DRAWS)]
        for k, part in enumerate(("additive", "multiplicative")):
            tell("noise-structure", f"{part}, m = {m}", [pair[k] / wanted[k] for pair in found])
