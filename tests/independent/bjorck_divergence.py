"""bjorck-divergence: without BN the loss explodes at smaller steps.

10 hidden layers of 100, ReLU, 64 training images of MNIST, one gradient: loss after one step over
loss before, on a grid of step sizes. log10 of the best step, and of the first step at which the
loss grows more than a thousandfold, with BN minus without.
"""

import copy
import itertools
import math

import torch
from plain import mnist, tell
from torch import nn

DEPTH, BATCH, DRAWS = 10, 64, 8
GRID = torch.logspace(-5, 4, 73).tolist()


def network(start, norm):
    """Of the weights `start`, from a truncated normal distribution with sqrt(2 / fan-in)."""
    layers = []
    for k, weight in enumerate(start, 1):
        hidden = k < len(start)
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=not (norm and hidden))
        dense.weight.data.copy_(weight)
        if dense.bias is not None:
            nn.init.constant_(dense.bias, 0.1)
        layers += [dense, *([nn.BatchNorm1d(len(weight))] if norm and hidden else [])]
        layers += [nn.ReLU()] if hidden else []
    return nn.Sequential(*layers)


def draw_weights():
    sizes, found = [784, *[100] * DEPTH, 10], []
    for fan_in, width in itertools.pairwise(sizes):
        std = math.sqrt(2 / fan_in)
        weight = torch.empty(width, fan_in)
        found.append(nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std))
    return found


def steps(net, x, y):
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    before, ratios = loss.item(), []
    for step in GRID:
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, q in zip(moved.parameters(), net.parameters(), strict=True):
                p -= step * q.grad
            after = float(nn.functional.cross_entropy(moved(x), y))
        ratios.append(after / before if math.isfinite(after) else math.inf)
    burst = next((s for s, r in zip(GRID, ratios, strict=True) if r > 1000), GRID[-1])
    return math.log10(burst), math.log10(GRID[ratios.index(min(ratios))])


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(8)
    images, labels = mnist()
    pairs = []
    for _ in range(DRAWS):
        at, start = torch.randint(len(images), (BATCH,)), draw_weights()
        x, y = images[at].double(), labels[at]
        pairs.append([steps(network(start, norm), x, y) for norm in (True, False)])
    for k, name in enumerate(("step of a thousandfold loss", "best step")):
        tell("bjorck-divergence", name, [bn[k] - none[k] for bn, none in pairs])
