"""stale-update and simultaneous-error, fair: a step of all layers at once.

784-[100]*L-10, ReLU, 5,000 images, batches of 128, 150 steps of SGD, each network at the rate that
docs/verdicts.md names as chosen. At the start and after every 25 steps, on a batch of 128:
stale-update (L = 4): every weight matrix moves against its gradient by 1, 3, 10 and 30 % of its
    norm; share of such steps that raise the loss, without BN minus with it;
simultaneous-error: all parameters move against their gradient, so far that 10 % less loss is
    promised; |change - promise| / promise, median over the looks; slope of its logarithm over that
    of L, without BN, and without minus with BN.
"""

import math
import statistics

import torch
from networks import draw, fit, images, mlp
from plain import slope, tell
from torch import nn

SEEDS, SHARES = range(10, 15), (0.01, 0.03, 0.1, 0.3)
RATES = {  # without and with BN
    1: (0.3, 3.0),
    2: (0.3, 1.0),
    4: (0.3, 0.3),
    8: (0.1, 1.0),
    16: (0.03, 0.3),
}


def look(net, batch, matrices):
    """Relative error of the promise; and whether each step of all matrices raises the loss."""
    state = {name: value.clone() for name, value in net.state_dict().items()}

    def loss():
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    def after(moves):
        with torch.no_grad():
            for p, move in moves:
                p -= move
            value = float(loss())
        net.load_state_dict(state)
        return value

    parameters = list(net.parameters())
    value = loss()
    gradients = torch.autograd.grad(value, parameters)
    pairs, value = list(zip(parameters, gradients, strict=True)), value.item()
    far = 0.1 * value / sum(float(g.square().sum()) for g in gradients)
    change = after([(p, far * g) for p, g in pairs]) - value
    raised = [
        after([(p, share * p.norm() * g / g.norm()) for p, g in pairs if p.ndim == 2]) > value
        for share in (SHARES if matrices else ())
    ]
    return min(abs(change + 0.1 * value) / (0.1 * value), 100.0), raised


def run(depth, norm, rate, seed):
    """Median error, and the share of steps that raise the loss."""
    torch.manual_seed(seed)
    net, data = mlp(depth, norm), draw(train, 5000, seed)
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in fit(net, data, rate, 150, 128, seed, range(0, 151, 25)):
        at = torch.randperm(5000, generator=generator)[:128]
        found.append(look(net, (data[0][at], data[1][at]), depth == 4))
    errors, raised = zip(*found, strict=True)
    flat = [one for step in raised for one in step]
    return statistics.median(errors), statistics.fmean(flat) if flat else None


if __name__ == "__main__":
    train, _ = images()
    stale, slopes = [], []
    for seed in SEEDS:
        arms = []
        for k, norm in enumerate((None, nn.BatchNorm1d)):
            arms.append({depth: run(depth, norm, RATES[depth][k], seed) for depth in RATES})
        stale.append(arms[0][4][1] - arms[1][4][1])
        logs = [[math.log(arm[depth][0]) for depth in RATES] for arm in arms]
        slopes.append([slope([math.log(depth) for depth in RATES], values) for values in logs])
    tell("stale-update", "share of steps that raise the loss, none − BN", stale)
    tell("simultaneous-error", "slope of the error without BN", [none for none, _ in slopes])
    tell("simultaneous-error", "slope of the error, none − BN", [none - bn for none, bn in slopes])
