"""jacobian-one: BN moves the singular values of the layer Jacobians closer to one.

784-100-100-10 before any training, 64 test images of MNIST: share of all singular values in
[0.5, 2] of the whole batch's training-mode Jacobian of each hidden layer (input of the layer to its
activation), BN minus none. Exact: no matrix is estimated. (The verdict is about the mean over the
start and steps of training; this is its value at the start.)
"""

import math

import torch
from plain import mnist, tell
from torch import nn

BATCH, DRAWS = 64, 3


def share(function, weight, z):
    """Of the singular values of d function(W u) / du, for all samples u together.

    Units do not meet between z and function(z): one backward pass for the outputs of a sample gives
    A[i, p, k], the derivative of unit k of sample i by that of sample p. J J^T then has the entry
    sum_p A[i, p, k] (W W^T)[k, l] A[j, p, l].
    """
    z = z.detach().requires_grad_()
    y = function(z)
    rows = torch.eye(len(z))[:, :, None].expand(-1, -1, z.shape[1])
    (a,) = torch.autograd.grad(y, z, rows, is_grads_batched=True)
    a = a.transpose(1, 2).flatten(0, 1)  # sample by sample, unit by unit
    gram = weight @ weight.T
    alive = a.abs().amax(1) > 0
    unit = torch.arange(len(gram)).repeat(len(z))[alive]
    squares = (a[alive] @ a[alive].T) * gram[unit][:, unit]
    return (below(squares, 2.0**2) - below(squares, 0.5**2)) / y.numel()


def below(matrix, bound):
    """How many eigenvalues are less than the bound: the negative ones of L D L^T (Sylvester)."""
    shifted = matrix - bound * torch.eye(len(matrix))
    factors, pivots = torch.linalg.ldl_factor(shifted)
    single = pivots > 0
    # each block of two rows has one eigenvalue of either sign
    return int((factors.diagonal()[single] < 0).sum()) + int((~single).sum()) // 2


def shares(x, start, activation, norm):
    found = []
    for weight in start:
        bias = 0.0 if norm else 0.1
        z = x @ weight.T + bias
        layer = nn.BatchNorm1d(len(weight), track_running_stats=False) if norm else nn.Identity()
        function = nn.Sequential(layer, activation)
        found.append(share(function, weight, z))
        x = function(z).detach()
    return found


def draw_weights():
    found = []
    for fan_in in (784, 100):
        std = math.sqrt(2 / fan_in)
        weight = torch.empty(100, fan_in)
        found.append(nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std))
    return found


if __name__ == "__main__":
    torch.manual_seed(9)
    images, _ = mnist("t10k")
    gains = {}
    for _ in range(DRAWS):
        x, start = images[torch.randint(len(images), (BATCH,))], draw_weights()
        for name, activation in (("ReLU", nn.ReLU()), ("sigmoid", nn.Sigmoid())):
            arms = [shares(x, start, activation, norm) for norm in (True, False)]
            for layer, (bn, none) in enumerate(zip(*arms, strict=True), 1):
                gains.setdefault(f"layer {layer}, {name}", []).append(bn - none)
    for cell, values in gains.items():
        tell("jacobian-one", cell, values)
