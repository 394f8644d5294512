"""Dropout and batch normalization: two kinds of noise, and how they get in each other's way.

Dropout keeps the mean of what it drops and raises the variance: with probability p of dropping, the
variance of a value x grows by p/(1 - p) mean(x^2). A normalization behind it learns that variance
in training, and meets another one in eval mode (Li et al. 2018).
"""

import torch
from torch import nn

import gammabeta as gb

torch.manual_seed(0)
x = torch.randn(2048, 100).relu()

print("  p   variance with dropout, by formula   scale of eval mode")
for p in (0.1, 0.3, 0.5):
    model = nn.Sequential(nn.Dropout(p), gb.BatchNorm1d(100, momentum=None))
    model(x)  # training: the statistics are taken with dropout
    ratio = model[1].running_var.mean() / x.var(0).mean()
    formula = 1 + p / (1 - p) * (x.square().mean() / x.var(0).mean())
    scale = model.eval()(x).std(0).mean()  # 1 would be right
    print(f"{p:.1f} {ratio:>17.2f} times {formula:>13.2f} {scale:>17.2f}")
    gb.calibrate(model, x.split(256))  # the cure: statistics without dropout
    assert (model.eval()(x).std(0).mean() - 1).abs() < 0.01
print("after gb.calibrate the scale is 1.00; gb.check calls it", end=" ")
faulty = nn.Sequential(nn.Dropout(0.5), gb.BatchNorm1d(100))
print(*gb.check(faulty, x, select="BN008").codes)

# The layer's own noise: in another batch of m the same sample gets another value. As multiplicative
# noise it is dropout with p/(1 - p) = Var(s); most of it is an addend, which dropout does not have.
print("\n  m   Var(s), multiplicative   Var(a), additive   dropout with p")
net = nn.Sequential(nn.Linear(100, 50), gb.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 2))
step = gb.Step(net, nn.functional.cross_entropy, (x, torch.zeros(2048, dtype=torch.int64)))
found = gb.measure(step, "statistics_noise")
sizes, scales, shifts = (found[f"1/{key}"] for key in ("sizes", "multiplicative", "additive"))
for m, s, a in zip(sizes, scales, shifts, strict=True):
    if m in (16, 64, 256, 1024):
        print(f"{int(m):>4} {s:>17.5f} {a:>22.5f} {s / (1 + s):>18.2%}")
