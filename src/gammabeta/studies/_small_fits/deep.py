"""Deep networks, trained briefly: BN at the last layer alone, and residual towers."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from gammabeta._runs import Row
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP
from gammabeta.studies._small_fits._common import point, slope, value
from gammabeta.studies._train import (
    accuracy,
    batches,
    fair_split,
    log_steps,
    pixels,
    stream,
    train,
)

# -- BN nowhere, at the last hidden layer, everywhere ----------------------------------------------


def deep_net(inputs: int, depth: int, kind: str, seed: int) -> MLP:
    """inputs-[100]*depth-10, ReLU; kind "none", "last" (before the last activation) or "all"."""
    net = MLP((inputs, *[100] * depth, 10), "relu", kind == "all", stream(seed, "weights"))
    if kind == "last":
        *layers, activation, output = net.layers
        net.layers = nn.Sequential(*layers, BatchNorm1d(100), activation, output)
    return net


def trial(
    seed: int,
    images: Images,
    kind: str,
    rate: float,
    evaluation: str,
    steps: int,
    depth: int,
) -> Iterator[Row]:
    """Train one network: its accuracy at the last three evaluations."""
    train_x, train_y, x, y = fair_split(images, seed, evaluation)
    x = pixels(x, images.pixel_max)
    net = deep_net(x.shape[1], depth, kind, seed)
    for step, loss in train(
        net,
        train_x,
        train_y,
        pixel_max=images.pixel_max,
        rate=rate,
        steps=steps,
        order=stream(seed, "order"),
        stops=log_steps(steps, 3)[-3:],
    ):
        share = accuracy(net, x, y)
        yield {
            "step": step,
            "rate": rate,
            "accuracy": share,
            "diverged": not math.isfinite(loss),
        }


def large_steps(seed: int, images: Images, depth: int) -> Iterator[Row]:
    """Activations and gradients after at most 10 steps at the rate that the plain net cannot bear.

    That rate: the smallest of 0.1, 0.2, 0.4 ... at which its loss grows tenfold within 10 steps;
    measured before the step that would leave the finite numbers.
    """
    train_x, train_y, *_ = fair_split(images, seed, "test")
    order = list(zip(range(11), batches(len(train_x), 64, stream(seed, "order")), strict=False))
    chosen = [index for _, index in order]
    data = [(pixels(train_x[at], images.pixel_max), train_y[at]) for at in chosen]
    rate = 0.1
    while rate < 1e4 and not _grows(deep_net(data[0][0].shape[1], depth, "none", seed), data, rate):
        rate *= 2
    yield value("rate at which the loss without BN grows tenfold", rate)
    for kind in KINDS:
        net = deep_net(data[0][0].shape[1], depth, kind, seed)
        spreads, tail = _after(net, data, rate)
        if len(spreads) == depth and all(0 < s < math.inf for s in spreads):
            logs = [math.log10(s) for s in spreads]
            yield value(f"slope of log10 of the activations' sd per layer, {KINDS[kind]}",
                        slope(range(depth), logs))  # fmt: skip
        if math.isfinite(tail):
            yield value(f"kurtosis of the gradient of the middle weights, {KINDS[kind]}", tail)


KINDS = {"all": "BN everywhere", "last": "BN at the last layer", "none": "without"}


def _grows(net: MLP, data: Sequence[tuple[Tensor, Tensor]], rate: float) -> bool:
    first = None
    for x, y in data:
        loss = _step(net, x, y, rate)
        first = loss if first is None else first
        if not loss <= 10 * first:
            return True
    return False


def _step(net: MLP, x: Tensor, y: Tensor, rate: float) -> float:
    loss = cross_entropy(net.train()(x), y)
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    if bool(torch.isfinite(loss)) and all(bool(torch.isfinite(d).all()) for d in gradients):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
    return float(loss.detach())


def _after(
    net: MLP, data: Sequence[tuple[Tensor, Tensor]], rate: float
) -> tuple[list[float], float]:
    for x, y in data[:-1]:
        _step(net, x, y, rate)
    x, y = data[-1]
    spreads, at = [], x
    for layer in net.train().layers:
        if isinstance(layer, nn.ReLU):
            spreads.append(float(at.detach().double().std()))
        at = layer(at)
    weights = [m.weight for m in net.layers if isinstance(m, nn.Linear)]
    (gradient,) = torch.autograd.grad(cross_entropy(at, y), weights[len(weights) // 2])
    d = gradient.double() - gradient.double().mean()
    return spreads, float(d.pow(4).mean() / d.square().mean().square())


# -- residual towers -------------------------------------------------------------------------------

TOWERS = {"bn": "with BN", "none": "without", "skipinit": "SkipInit"}


class Towers(nn.Module):
    """``count`` residual towers side by side, alike at the start; they do not meet.

    Images pooled 2x2, a dense layer to ``width``, then blocks h <- h + f(h), with f a dense layer,
    BN, ReLU, a dense layer and BN; without BN in the other kinds, where SkipInit multiplies f by a
    learned number that starts at 0. Weights N(0, 2/fan-in), N(0, 1/fan-in) in the first and the
    last layer; no bias before BN, biases of 0 elsewhere.
    """

    def __init__(self, inputs: int, width: int, blocks: int, kind: str, count: int, seed: int):
        super().__init__()
        g = stream(seed, "weights")

        def weight(fan_in: int, fan_out: int, gain: float) -> nn.Parameter:
            w = torch.randn(fan_in, fan_out, generator=g) * math.sqrt(gain / fan_in)
            return nn.Parameter(w.repeat(count, 1, 1))

        def zeros(fan_out: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(count, 1, fan_out))

        self.kind, self.blocks = kind, blocks
        self.stem, self.stem_bias = weight(inputs, width, 1.0), zeros(width)
        self.weights = nn.ParameterList([weight(width, width, 2.0) for _ in range(2 * blocks)])
        self.head, self.head_bias = weight(width, 10, 1.0), zeros(10)
        inner = range(2 * blocks)
        if kind == "bn":
            # PyTorch's: in ours a batch with one value that is not finite enters the statistics of
            # no channel, and a tower that diverged would leave its mark on the others.
            self.norms = nn.ModuleList([nn.BatchNorm1d(count * width) for _ in inner])
        else:
            self.biases = nn.ParameterList([zeros(width) for _ in inner])
        if kind == "skipinit":
            scales = [nn.Parameter(torch.zeros(count, 1, 1)) for _ in range(blocks)]
            self.scales = nn.ParameterList(scales)

    def forward(self, x: Tensor, shares: list[float] | None = None) -> Tensor:
        """Logits (count, n, 10) for x of (n, inputs); ``shares`` takes each branch's variance."""
        count = len(self.stem)
        h = torch.baddbmm(self.stem_bias, x.expand(count, *x.shape), self.stem)
        for block in range(self.blocks):
            z = torch.relu(self._layer(h, 2 * block))
            z = self._layer(z, 2 * block + 1)
            if self.kind == "skipinit":
                z = self.scales[block] * z
            if shares is not None:
                branch, skip = (t.detach().var(1).mean() for t in (z, h))
                shares.append(float(branch / (branch + skip)))
            h = h + z
        return torch.baddbmm(self.head_bias, h, self.head)

    def _layer(self, h: Tensor, at: int) -> Tensor:
        if self.kind != "bn":
            return torch.baddbmm(self.biases[at], h, self.weights[at])
        z = torch.bmm(h, self.weights[at])
        count, n, width = z.shape
        # A channel for each unit of each tower.
        y: Tensor = self.norms[at](z.transpose(0, 1).reshape(n, count * width))
        return y.view(n, count, width).transpose(0, 1)


def pooled(images: Tensor, pixel_max: int) -> Tensor:
    """Rows of images in [0, 1], averaged over 2x2 pixels."""
    return avg_pool2d(images[:, None].float() / pixel_max, 2).flatten(1)


def towers_trial(
    seed: int,
    images: Images,
    kind: str,
    blocks: int,
    rates: Sequence[float],
    evaluation: str,
    steps: int,
) -> Iterator[Row]:
    """Train a tower at each rate: accuracies at the last three evaluations, by rate."""
    train_x, train_y, x, y = fair_split(images, seed, evaluation)
    # Pooling all of it once is cheaper than batch by batch.
    inner, outer = pooled(train_x, images.pixel_max), pooled(x, images.pixel_max)
    towers = Towers(inner.shape[1], 16, blocks, kind, len(rates), seed)
    parameters = list(towers.parameters())
    by_rate = torch.tensor(rates)
    stops = log_steps(steps, 3)[-3:]
    order = batches(len(inner), 64, stream(seed, "order"))
    for step, at in zip(range(1, steps + 1), order, strict=False):
        logits = towers.train()(inner[at])
        labels = train_y[at].repeat(len(rates))
        loss = cross_entropy(logits.flatten(0, 1), labels, reduction="none").view(len(rates), -1)
        gradients = torch.autograd.grad(loss.mean(1).sum(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                own = parameter.view(len(rates), -1)
                own.sub_(by_rate[:, None] * gradient.reshape(len(rates), -1))
            if step in stops:
                right = towers.eval()(outer).argmax(2) == y
                for rate, share, each in zip(rates, right.double().mean(1), loss, strict=True):
                    finite = bool(torch.isfinite(each).all())
                    yield {"step": step, "rate": rate, "accuracy": float(share),
                           "diverged": not finite}  # fmt: skip


def branch_shares(seed: int, images: Images, tiny: bool) -> Iterator[Row]:
    """Share of the variance that each branch adds, before training; its slope over the blocks."""
    width, blocks = (16, 16) if tiny else (64, 64)
    at = torch.randint(len(images.train_x), (256,), generator=stream(seed, "images"))
    x = pooled(images.train_x[at], images.pixel_max)
    for kind in ("bn", "none"):
        shares: list[float] = []
        with torch.no_grad():
            Towers(x.shape[1], width, blocks, kind, 1, seed).train()(x, shares)
        for block, share in enumerate(shares, 1):
            yield point("branch", TOWERS[kind], block, max(share, 1e-12))
        # For large block numbers, as the claim is: the first 7 still see the input's own scale.
        logs = [math.log(share) for share in shares[7:]]
        places = [math.log(block) for block in range(8, len(shares) + 1)]
        yield value(f"slope of the branch's share, {TOWERS[kind]}", slope(places, logs))
