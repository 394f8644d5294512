"""The backward pass: the chain rule's equations, norms, batch sums, the step that follows."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd import grad

from gammabeta._runs import Row
from gammabeta.studies._identities._compare import (
    RIGHT,
    TRAP,
    WORDED,
    Check,
    cancellation,
    check,
    data,
    exact_layers,
    layers,
    mean,
    normal,
    over,
    put,
    var,
    xhat,
)

SHAPES = ((48, 6), (8, 5, 3, 4))
EPS_LAYER = 1e-5


def six_equations(x: Tensor, dy: Tensor, gamma: Tensor, eps: float) -> dict[str, Tensor]:
    """The chain rule as Ioffe & Szegedy write it, from dl/dy to dl/dx, dl/dgamma, dl/dbeta."""
    axes = [0, *range(2, x.dim())]
    m = x.numel() // x.shape[1]
    rest, spread = x - over(mean(x), x), var(x) + eps
    dxhat = dy * over(gamma, x)
    dvar = (dxhat * rest).sum(axes) * -0.5 * spread**-1.5
    dmean = -dxhat.sum(axes) * spread**-0.5 + dvar * (-2 * rest).sum(axes) / m
    dx = dxhat * over(spread**-0.5, x) + over(dvar, x) * 2 * rest / m + over(dmean, x) / m
    dgamma, dbeta = (dy * xhat(x, eps)).sum(axes), dy.sum(axes)
    return {"xhat": dxhat, "var": dvar, "mean": dmean, "x": dx, "gamma": dgamma, "beta": dbeta}


def short_form(x: Tensor, dy: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """dx = gamma/sigma (dy - mean(dy) - xhat mean(dy xhat))."""
    n = xhat(x, eps)
    rest = dy - over(mean(dy), x) - n * over(mean(dy * n), x)
    return rest * over(gamma / (var(x) + eps).sqrt(), x)


def backward(g: torch.Generator) -> Iterator[Row]:
    for shape in SHAPES:
        x, dy = data(g, *shape).requires_grad_(), normal(g, *shape)
        gamma, beta = normal(g, shape[1]), normal(g, shape[1])
        axes = [0, *range(2, x.dim())]
        said = {k: v.detach() for k, v in six_equations(x, dy, gamma, EPS_LAYER).items()}
        k = cancellation(x) * (1 + (said["xhat"].abs().max() / said["x"].abs().max()))
        # What has no place in a layer, against automatic differentiation of the equations.
        mu = x.mean(axes)
        sigma2 = ((x - over(mu, x)) ** 2).mean(axes)
        n = (x - over(mu, x)) / over((sigma2 + EPS_LAYER).sqrt(), x)
        inner = grad(over(gamma, x) * n + over(beta, x), (n, sigma2, mu), dy)
        for key, wanted in zip(("xhat", "var", "mean"), inner, strict=True):
            compared = f"torch.autograd: dl/d{key}"
            yield check(RIGHT, compared, said[key], wanted, condition=k)
        for name, layer in layers(x).items():
            put(layer, weight=gamma, bias=beta)
            dx, *rest = grad(layer(x), (x, *layer.parameters()), dy)
            yield check(RIGHT, f"{name}: dl/dx", said["x"], dx, condition=k)
            short = short_form(x, dy, gamma, EPS_LAYER)
            yield check(RIGHT, f"{name}: dl/dx in the short form", short, dx, condition=k)
            for key, wanted in zip(("gamma", "beta"), rest, strict=True):
                more = (dy * xhat(x, EPS_LAYER)).abs().sum() / wanted.abs().max()
                compared = f"{name}: dl/d{key}"
                yield check(RIGHT, compared, said[key], wanted, condition=k * (1 + more))
            size = dx.abs().max()
            yield check(RIGHT, f"{name}: dx sums to 0", mean(dx), 0 * mu, condition=k, scale=size)
            detached = dy * over(gamma / (var(x) + EPS_LAYER).sqrt(), x)
            compared = f'{name}: "the statistics are constants"'
            yield check(TRAP, compared, detached, dx, condition=k)
        for name, normalize in exact_layers(x).items():
            (dx,) = grad(normalize(x, gamma, beta), x, dy)
            size = dx.abs().max()
            found = mean(dx * xhat(x, 0.0))
            compared = f"{name}: dx xhat sums to 0"
            yield check(RIGHT, compared, found, 0 * mu, condition=k, scale=size)


def gamma_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """dl/dgamma = sum dy xhat."""
    return (dy * xhat(x, EPS_LAYER)).sum([0, *range(2, x.dim())])


def gamma_grad(g: torch.Generator) -> Iterator[Row]:
    for shape in SHAPES:
        x, dy = data(g, *shape), normal(g, *shape)
        said = gamma_gradient(x, dy)
        k = cancellation(x) * (1 + (dy * xhat(x, EPS_LAYER)).abs().sum() / said.abs().max())
        for name, layer in layers(x).items():
            put(layer, weight=normal(g, shape[1]), bias=normal(g, shape[1]))
            (found,) = grad(layer(x), layer.get_parameter("weight"), dy)
            yield check(RIGHT, f"{name}: sum of dy xhat", said, found, condition=k)
            raw = (dy * x).sum([0, *range(2, x.dim())])
            yield check(TRAP, f'{name}: "sum of dy x"', raw, found, condition=k)
            if x.dim() > 2:
                short = (dy * xhat(x, EPS_LAYER)).sum(0)[:, 0, 0]
                compared = f'{name}: "over the batch, not over positions"'
                yield check(TRAP, compared, short, found, condition=k)


def beta_gradient(dy: Tensor) -> Tensor:
    """dl/dbeta = sum dy."""
    return dy.sum([0, *range(2, dy.dim())])


def beta_grad(g: torch.Generator) -> Iterator[Row]:
    for shape in SHAPES:
        x, dy = data(g, *shape), normal(g, *shape)
        said = beta_gradient(dy)
        k = 1 + dy.abs().sum() / said.abs().max()
        for name, layer in layers(x).items():
            put(layer, weight=normal(g, shape[1]), bias=normal(g, shape[1]))
            (found,) = grad(layer(x), layer.get_parameter("bias"), dy)
            yield check(RIGHT, f"{name}: sum of dy", said, found, condition=k)
            compared = f'{name}: "the mean of dy"'
            yield check(TRAP, compared, mean(dy), found, condition=k)


def weight_gradient(upstream: Tensor, incoming: Tensor) -> Tensor:
    """dL/dw = sum over the batch of dL/dz times the input."""
    return (upstream * incoming).sum()


def linear_grad(g: torch.Generator) -> Iterator[Row]:
    a, target = normal(g, 32, 1), normal(g, 32, 1)
    chains: dict[str, nn.Module] = {"torch.nn.Linear": nn.Identity()}
    chains |= layers(a)
    for name, norm in chains.items():
        with torch.random.fork_rng(devices=()):
            links = [nn.Linear(1, 1, bias=False).double() for _ in "bcd"]
        for link in links:
            put(link, weight=normal(g, 1, 1))
        where = "a chain a, b, c, d" if name.startswith("torch.nn.L") else f"a chain with {name}"
        values = [a]
        for link in links:
            values.append(link(norm(values[-1])))
        inputs = [norm(v) for v in values[:-1]]
        loss = ((values[-1] - target) ** 2).mean()
        for link, z, put_in in zip(links, values[1:], inputs, strict=True):
            upstream, wanted = grad(loss, (z, link.weight), retain_graph=True)
            said = weight_gradient(upstream, put_in)
            # Before BN the gradient of a single weight is 0 but for eps: a sum that cancels.
            terms = (upstream * put_in).abs().sum()
            compared = f"{where}: dL/dw is dL/dz times the input"
            found = said.expand_as(wanted)
            yield check(RIGHT, compared, found, wanted, condition=4.0, scale=terms)
            step = link.weight.detach() - 0.1 * wanted
            compared = f'{where}: "the weight becomes dL/dz times the input"'
            yield check(TRAP, compared, found, step, condition=4.0)


def linear(y: Tensor) -> Tensor:
    return y


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "linear": linear,
}


def batch_sum_gradient(y: Tensor, slope: Tensor, n: Tensor, factor: Tensor) -> Tensor:
    """gamma/sigma (f' - mean(f') - xhat mean(f' xhat)), of the sum over the batch of f(y)."""
    return factor * (slope - mean(slope) - n * mean(slope * n))


def f_jac2(g: torch.Generator) -> Iterator[Row]:
    m, d = 64, 12
    u, w = normal(g, m, d), normal(g, 7, d)
    x = u @ w.T
    k = cancellation(x) * (u.abs() @ w.abs().T).max()
    for name, layer in layers(x).items():
        gamma = normal(g, 7)
        put(layer, weight=gamma, bias=normal(g, 7))
        n, factor = xhat(x, EPS_LAYER), gamma / (var(x) + EPS_LAYER).sqrt()
        for activation, f in ACTIVATIONS.items():
            v = u.clone().requires_grad_()
            y = layer(v @ w.T)
            out = f(y)
            (slope,) = grad(out.sum(), y, retain_graph=True)
            said = batch_sum_gradient(y, slope, n, factor)
            size = (factor.abs() * w.abs().amax(1)).max()
            # Unit by unit: the gradient of the batch's sum of one unit, as the study's code takes.
            rows = [grad(out[:, j].sum(), v, retain_graph=True)[0] for j in range(7)]
            found = torch.stack(rows, 1)
            wanted = said[:, :, None] * w
            compared = f"{name}, {activation}: gradient of the batch sum"
            yield check(RIGHT, compared, wanted, found, condition=k, scale=size)
            if activation == "linear":
                compared = f"{name}, linear: identically 0"
                yield check(RIGHT, compared, found, 0 * found, condition=k, scale=size)
            own = slope * factor * (1 - 1 / m - n * n / m)
            compared = f'{name}, {activation}: "it is the Jacobian of a sample with itself"'
            yield check(TRAP, compared, found, own[:, :, None] * w, condition=k)


def squared_norm(dy: Tensor, n: Tensor, factor: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """gamma^2/sigma^2 (||g||^2 - <1, g>^2/m - <g, xhat>^2/m), per channel.

    With eps the last term counts 2 - share times, share = variance / (variance + eps).
    """
    m = len(dy)
    lost = dy.sum(0) ** 2 / m + (2 - share) * (dy * n).sum(0) ** 2 / m
    return factor**2 * ((dy**2).sum(0) - lost)


def grad_identity(g: torch.Generator) -> Iterator[Row]:
    x, dy, gamma = data(g, 16, 8), normal(g, 16, 8), normal(g, 8)
    z = x.clone().requires_grad_()
    normalizers: dict[str, Callable[..., Tensor]] = {**exact_layers(x), **layers(x)}
    for name, normalize in normalizers.items():
        eps = EPS_LAYER if isinstance(normalize, nn.Module) else 0.0
        if isinstance(normalize, nn.Module):
            (dx,) = grad(put(normalize, weight=gamma)(z), z, dy)
        else:
            (dx,) = grad(normalize(z, gamma, 0 * gamma), z, dy)
        found = (dx**2).sum(0)
        n, factor = xhat(x, eps), gamma / (var(x) + eps).sqrt()
        wanted = squared_norm(dy, n, factor, var(x) / (var(x) + eps))
        left = (dy**2).sum(0) - dy.sum(0) ** 2 / 16 - (dy * n).sum(0) ** 2 / 16
        k = cancellation(x) * ((dy**2).sum(0) / left).max()
        compared = f"{name}: squared norm of the gradient"
        yield check(RIGHT, compared, found, wanted, condition=k)
        for note, power in (("1/sqrt(m)", 0.5), ("1/m inside the square", 2.0)):
            lost = dy.sum(0) ** 2 / 16 + (dy * n).sum(0) ** 2 / 16**power
            wrong = factor**2 * ((dy**2).sum(0) - lost)
            yield check(TRAP, f'{name}: "{note}"', wrong, found, condition=k)


def descent(parameter: Tensor, gradients: Tensor, rate: float) -> Tensor:
    """theta - alpha/m times the sum of the gradients of the m samples."""
    return parameter - rate * gradients.mean(0)


def sgd_form(g: torch.Generator) -> Iterator[Row]:
    u, target, w = normal(g, 24, 5), normal(g, 24, 4), normal(g, 4, 5)
    rate = 0.01
    norms: dict[str, nn.Module] = {"torch.nn.Linear alone": nn.Identity()}
    norms |= layers(normal(g, 24, 4))
    for name, norm in norms.items():
        with torch.random.fork_rng(devices=()):
            linear = put(nn.Linear(5, 4, bias=False).double(), weight=w)
        weight = linear.get_parameter("weight")

        def losses(norm: nn.Module = norm, linear: nn.Module = linear) -> Tensor:
            return ((torch.tanh(norm(linear(u))) - target) ** 2).sum(1)

        before = losses()
        each = torch.stack([grad(one, weight, retain_graph=True)[0] for one in before])
        (whole,) = grad(before.mean(), weight)
        k = 1 + each.abs().sum(0).max() / whole.abs().max()
        down, up = descent(w, each, rate), w + rate * each.mean(0)
        weight.grad = whole
        torch.optim.SGD([weight], lr=rate).step()
        theirs = weight.detach().clone()
        move = (theirs - w).abs().max()
        k = k * w.abs().max() / move
        compared = f"{name}: theta - alpha/m sum, torch.optim.SGD"
        yield check(RIGHT, compared, down - w, theirs - w, condition=k)
        compared = f"{name}: theta + alpha/m sum, torch.optim.SGD"
        yield check(WORDED, compared, up - w, theirs - w, condition=k)
        put(linear, weight=down)
        fallen = float(losses().mean() < before.mean())
        put(linear, weight=up)
        risen = float(losses().mean() > before.mean())
        yield check(RIGHT, f"{name}: the loss falls with minus", fallen, 1.0)
        yield check(WORDED, f"{name}: the loss does not rise with plus", 1 - risen, 1.0)


CHECKS: dict[str, Check] = {
    "sgd-form": sgd_form,
    "gamma-grad": gamma_grad,
    "beta-grad": beta_grad,
    "backward": backward,
    "linear-grad": linear_grad,
    "f-jac2": f_jac2,
    "grad-identity": grad_identity,
}
