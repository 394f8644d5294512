"""One layer before any training: its noise, its gradient when it whitens, and what that takes."""

import math
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gammabeta._runs import Row
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.layers.whiten import DecorrelatedBatchNorm1d, IterNorm1d
from gammabeta.moments import Moments
from gammabeta.studies._data import Images
from gammabeta.studies._initialization._common import Measure, normal, point, slope, value


def inverse_chi_variance(m: int) -> float:
    """Var(sigma / sigma_B) for m Gaussian values: m/(m - 3) - m (E 1/chi)^2, m - 1 freedoms."""
    inverse = math.exp(math.lgamma((m - 2) / 2) - math.lgamma((m - 1) / 2)) / math.sqrt(2)
    return m / (m - 3) - m * inverse**2


def noise_structure(g: torch.Generator, images: Images, tiny: bool) -> Iterator[Row]:
    for m in (4, 8, 32, 128, 512):
        count = (20_000 if tiny else 2_000_000) // m
        moments = Moments.of(normal(g, m, count))
        sigma = moments.var().sqrt()
        additive, multiplicative = (moments.mean / sigma).var(), (1 / sigma).var()
        for name, found, wanted in (
            ("additive", additive, 1 / (m - 3)),
            ("multiplicative", multiplicative, inverse_chi_variance(m)),
        ):
            yield value(f"{name}, m = {m}", found / wanted)
            yield point("noise", f"{name}, measured", m, found)
            yield point("noise", f"{name}, theory", m, wanted)


GAPS = tuple(10.0**-k for k in range(1, 9))


def whiten_nondiff(g: torch.Generator, images: Images, tiny: bool) -> Iterator[Row]:
    m = 16
    angle = float(torch.rand((), generator=g, dtype=torch.float64)) * 0.5 + 0.5
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    white = normal(g, m, 2)
    white = white - white.mean(0)
    q, _ = torch.linalg.qr(white)  # columns orthonormal, of mean 0
    weight = normal(g, m, 2)
    norms: dict[str, list[float]] = {"PCA": [], "ZCA": []}
    for gap in GAPS:
        roots = torch.tensor([1 + gap / 2, 1 - gap / 2], dtype=torch.float64).sqrt()
        x = (math.sqrt(m) * q * roots) @ turn.T
        zca = DecorrelatedBatchNorm1d(2, eps=1e-12, affine=False, group_size=2).double()
        for name, whitened in (("PCA", pca), ("ZCA", zca)):
            leaf = x.clone().requires_grad_()
            (slope_of,) = torch.autograd.grad((whitened(leaf) * weight).sum(), leaf)
            norms[name].append(float(slope_of.norm()))
            yield point("whitening", name, gap, norms[name][-1])
    logs = [math.log10(gap) for gap in GAPS]
    for name, by_gap in norms.items():
        yield value(name, slope(logs, [math.log10(n) for n in by_gap]))


def pca(x: Tensor) -> Tensor:
    """Whitened along the eigenvectors: (x - mean) U L^(-1/2)."""
    centered = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(x))
    whitened: Tensor = centered @ vectors * values.rsqrt()
    return whitened


SIZES = (16, 32, 64, 128, 256)


def whiten_cost(g: torch.Generator, images: Images, tiny: bool) -> Iterator[Row]:
    seconds: dict[str, list[float]] = {}
    for d in SIZES:
        kinds: dict[str, nn.Module] = {
            "BN": BatchNorm1d(d),
            "ZCA of all features": DecorrelatedBatchNorm1d(d, group_size=d),
            "Newton's iteration of all features": IterNorm1d(d, group_size=d),
            "ZCA in groups of 16": DecorrelatedBatchNorm1d(d, group_size=16),
        }
        x = torch.randn(256, d, generator=g).requires_grad_()
        upstream = torch.randn(256, d, generator=g)
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(3 if tiny else 16):
            for name, layer in kinds.items():
                began = time.perf_counter()
                torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)
                times[name].append(time.perf_counter() - began)
        for name, each in times.items():
            seconds.setdefault(name, []).append(statistics.median(each[1:]))
            yield point("cost", name, d, seconds[name][-1])
    logs = [math.log(d) for d in SIZES]
    for name, each in seconds.items():
        yield value(name, slope(logs[-3:], [math.log(s) for s in each[-3:]]))
        if name != "BN":
            yield value(f"{name}: times as long as BN, 256 features", each[-1] / seconds["BN"][-1])


MEASURES: dict[str, Measure] = {
    "whiten-cost": whiten_cost,
    "noise-structure": noise_structure,
    "whiten-nondiff": whiten_nondiff,
}
