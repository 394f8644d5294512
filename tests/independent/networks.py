"""What the scripts about training share: dense networks, plain SGD, accuracy.

A network here is pixels-100-...-100-10: weights from a truncated normal distribution with standard
deviation sqrt(2 / fan-in), BN before the activation, no bias where it follows, bias 0.1 elsewhere.
Each seed draws its own training images from the first 55,000; one epoch after another is shuffled,
what is left of one beyond whole batches is not used.
"""

import math
import statistics

import torch
from plain import mnist
from torch import nn


def dense(fan_in, width, bias=True):
    layer = nn.Linear(fan_in, width, bias=bias)
    std = math.sqrt(2 / fan_in)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if bias:
        nn.init.constant_(layer.bias, 0.1)
    return layer


def mlp(depth, norm=None, activation=nn.ReLU, width=100):
    """`norm` makes the layer before each activation; without it there is none."""
    layers = []
    for fan_in in [784, *[width] * (depth - 1)]:
        layers += [dense(fan_in, width, norm is None)]
        layers += [norm(width)] if norm else []
        layers += [activation()]
    return nn.Sequential(*layers, dense(width, 10))


def images():
    """Training images to draw from, and test images, each with labels."""
    x, y = mnist()
    return (x[:55000], y[:55000]), mnist("t10k")


def draw(data, count, seed):
    chosen = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))[:count]
    return data[0][chosen], data[1][chosen]


def fit(net, data, rate, steps, size, seed, moments=(), after_backward=None, after_step=None):
    """Train by SGD on the mean loss; yields at each of `moments`, numbers of steps made."""
    x, y = data
    generator = torch.Generator().manual_seed(1000 + seed)
    moving = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=rate, fused=True)
    order = torch.empty(0, dtype=torch.long)
    if 0 in moments:
        yield 0
    for step in range(1, steps + 1):
        if len(order) < size:
            order = torch.randperm(len(x), generator=generator)
        at, order = order[:size], order[size:]
        loss = nn.functional.cross_entropy(net(x[at]), y[at])
        optimizer.zero_grad()
        loss.backward()
        if after_backward:
            after_backward()
        optimizer.step()
        if after_step:
            after_step(step)
        if step in moments:
            yield step


def points(net, data):
    """Percent of the images that are labelled rightly, by running statistics."""
    training = net.training
    net.eval()
    with torch.no_grad():
        right = float((net(data[0]).argmax(1) == data[1]).double().mean())
    net.train(training)
    return 100 * right


def final(net, data, test, rate, steps, size, seed, **hooks):
    """Mean test accuracy at 96, 98 and 100 % of the steps."""
    at = [round(share * steps) for share in (0.96, 0.98, 1)]
    return statistics.fmean(
        points(net, test) for _ in fit(net, data, rate, steps, size, seed, at, **hooks)
    )
