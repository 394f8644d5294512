"""affine-needed: without gamma and beta the network loses accuracy.

784-100-100-10 with sigmoid or ReLU, 5,000 images, batches of 64, 500 steps of SGD: test accuracy
with learned gamma and beta minus that with 1 and 0. Rates: those chosen in docs/verdicts.md.
"""

import functools

import torch
from networks import draw, final, images, mlp
from plain import tell
from torch import nn

SEEDS = range(40, 45)
NETWORKS = {"sigmoids": (nn.Sigmoid, 10.0, 0.1), "ReLU": (nn.ReLU, 1.0, 1.0)}


def accuracy(activation, affine, rate, seed):
    torch.manual_seed(seed)
    net = mlp(2, functools.partial(nn.BatchNorm1d, affine=affine), activation)
    return final(net, draw(train, 5000, seed), test, rate, 500, 64, seed)


if __name__ == "__main__":
    train, test = images()
    for name, (activation, learned, fixed) in NETWORKS.items():
        gains = [
            accuracy(activation, True, learned, seed) - accuracy(activation, False, fixed, seed)
            for seed in SEEDS
        ]
        tell("affine-needed", name, gains)
