"""The equations of batch normalization, by hand, beside automatic differentiation.

Four values of one feature. Every line below is one equation of Ioffe & Szegedy 2015, section 3.
"""

import torch

import gammabeta as gb

x = torch.tensor([1.0, 3.0, 5.0, 11.0], dtype=torch.float64, requires_grad=True)
gamma = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
beta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
dy = torch.tensor([1.0, 0.0, 0.0, -1.0], dtype=torch.float64)  # what comes from above
m, eps = len(x), 1e-5

# forward
mean = x.sum() / m
var = ((x - mean) ** 2).sum() / m
xhat = (x - mean) / (var + eps).sqrt()
y = gamma * xhat + beta
print(f"mean {mean:.3f}, variance {var:.3f}")
print("x^  ", [round(v, 3) for v in xhat.tolist()])
print("y   ", [round(v, 3) for v in y.tolist()])

# backward: three lines, in which the whole batch meets
dbeta = dy.sum()
dgamma = (dy * xhat).sum()
dx = gamma / (var + eps).sqrt() * (dy - dbeta / m - xhat * dgamma / m)
print("dx  ", [round(v, 4) for v in dx.tolist()])

# the same by automatic differentiation, and by the package in one call
for name, output in (("autograd", y), ("gb.batch_norm", gb.batch_norm(x[:, None], gamma[None],
                     beta[None], eps=eps)[0][:, 0])):  # fmt: skip
    found = torch.autograd.grad(output, (x, gamma, beta), dy, retain_graph=True)
    pairs = zip(found, (dx, dgamma, dbeta), strict=True)
    error = max((theirs - ours).abs().max().item() for theirs, ours in pairs)
    print(f"largest difference from {name}: {error:.1e}")

# what the two means take away: up to eps, no gradient moves the mean or the scale of x
print(f"sum of dx {dx.sum().item():.0e}, sum of dx x^ {(dx * xhat).sum().item():.0e}")
again = gb.batch_norm(7 * x[:, None] + 100, gamma[None], beta[None], eps=0.0)[0]
plain = gb.batch_norm(x[:, None], gamma[None], beta[None], eps=0.0)[0]
print(f"y of 7 x + 100 less y of x: {(again - plain).abs().max().item():.0e}")
