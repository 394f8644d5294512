"""deep-hard: without BN a network of 20 layers stays behind one of 2, whatever its weights.

784-[100]*L-10, ReLU, no BN, standardized pixels, 5,000 images, batches of 64, 400 steps of SGD:
accuracy on the first 5,000 test images with 2 layers minus that with 20. Weights truncated normal
with sqrt(2 / fan-in) ("He"), or N(0, 0.1^2). Rates: those chosen in docs/verdicts.md.
"""

import torch
from networks import draw, final, images, mlp
from plain import tell
from torch import nn

SEEDS = range(60, 65)
RATES = {"He": {2: 0.3, 20: 0.03}, "N(0, 0.1)": {2: 0.3, 20: 0.1}}


def accuracy(start, depth, seed):
    torch.manual_seed(seed)
    net = mlp(depth)
    if start != "He":
        for layer in net[::2]:
            nn.init.normal_(layer.weight, std=0.1)
    x, y = draw(train, 5000, seed)
    data = (x - x.mean()) / x.std(), y
    seen = (test[0][:5000] - x.mean()) / x.std(), test[1][:5000]
    return final(net, data, seen, RATES[start][depth], 400, 64, seed)


if __name__ == "__main__":
    train, test = images()
    for start in RATES:
        losses = [accuracy(start, 2, seed) - accuracy(start, 20, seed) for seed in SEEDS]
        tell("deep-hard", start, losses)
