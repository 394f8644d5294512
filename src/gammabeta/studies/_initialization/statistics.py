"""One layer before any training: its Jacobian, its noise, its gradient when it whitens."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gammabeta._runs import Row
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.layers.whiten import DecorrelatedBatchNorm1d
from gammabeta.moments import Moments
from gammabeta.studies._data import Images
from gammabeta.studies._initialization._common import Measure, normal, point, slope, value
from gammabeta.studies._initialization.depth import ARMS, images_of
from gammabeta.studies._nets import m2


def whole_jacobian_values(w: Tensor, norm: BatchNorm1d | None, f: nn.Module, z: Tensor) -> Tensor:
    """Singular values of d f(BN(W u)) / du for the whole batch, (m * units,), z = W u (+ b).

    In training mode each output depends on every sample: the Jacobian is m * units times m *
    inputs. Its square J J^T has, for samples i, j and units k, l, the entry
    sum_p A_k[i, p] (W W^T)[k, l] A_l[j, p], where A_k = f' d BN / dz of unit k, (m, m).
    """
    m = len(z)
    identity = torch.eye(m, dtype=z.dtype)
    if norm is None:
        y, inner = z, identity.expand(z.shape[1], m, m)
    else:
        mean, var = z.mean(0), z.var(0, correction=0)
        n = ((z - mean) * (var + norm.eps).rsqrt()).T  # (units, m)
        scale = (norm.weight.detach() * (var + norm.eps).rsqrt())[:, None, None]
        inner = scale * (identity - 1 / m - n[:, :, None] * n[:, None, :] / m)
        y = norm(z).detach()
    y = y.detach().requires_grad_()
    (bend,) = torch.autograd.grad(f(y).sum(), y)
    gram = w @ w.T
    if norm is None:
        blocks = bend[:, :, None] * gram * bend[:, None, :]
        squares = torch.linalg.eigvalsh(blocks).flatten()
    else:
        a = (bend.T[:, :, None] * inner).reshape(-1, m)  # unit by unit, sample by sample
        whole = (a @ a.T) * gram.repeat_interleave(m, 0).repeat_interleave(m, 1)
        squares = torch.linalg.eigvalsh(whole)
    values: Tensor = squares.clamp(min=0).sqrt()
    return values


def jacobian_one(g: torch.Generator, images: Images, tiny: bool) -> Iterator[Row]:
    x, _ = images_of(g, images, 4 if tiny else 20)
    start = g.get_state()
    for activation, name in (("relu", "ReLU"), ("sigmoid", "sigmoid")):
        shares: dict[tuple[str, int], float] = {}
        for arm, with_norm in ARMS.items():
            g.set_state(start)
            net = m2(x.shape[1], activation, with_norm, g).double().train()
            u, hidden = x, list(net.layers)[:-1]
            size = len(hidden) // 2
            for number in (1, 2):
                first, *rest = hidden[(number - 1) * size : number * size]
                z: Tensor = first(u).detach()
                norm = rest[0] if isinstance(rest[0], BatchNorm1d) else None
                s = whole_jacobian_values(first.get_parameter("weight").detach(), norm, rest[-1], z)
                alive = s[s > 1e-6 * s.max()]
                inside = ((alive >= 0.5) & (alive <= 2)).sum()
                shares[arm, number] = float(inside) / len(s)
                where = f"layer {number}, {name}"
                yield value(f"{where}: share in [0.5, 2], {arm}", shares[arm, number])
                yield value(f"{where}: sd of ln s, {arm}", alive.log().std())
                for q in range(5, 100, 5):
                    series = f"{where}, {arm}"
                    yield point("jacobian", series, q, s.quantile(q / 100))
                u = nn.Sequential(*rest)(z).detach()
        for number in (1, 2):
            gain = shares["with BN", number] - shares["without", number]
            yield value(f"layer {number}, {name}", gain)


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


MEASURES: dict[str, Measure] = {
    "jacobian-one": jacobian_one,
    "noise-structure": noise_structure,
    "whiten-nondiff": whiten_nondiff,
}
