"""act-all and act-sigmoid-most, fair: BN helps whatever the activation, and sigmoid most.

784-100-100-10 on 5,000 training images of MNIST, batches of 64, 1,000 steps of SGD on the mean
loss, five activations with and without BN, each at its own best learning rate: of 0.1, 0.3, 1 and
3, on 5,000 validation images, one run each (the study's grid is wider, with two tuning seeds).
Test accuracy by running statistics, mean of the last three evaluations, at 960, 980 and 1,000
steps, BN minus none, in points.
"""

import math
import statistics

import torch
from plain import mnist, tell
from torch import nn

STEPS, BATCH, DRAWS, RATES = 1000, 64, 4, (0.1, 0.3, 1.0, 3.0)
ACTIVATIONS = {
    "ReLU": nn.ReLU(),
    "leaky ReLU": nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(),
    "tanh": nn.Tanh(),
}


def dense(fan_in, width, bias):
    layer = nn.Linear(fan_in, width, bias=bias)
    std = math.sqrt(2 / fan_in)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if bias:
        nn.init.constant_(layer.bias, 0.1)
    return layer


def points(train, test, activation, norm, rate, seed):
    """Percent of the test images that are labelled rightly."""
    torch.manual_seed(seed)
    layers = []
    for fan_in in (784, 100):
        layers += [dense(fan_in, 100, not norm)]
        layers += [nn.BatchNorm1d(100)] if norm else []
        layers += [activation]
    net = nn.Sequential(*layers, dense(100, 10, True))
    generator = torch.Generator().manual_seed(seed)
    images, labels = train
    chosen = torch.randperm(len(images), generator=generator)[:5000]
    images, labels = images[chosen], labels[chosen]
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, fused=True)
    order = torch.empty(0, dtype=torch.long)
    found = []
    for step in range(1, STEPS + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=generator)
        at, order = order[:BATCH], order[BATCH:]
        loss = nn.functional.cross_entropy(net(images[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (960, 980, 1000):
            net.eval()
            with torch.no_grad():
                found.append(float((net(test[0]).argmax(1) == test[1]).double().mean()))
            net.train()
    return 100 * statistics.fmean(found)


if __name__ == "__main__":
    images, labels = mnist()
    train, validation = (images[:55000], labels[:55000]), (images[55000:], labels[55000:])
    test, gains = mnist("t10k"), {}
    for name, activation in ACTIVATIONS.items():
        arms = []
        for norm in (True, False):
            tried = {r: points(train, validation, activation, norm, r, 77) for r in RATES}
            rate = max(RATES, key=lambda r: tried[r])
            arms.append([points(train, test, activation, norm, rate, s) for s in range(DRAWS)])
        gains[name] = [bn - none for bn, none in zip(*arms, strict=True)]
        tell("act-all", name, gains[name])
    for name, values in gains.items():
        if name != "sigmoid":
            gaps = [a - b for a, b in zip(gains["sigmoid"], values, strict=True)]
            tell("act-sigmoid-most", f"sigmoid − {name}", gaps)
