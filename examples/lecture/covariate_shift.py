"""The covariate-shift argument, measured.

"Batch normalization works because it holds the distribution of layer inputs still" (Ioffe & Szegedy
2015). "It trains as well when noise brings the shift back" (Santurkar et al. 2018). Three networks
from the same weights, on the same batches, at the same rate: how far does what the last layer
receives move, and how well do they learn? One seed: `gammabeta study explain noisy-bn` asks fairly.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import gammabeta as gb

torch.manual_seed(0)
x, y = map(torch.tensor, load_digits(return_X_y=True))
x = x.float() / 16
x, y, test_x, test_y = x[:1300], y[:1300], x[1300:], y[1300:]


class Noise(nn.Module):
    """Shifts and scales every unit by numbers drawn anew in every step."""

    def forward(self, z):
        shift, scale = torch.randn(2, z.shape[1]) * 0.5
        return z * (1 + scale) + shift if self.training else z


plain = nn.Sequential(*(part for a, b in ((64, 64), (64, 64), (64, 64))
                        for part in (nn.Linear(a, b), nn.ReLU())), nn.Linear(64, 10))  # fmt: skip


def network(*norms):
    """The same weights, with some layers before each activation."""
    parts = []
    for layer in copy.deepcopy(plain):
        if isinstance(layer, nn.ReLU):
            parts += [norm() for norm in norms]
        parts.append(layer)
    return nn.Sequential(*parts)


names = ("without", "with BN", "with BN, then noise")
norms = ((), (lambda: gb.BatchNorm1d(64),), (lambda: gb.BatchNorm1d(64), Noise))
for name, norm in zip(names, norms, strict=True):
    net = network(*norm)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    order, memory = torch.Generator().manual_seed(1), {}
    probe = (x[:256], y[:256])
    for number in range(160):
        if number % 20 == 0:  # on one fixed batch, so that only the network moves
            step = gb.Step(net, cross_entropy, probe)
            found = gb.measure(step, "covariate_shift", memory)
        rows = torch.randint(len(x), (64,), generator=order)
        optimizer.zero_grad()
        cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    path = found[f"{len(net) - 1}/path"].item()
    accuracy = (net.eval()(test_x).argmax(1) == test_y).double().mean()
    print(f"{name:<20} path of the last layer's input {path:5.2f} sd, accuracy {accuracy:.1%}")
