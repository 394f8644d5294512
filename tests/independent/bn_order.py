"""bn-order: BN after the activation against BN before it.

784-100-100-10 with ReLU, sigmoid and tanh (800 steps), and two convolutions with ReLU (5x5, stride
2, 8 and 16 channels; 600 steps), 5,000 images, batches of 64, SGD: test accuracy, BN after minus
BN before, each at the rate chosen for it in docs/verdicts.md.
"""

import math

import torch
from networks import dense, draw, final, images
from plain import tell
from torch import nn

SEEDS = range(90, 95)
RATES = {  # BN before, BN after
    "dense relu": (nn.ReLU, 1.0, 0.3),
    "dense sigmoid": (nn.Sigmoid, 10.0, 1.0),
    "dense tanh": (nn.Tanh, 1.0, 0.3),
    "convolutional relu": (nn.ReLU, 0.3, 0.3),
}


def convolution(channels, width, bias):
    layer = nn.Conv2d(channels, width, 5, stride=2, bias=bias)
    std = math.sqrt(2 / (25 * channels))
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if bias:
        nn.init.constant_(layer.bias, 0.1)
    return layer


def accuracy(name, after, rate, seed):
    torch.manual_seed(seed)
    activation, convolutional = RATES[name][0], name.startswith("conv")
    layers = [nn.Unflatten(1, (1, 28, 28))] if convolutional else []
    for fan_in, width in ((1, 8), (8, 16)) if convolutional else ((784, 100), (100, 100)):
        norm = (nn.BatchNorm2d if convolutional else nn.BatchNorm1d)(width)
        weights = (convolution if convolutional else dense)(fan_in, width, after)
        layers += [weights, activation(), norm] if after else [weights, norm, activation()]
    layers += [nn.Flatten(), dense(256, 10)] if convolutional else [dense(100, 10)]
    steps = 600 if convolutional else 800
    return final(nn.Sequential(*layers), draw(train, 5000, seed), test, rate, steps, 64, seed)


if __name__ == "__main__":
    train, test = images()
    for name, (_, before, after) in RATES.items():
        gains = [accuracy(name, True, after, s) - accuracy(name, False, before, s) for s in SEEDS]
        tell("bn-order", name, gains)
