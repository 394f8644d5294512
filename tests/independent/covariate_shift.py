"""ics-reduced and ics-gradient at equal steps: internal covariate shift by both definitions.

784-[100]*5-10, ReLU, 5,000 images, batches of 128, 800 steps of SGD, each network at the rate that
docs/verdicts.md names as chosen. At 15 log-spaced steps, on a batch drawn for it in training mode,
each layer (gamma and beta of a BN are one) would move against its gradient by 1 % of the norm of
its parameters:
(a) all of them: Wasserstein-1 distance of what each hidden unit hands on to the next weights before
    and after, over its standard deviation before; median over units, mean over layers;
(b) those below a weight layer: 1 - cos of its gradients before and after; median over layers.
ics-reduced: mean over the steps of the logarithm, without BN minus with it; ics-gradient: median
over the steps of (b), BN minus none. A seed at which a network diverges is left out.
"""

import math
import statistics

import torch
from networks import draw, fit, images, mlp
from plain import tell
from torch import nn

SEEDS = range(30, 35)
MOMENTS = sorted({round(10 ** (k * math.log10(800) / 14)) for k in range(15)})


def received(net, x):
    """What the weights behind the first ones receive."""
    found = []
    for layer in net:
        if isinstance(layer, nn.Linear):
            found.append(x.detach())
        x = layer(x)
    return found[1:]


def gradients(net, batch, of):
    loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
    return torch.autograd.grad(loss, of)


def shift(before, after):
    """Median over units; one that is constant and stays so is left out."""
    distance = (before.sort(0).values - after.sort(0).values).abs().mean(0)
    spread = before.std(0, unbiased=False)
    return float((distance / spread)[(spread > 0) | (distance > 0)].median())


def look(net, batch):
    """(a) and (b); the network is left as it was."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    layers = [list(layer.parameters()) for layer in net if list(layer.parameters())]
    flat = [p for layer in layers for p in layer]
    there = dict(zip(flat, gradients(net, batch, flat), strict=True))
    inputs = received(net, batch[0])
    turned = []
    for layer in layers:
        if layer is not layers[0] and layer[0].ndim == 2:
            moved = gradients(net, batch, layer)
            one, two = (
                torch.cat([g.flatten() for g in gs])
                for gs in ([there[p] for p in layer], list(moved))
            )
            turned.append(1 - float(nn.functional.cosine_similarity(one, two, dim=0)))
        with torch.no_grad():
            length = math.sqrt(sum(float(p.square().sum()) for p in layer))
            slope = math.sqrt(sum(float(there[p].square().sum()) for p in layer))
            for p in layer:
                p -= 0.01 * length / slope * there[p]
    shifts = [shift(a, b) for a, b in zip(inputs, received(net, batch[0]), strict=True)]
    net.load_state_dict(state)
    return statistics.fmean(shifts), statistics.median(turned)


def looks(norm, rate, seed):
    torch.manual_seed(seed)
    net, data = mlp(5, norm), draw(train, 5000, seed)
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in fit(net, data, rate, 800, 128, seed, MOMENTS):
        if not all(bool(p.isfinite().all()) for p in net.parameters()):
            return None
        at = torch.randperm(5000, generator=generator)[:128]
        found.append(look(net, (data[0][at], data[1][at])))
    return found


def log_mean(found, k):
    return statistics.fmean(math.log(one[k]) for one in found)


if __name__ == "__main__":
    train, _ = images()
    runs = [(looks(None, 0.3, seed), looks(nn.BatchNorm1d, 1.0, seed)) for seed in SEEDS]
    pairs = [(none, bn) for none, bn in runs if none and bn]
    for k, cell in enumerate(("(a) distribution, equal steps", "(b) gradient, equal steps")):
        tell("ics-reduced", cell, [log_mean(none, k) - log_mean(bn, k) for none, bn in pairs])
    rises = [
        statistics.median(one[1] for one in bn) - statistics.median(one[1] for one in none)
        for none, bn in pairs
    ]
    tell("ics-gradient", "deep network", rises)
