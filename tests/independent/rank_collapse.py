"""rank-collapse: deep random networks lose rank with depth, BN keeps it.

Stable rank ||X||_F^2 / ||X||_2^2 of 128 Gaussian samples after 100 layers of 64, linear and ReLU
(weights with variance gain^2 / width, gain 1 and sqrt 2). Kept: at least sqrt(64) / 2 = 4; lost: at
most 2.
"""

import torch
from plain import tell
from torch import nn

WIDTH, DEPTH, SAMPLES, DRAWS = 64, 100, 128, 6


def stable_rank(activation, gain, norm):
    layers = []
    for _ in range(DEPTH):
        dense = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(dense.weight, std=gain * WIDTH**-0.5)
        layers += [dense, nn.BatchNorm1d(WIDTH, eps=1e-10) if norm else nn.Identity(), activation]
    with torch.no_grad():
        x = nn.Sequential(*layers)(torch.randn(SAMPLES, WIDTH))
        frobenius, largest = torch.linalg.matrix_norm(x), torch.linalg.matrix_norm(x, 2)
    return float((frobenius / largest).square())


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    for name, activation, gain in (("linear", nn.Identity(), 1.0), ("ReLU", nn.ReLU(), 2**0.5)):
        for arm, norm, bound in (("with BN", True, 4.0), ("without", False, 2.0)):
            found = [stable_rank(activation, gain, norm) for _ in range(DRAWS)]
            tell("rank-collapse", f"{name}, {arm}", found, null=bound)
