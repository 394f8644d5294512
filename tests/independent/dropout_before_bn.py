"""dropout-before-bn: behind dropout a BN tests with another variance than it trained with.

784-100-100-10, ReLU, 5,000 images, batches of 64, 300 steps of SGD at the rate 0.1, dropout of p
directly before the first BN or the second. Of what arrives there from the test images: variance
over the running variance, over the formula for that ratio; geometric mean over the units.
"""

import torch
from networks import dense, draw, fit, images
from plain import tell
from torch import nn

SEEDS = range(70, 75)


def ratio_over_formula(place, p, seed):
    torch.manual_seed(seed)
    layers = []
    for k, fan_in in enumerate((784, 100)):
        layers += [dense(fan_in, 100, False)]
        if k == place:
            before = len(layers)
            layers += [nn.Dropout(p)]
        layers += [nn.BatchNorm1d(100), nn.ReLU()]
    net = nn.Sequential(*layers, dense(100, 10))
    for _ in fit(net, draw(train, 5000, seed), 0.1, 300, 64, seed):
        pass
    net.eval()
    with torch.no_grad():
        x = net[:before](test[0]).double()
    real = x.var(0)
    formula = real / (x.square().mean(0) / (1 - p) - x.mean(0).square())
    ratio = real / net[before + 1].running_var
    return float((ratio / formula).log().mean().exp())


if __name__ == "__main__":
    train, test = images()
    for place, word in enumerate(("first", "second")):
        for p in (0.2, 0.5):
            found = [ratio_over_formula(place, p, seed) for seed in SEEDS]
            tell("dropout-before-bn", f"p = {p} before {word} BN", found, null=1.0)
