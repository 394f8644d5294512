"""smoother, fair and scale-free: along the gradient the loss is smoother with BN.

784-[100]*5-10, ReLU, 5,000 images, batches of 128, 600 steps of SGD, each network at the rate that
docs/verdicts.md names as chosen. Every 20 steps each weight matrix W moves against its gradient G
by 0.3, 1, 3 and 10 % of |W|: range of the loss over these distances, largest change of the gradient
with respect to W / |W|, largest such change per distance. Means over the 30 looks of their
logarithms, without BN minus with it.
"""

import math
import statistics

import torch
from networks import draw, fit, images, mlp
from plain import tell
from torch import nn

SEEDS, SHARES = range(20, 25), (0.003, 0.01, 0.03, 0.1)
CELLS = ("(a) range of the loss", "(b) change of the gradient", "(c) effective beta")


def gradients(net, weights, batch):
    loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
    return loss.item(), torch.autograd.grad(loss, weights)


def look(net, batch):
    """Logarithms of range, change and beta; the network is left as it was."""
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    weights = [layer.weight for layer in net if isinstance(layer, nn.Linear)]
    start = [weight.detach().clone() for weight in weights]
    lengths = [float(weight.norm()) for weight in start]
    _, there = gradients(net, weights, batch)
    losses, changes = [], []
    for share in SHARES:
        with torch.no_grad():
            for weight, old, g, length in zip(weights, start, there, lengths, strict=True):
                weight.copy_(old - share * length * g / g.norm())
        loss, moved = gradients(net, weights, batch)
        parts = zip(lengths, moved, there, strict=True)
        losses.append(loss)
        changes.append(math.sqrt(sum((n * float((a - b).norm())) ** 2 for n, a, b in parts)))
    with torch.no_grad():
        for weight, old in zip(weights, start, strict=True):
            weight.copy_(old)
        for name, value in net.named_buffers():
            value.copy_(buffers[name])
    far = [share * math.sqrt(len(weights)) for share in SHARES]
    beta = max(c / f for c, f in zip(changes, far, strict=True))
    return [math.log(value) for value in (max(losses) - min(losses), max(changes), beta)]


def means(norm, rate, seed):
    torch.manual_seed(seed)
    net, data = mlp(5, norm), draw(train, 5000, seed)
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in fit(net, data, rate, 600, 128, seed, range(0, 600, 20)):
        at = torch.randperm(5000, generator=generator)[:128]
        found.append(look(net, (data[0][at], data[1][at])))
    return [statistics.fmean(values) for values in zip(*found, strict=True)]


if __name__ == "__main__":
    train, _ = images()
    pairs = [(means(None, 0.3, seed), means(nn.BatchNorm1d, 1.0, seed)) for seed in SEEDS]
    for k, cell in enumerate(CELLS):
        tell("smoother", cell, [none[k] - bn[k] for none, bn in pairs])
