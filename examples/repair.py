"""One planted fault, named and cured: python examples/repair.py [twice | stale | frozen]"""

import os
import sys

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.optim.swa_utils import AveragedModel

import gammabeta as gb
from gammabeta.studies._data import load

fault = sys.argv[1] if len(sys.argv) > 1 else "twice"
data = load("mnist" if "GAMMABETA_DATA" in os.environ else "digits")  # its folder; else bundled
x, y = data.train_x[:3000, None] / data.train_x.max(), data.train_y[:3000]
x = avg_pool2d(x, 2) if x.shape[-1] > 8 else x
x, y, test_x, test_y = x[:-500], y[:-500], x[-500:], y[-500:]


class Residual(nn.Sequential):
    def forward(self, x):
        return torch.relu(x + super().forward(x))


def train(net, x, y, averaged=None):
    def step(net, batch):
        cross_entropy(net(batch[0]), batch[1]).backward()
        if fault == "twice":  # a look at something else in between: inverted images
            with torch.no_grad(), gb.no_update(net) if cured else torch.no_grad():
                net(1 - batch[0])

    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 3 * (len(x) // 64))
    for rows in (rows for _ in range(3) for rows in torch.randperm(len(x)).split(64)[:-1]):
        optimizer.zero_grad()
        step(net, (x[rows], y[rows]))
        optimizer.step()
        schedule.step() if averaged is None else averaged.update_parameters(net)
    return gb.check(net, (x[:512], y[:512]), optimizer, step=step)


for cured in (False, True):
    torch.manual_seed(0)
    conv = lambda c: (nn.Conv2d(c, 16, 3, padding=1, bias=False), gb.BatchNorm2d(16))  # noqa: E731
    blocks = [Residual(*conv(16), nn.ReLU(), *conv(16)) for _ in range(3)]
    body = nn.Sequential(*conv(1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten())
    net = nn.Sequential(body, nn.Linear(256, 10))
    used = AveragedModel(net) if fault == "stale" else net
    found = train(net, x, y, used if fault == "stale" else None)
    if fault == "frozen":  # a second head on features that are to stay as they are
        head, net[1] = net[1], nn.Linear(256, 2)
        body.requires_grad_(False)
        gb.freeze(body) if cured else None
        found, net[1] = train(net, 1 - x, y % 2), head
    if fault == "stale":  # nobody has computed the statistics of the averaged weights
        gb.calibrate(used, x.split(64)) if cured else None
        found = gb.check(used, (x[:512], y[:512]))
    accuracy = (used.eval()(test_x).argmax(1) == test_y).double().mean()
    print(f"{'cured' if cured else 'as planted'}: accuracy {accuracy:.1%}. {found}\n")
