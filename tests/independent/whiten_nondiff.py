"""whiten-nondiff: the gradient of whitening has no bound where two eigenvalues meet.

16 samples of 2 features whose covariance has the eigenvalues 1 +- gap / 2: log-log slope of the
gradient's norm over gaps from 0.1 to 1e-8, whitening along the eigenvectors (PCA), and by the
symmetric inverse square root (ZCA), here from the roots of a 2 x 2 matrix in closed form.
"""

import math

import torch
from plain import slope, tell

SAMPLES, DRAWS = 16, 8
GAPS = [10.0**-k for k in range(1, 9)]


def pca(x):
    centered = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(x))
    return centered @ vectors @ torch.diag(values**-0.5)


def zca(x):
    """sqrt(A) = (A + sqrt(det A) I) / sqrt(tr A + 2 sqrt(det A)) for a 2 x 2 matrix A."""
    centered = x - x.mean(0)
    a = centered.T @ centered / len(x)
    root = (a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0]).sqrt()
    square_root = (a + root * torch.eye(2)) / (a[0, 0] + a[1, 1] + 2 * root).sqrt()
    return centered @ torch.linalg.inv(square_root)


def slopes():
    noise = torch.randn(SAMPLES, 2)
    white = torch.linalg.qr(noise - noise.mean(0)).Q * math.sqrt(SAMPLES)
    angle = 0.5 + 0.5 * float(torch.rand(()))
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    weight, logs = torch.randn(SAMPLES, 2), {pca: [], zca: []}
    for gap in GAPS:
        roots = torch.tensor([1 + gap / 2, 1 - gap / 2]).sqrt()
        for whiten, found in logs.items():
            x = (white * roots @ turn.T).requires_grad_()
            (whiten(x) * weight).sum().backward()
            found.append(math.log10(float(x.grad.norm())))
    return [slope([math.log10(g) for g in GAPS], found) for found in logs.values()]


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(6)
    draws = [slopes() for _ in range(DRAWS)]
    # the claim holds of a slope of -0.9 or steeper
    tell("whiten-nondiff", "PCA", [draw[0] for draw in draws], null=-0.9)
    tell("whiten-nondiff", "ZCA", [draw[1] for draw in draws], null=-0.1)
