"""noise-reg: the smaller the batch that the statistics are of, the smaller the gap.

784-100-100-10, ReLU, BN before it, 2,000 images, batches of 512, 300 steps of SGD, each at the rate
that docs/verdicts.md names as chosen; statistics of m = 4, 16, 64 and 512 images: slope over log2 m
of training minus test accuracy at the end. And the gap with statistics of all 512 and on them, for
each 16 images and channel, noise with the means and variances of theirs, minus that at m = 16.
Running statistics are those of the 512 in every case.
"""

import math

import torch
from networks import draw, fit, images, mlp, points
from plain import slope, tell
from torch import nn

SEEDS = range(110, 115)
RATES = {4: 3.0, 16: 3.0, 64: 1.0, 512: 3.0}
NOISE_RATE = 3.0


class Ghost(nn.BatchNorm1d):
    """Statistics of `size` images each; or of all of them, with the noise of that size."""

    def __init__(self, width, size, noise=False):
        super().__init__(width)
        self.size, self.noise = size, noise

    def forward(self, x):
        whole = super().forward(x)
        if not self.training:
            return whole
        parts = x.view(-1, self.size, x.shape[1])
        mean, var = parts.mean(1, keepdim=True), parts.var(1, unbiased=False, keepdim=True)
        if not self.noise:
            y = (parts - mean) / (var + self.eps).sqrt()
            return self.weight * y.view_as(x) + self.bias
        with torch.no_grad():
            scale = (x.var(0, unbiased=False) + self.eps).sqrt()
            kinds = (x.mean(0) - mean) / scale, scale / (var + self.eps).sqrt()
            shift, factor = (k.mean(0) + k.std(0) * torch.randn_like(k) for k in kinds)
        y = ((x - x.mean(0)) / (x.var(0, unbiased=False) + self.eps).sqrt()).view_as(parts)
        return self.weight * ((y + shift) * factor).view_as(x) + self.bias


def gap(size, noise, rate, seed):
    torch.manual_seed(seed)
    net, data = mlp(2, lambda width: Ghost(width, size, noise)), draw(train, 2000, seed)
    for _ in fit(net, data, rate, 300, 512, seed):
        pass
    return points(net, data) - points(net, test)


if __name__ == "__main__":
    train, test = images()
    gaps = {m: [gap(m, False, RATES[m], seed) for seed in SEEDS] for m in RATES}
    doublings = [math.log2(m) for m in RATES]
    slopes = [slope(doublings, values) for values in zip(*gaps.values(), strict=True)]
    tell("noise-reg", "gap per doubling of m", slopes)
    noisy = [gap(16, True, NOISE_RATE, seed) for seed in SEEDS]
    tell(
        "noise-reg",
        "noise of 16 − BN at m = 16",
        [a - b for a, b in zip(noisy, gaps[16], strict=True)],
    )
