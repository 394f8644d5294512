"""weight-growth, as published: BN limits the growth of the weights.

784-100-100-10 with sigmoid on MNIST, the loss summed over batches of 64, SGD: mean |W2| after the
source's 40,000 steps over mean |W2| at the start; log of that ratio without BN minus with it, at
both learning rates. BN before the activation (eps 1e-3, momentum 0.001), no bias where it follows,
else 0.1.
"""

import math

import torch
from plain import mnist, tell
from torch import nn

STEPS, BATCH, DRAWS, RATES = 40_000, 64, 3, (0.01, 0.0001)


def dense(fan_in, width, bias):
    layer = nn.Linear(fan_in, width, bias=bias)
    std = math.sqrt(2 / fan_in)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if bias:
        nn.init.constant_(layer.bias, 0.1)
    return layer


def growth(images, labels, norm, rate, seed):
    torch.manual_seed(seed)
    layers = []
    for fan_in in (784, 100):
        layers += [dense(fan_in, 100, not norm)]
        layers += [nn.BatchNorm1d(100, eps=1e-3, momentum=0.001)] if norm else []
        layers += [nn.Sigmoid()]
    net = nn.Sequential(*layers, dense(100, 10, True))
    second = net[3 if norm else 2].weight
    start = float(second.detach().abs().mean())
    optimizer, generator = torch.optim.SGD(net.parameters(), lr=rate, fused=True), torch.Generator()
    generator.manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(STEPS):
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=generator)
        at, order = order[:BATCH], order[BATCH:]
        loss = nn.functional.cross_entropy(net(images[at]), labels[at], reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return math.log(float(second.detach().abs().mean()) / start)


if __name__ == "__main__":
    images, labels = (part[:55000] for part in mnist())
    for rate in RATES:
        gaps = [
            growth(images, labels, False, rate, seed) - growth(images, labels, True, rate, seed)
            for seed in range(100, 100 + DRAWS)
        ]
        tell("weight-growth", f"rate {rate:g}", gaps)
