"""Why a batch of two gives plus and minus one, and what a small batch costs.

Of two values the mean lies in the middle, and the standard deviation is half their distance: x^ is
-1 and +1 whatever they are. The layer says which is larger, and no gradient comes through.
"""

import torch
from torch import nn

import gammabeta as gb

torch.manual_seed(0)
for pair in ([1.0, 3.0], [1.0, 1.001], [-500.0, 20.0]):
    x = torch.tensor(pair, dtype=torch.float64)[:, None].requires_grad_()
    y, _ = gb.batch_norm(x, eps=0.0)
    (dx,) = torch.autograd.grad(y[0].sum(), x)
    print(f"{pair} becomes {y.flatten().tolist()}, gradient {dx.abs().max():.0e}")

# eps alone lets a pair's distance through, where it is as small as sqrt(eps)
x = torch.tensor([0.0, 0.004], dtype=torch.float64)[:, None]
print("with eps = 1e-5: 0 and 0.004 become", gb.batch_norm(x)[0].flatten().tolist()[1])

# with m values none can exceed sqrt(m - 1), and the batch's mean and variance are noise
print("\n  m   bound   sd of the batch's mean   what eval mode changes")
population = torch.randn(4096, 200)
layer = nn.BatchNorm1d(200, momentum=None)
layer(population)  # running statistics: those of all values
for m in (2, 4, 16, 64, 256):
    parts = population.split(m)
    noise = torch.stack([part.mean(0) for part in parts]).std(0).mean()
    training = torch.cat([gb.batch_norm(part)[0] for part in parts])
    gap = (training - layer.eval()(population)).square().mean().sqrt()
    print(f"{m:>3} {(m - 1) ** 0.5:>7.2f} {noise:>24.3f} {gap:>24.1%}")
