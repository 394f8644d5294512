"""vanishing-depth: gradients that vanish toward the input without BN do not with it.

784-[100]*30-10 on 64 training images of MNIST, before any training: slope of log10 ||dL/dz|| per
layer toward the input, z = W x (before BN), for sigmoid, tanh and ReLU. Weights truncated normal
with sqrt(2 / fan-in), bias 0.1 where no BN follows.
"""

import math

import torch
from plain import mnist, slope, tell
from torch import nn

DEPTH, BATCH, DRAWS = 30, 64, 6


def dense(fan_in, width, bias):
    layer = nn.Linear(fan_in, width, bias=bias)
    std = math.sqrt(2 / fan_in)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if bias:
        nn.init.constant_(layer.bias, 0.1)
    return layer


def vanishing(images, labels, activation, norm):
    at = torch.randint(len(images), (BATCH,))
    x, before = images[at].double(), []
    for k in range(DEPTH):
        z = dense(784 if k == 0 else 100, 100, not norm)(x)
        z.retain_grad()
        before.append(z)
        x = activation(nn.BatchNorm1d(100)(z) if norm else z)
    nn.functional.cross_entropy(dense(100, 10, True)(x), labels[at]).backward()
    return -slope(range(DEPTH), [math.log10(float(z.grad.norm())) for z in before])


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(7)
    images, labels = mnist()
    for name, activation in (("sigmoid", nn.Sigmoid()), ("tanh", nn.Tanh()), ("ReLU", nn.ReLU())):
        for arm, norm in (("with BN", True), ("without", False)):
            found = [vanishing(images, labels, activation, norm) for _ in range(DRAWS)]
            tell("vanishing-depth", f"{name}, {arm}", found)
