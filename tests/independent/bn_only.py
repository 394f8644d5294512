"""bn-only: gamma and beta alone, in a network of random weights, beat as many random weights.

784-100-100-10 and 784-[100]*5-10, ReLU, BN before it, 5,000 images, batches of 64, 500 steps of
SGD. Trained is gamma and beta, or two weights of each hidden unit drawn by chance; nothing else,
the output layer too stays as drawn. Rates: those chosen in docs/verdicts.md.
"""

import torch
from networks import draw, final, images, mlp
from plain import tell
from torch import nn

SEEDS = range(50, 55)
NETWORKS = {"100-100": (2, 10.0, 30.0), "[100]*5": (5, 3.0, 10.0)}  # depth, rates of both arms


def accuracy(depth, affine, rate, seed):
    torch.manual_seed(seed)
    net = mlp(depth, nn.BatchNorm1d)
    hidden = [layer.weight for layer in net[:-1] if isinstance(layer, nn.Linear)]
    norms = [layer for layer in net if isinstance(layer, nn.BatchNorm1d)]
    free = [p for norm in norms for p in norm.parameters()] if affine else hidden
    for p in net.parameters():
        p.requires_grad_(any(p is q for q in free))
    masks = []
    for weight in hidden:
        two = torch.rand_like(weight).topk(2, dim=1).indices
        masks.append(torch.zeros_like(weight).scatter_(1, two, 1.0))

    def only_two():
        for weight, mask in zip(hidden, masks, strict=True):
            weight.grad *= mask

    hook = None if affine else only_two
    data = draw(train, 5000, seed)
    return final(net, data, test, rate, 500, 64, seed, after_backward=hook)


if __name__ == "__main__":
    train, test = images()
    for name, (depth, affine, two) in NETWORKS.items():
        gains = [accuracy(depth, True, affine, s) - accuracy(depth, False, two, s) for s in SEEDS]
        tell("bn-only", f"gamma and beta − random weights, {name}", gains)
