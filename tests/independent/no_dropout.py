"""no-dropout and bn-plus-dropout: what the best dropout adds to a network with BN.

784-200-200-10, ReLU, 2,000 images, batches of 128, 800 steps of SGD: test accuracy with dropout
minus that without. The best dropout and the rates are those chosen in docs/verdicts.md: with BN 0.2
after both hidden activations, without it 0.5 after the last one.
"""

import torch
from networks import dense, draw, final, images
from plain import tell
from torch import nn

SEEDS = range(80, 85)
# with BN or not: (dropout after each layer, rate) of both arms
ARMS = {True: (((0.2, 0.2), 1.0), ((0, 0), 3.0)), False: (((0, 0.5), 0.3), ((0, 0), 0.3))}


def accuracy(norm, dropout, rate, seed):
    torch.manual_seed(seed)
    layers = []
    for fan_in, p in zip((784, 200), dropout, strict=True):
        layers += [dense(fan_in, 200, not norm)]
        layers += [nn.BatchNorm1d(200)] if norm else []
        layers += [nn.ReLU()]
        layers += [nn.Dropout(p)] if p else []
    net = nn.Sequential(*layers, dense(200, 10))
    return final(net, draw(train, 2000, seed), test, rate, 800, 128, seed)


if __name__ == "__main__":
    train, test = images()
    gains = {
        norm: [accuracy(norm, *best, seed) - accuracy(norm, *none, seed) for seed in SEEDS]
        for norm, (best, none) in ARMS.items()
    }
    for norm, values in gains.items():
        cell = f"best dropout − none, with{'' if norm else 'out'} BN"
        tell("no-dropout", cell, values)
        tell("bn-plus-dropout", cell, values)
