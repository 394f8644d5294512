"""Watch a training, see how far eval mode is from training mode, and cure it: half a minute.

    python examples/watch_your_training.py && gammabeta report record.jsonl

Averaged weights generalize better, but nobody has ever computed their running statistics.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gammabeta as gb

torch.manual_seed(0)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
x, y = images.float().view(-1, 1, 8, 8) / 16, labels
x, y, test_x, test_y = x[:1400], y[:1400], x[1400:], y[1400:]
layers = [layer for c, d in ((1, 32), (32, 64), (64, 64)) for layer in
          (nn.Conv2d(c, d, 3, padding=1, bias=False), gb.BatchNorm2d(d), nn.ReLU())]  # fmt: skip
net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
rec = gb.Recorder(net, optimizer=optimizer, every=20, path=[*sys.argv, "record.jsonl"][1])
for _ in range(10):
    for rows in torch.randperm(len(x)).split(64)[:-1]:
        rec.step(cross_entropy, (x[rows], y[rows]))
        optimizer.zero_grad()
        cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        averaged.update_parameters(net)
print(f"{len(rec.record().steps)} records cost {rec.overhead:.1%}, {rec.skipped} more were skipped")
for when in ("before", "after"):
    accuracy = (averaged.eval()(test_x).argmax(1) == test_y).double().mean()
    print(f"\n{when} gb.calibrate: accuracy of the averaged weights {accuracy:.1%}")
    print(gb.gap(averaged, x[:1280].split(64)))
    gb.calibrate(averaged, x.split(64))
