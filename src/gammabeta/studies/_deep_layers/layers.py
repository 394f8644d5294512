"""When layers settle, and whether the last must follow those below (the experiment's protocol)."""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row
from gammabeta.ops import batch_norm
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import accuracy, batches, fair_split, log_steps, pixels, stream, train

LAYERS = 5
PROBES = 1000
NEAR = 0.9
AHEAD = (1, 10, 100)
LABELS = {"bn": "with BN", "none": "without"}


def trial(seed: int, images: Images, norm: str, rate: float, steps: int) -> Iterator[Row]:
    """Train one network: validation accuracy at the last three evaluations."""
    train_x, train_y, x, y = fair_split(images, seed, "validation")
    x, y = pixels(x[:2000], images.pixel_max), y[:2000]
    net = network(x.shape[1], norm, seed)
    stops = log_steps(steps, 3)[-3:]
    for step, loss in _training(net, train_x, train_y, images, rate, steps, seed, stops):
        share = accuracy(net, x, y)
        yield {"step": step, "accuracy": share, "diverged": not math.isfinite(loss)}


def draw(seed: int, images: Images, norm: str, rate: float, steps: int) -> Iterator[Row]:
    """When each layer's output has settled; the loss when the layers below are steps ahead."""
    label = LABELS[norm]
    train_x, train_y, probes, _ = fair_split(images, seed, "test")
    probes = pixels(probes[:PROBES], images.pixel_max)
    net = network(probes.shape[1], norm, seed)
    looks = sorted({*log_steps(steps, 30, first=1), steps // 10})
    seen, at, start = {0: outputs(net, probes)}, None, weights(net)
    speeds: dict[int, list[float]] = {}
    before = start
    for step, loss in _training(net, train_x, train_y, images, rate, steps, seed, looks):
        if not math.isfinite(loss):
            return  # no draw: the judge counts what there is
        now, last = weights(net), max(seen)
        moved = [float((a - b).norm() / b.norm()) for a, b in zip(now, before, strict=True)]
        speeds[step] = [size / (step - last) for size in moved]
        seen[step], before = outputs(net, probes), now
        if step == steps // 10:
            at = copy.deepcopy(net)
    final = seen[max(seen)]
    near = {s: [similarity(a, b) for a, b in zip(o, final, strict=True)] for s, o in seen.items()}
    for name, share in (("", False), ("of the way, ", True)):
        when = [settled({s: each[k] for s, each in near.items()}, share) for k in range(LAYERS + 1)]
        for k, place in enumerate(when if not share else (), 1):
            yield _value(f"step at which layer {k} has settled, {label}", place)
        yield _value(f"{name}rank correlation with depth, {label}", correlation(when))
    for step, each in near.items():
        for k, size in enumerate(each, 1):
            yield _point(norm, f"layer {k}", max(step, 0.5), size)
    for step, sizes in speeds.items():
        for k, size in enumerate(sizes, 1):
            yield _point(f"{norm}-speed", f"layer {k}", step, max(size, 1e-12))
    if at is not None:
        yield from _again(at, train_x, train_y, images, rate, seed, label)


def network(inputs: int, norm: str, seed: int) -> MLP:
    """Five layers of 100 ReLUs and the output layer."""
    sizes = (inputs, *[100] * LAYERS, 10)
    return MLP(sizes, "relu", norm == "bn", stream(seed, "weights"))


def outputs(net: MLP, x: Tensor) -> list[Tensor]:
    """What each layer gives to the next, and the logits, with the statistics of x as one batch."""
    found, h = [], x
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, nn.BatchNorm1d):
                h, _ = batch_norm(h, layer.weight, layer.bias, eps=layer.eps)
            else:
                h = layer(h)
            if isinstance(layer, nn.ReLU):
                found.append(h)
    return [*found, h]


def weights(net: MLP) -> list[Tensor]:
    """Copies of the weight matrices, from the input on."""
    return [m.weight.detach().clone() for m in net.layers if isinstance(m, nn.Linear)]


def similarity(a: Tensor, b: Tensor) -> float:
    """Linear CKA, ||A'B||^2 / (||A'A|| ||B'B||), of centered columns; 0 where one is constant.

    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> round(similarity(x, 2 * x + 1), 6)
    1.0
    """
    a, b = (v.double() - v.double().mean(0) for v in (a, b))
    sizes = (a.T @ a).norm() * (b.T @ b).norm()
    return float((a.T @ b).square().sum() / sizes) if sizes > 0 else 0.0


def settled(near: dict[int, float], of_the_way: bool) -> float:
    """First step at which the similarity is 0.9 of its last value, interpolated between looks.

    ``of_the_way``: at which it has made 0.9 of the way from its first value to its last.

    >>> settled({0: 0.2, 10: 0.8, 20: 1.0}, False)
    15.0
    >>> settled({0: 0.95, 10: 0.97, 20: 1.0}, False)
    0.0
    """
    steps = sorted(near)
    first, last = near[steps[0]], near[steps[-1]]
    goal = first + NEAR * (last - first) if of_the_way else NEAR * last
    if first >= goal:
        return 0.0
    for a, b in itertools.pairwise(steps):
        if near[b] >= goal:
            return a + (b - a) * (goal - near[a]) / (near[b] - near[a])
    return float(steps[-1])


def correlation(when: Sequence[float]) -> float:
    """Spearman's, of the step with the distance from the output; 0 where all steps are equal.

    >>> correlation([30.0, 20.0, 10.0])
    1.0
    """
    if len(set(when)) == 1:
        return 0.0
    return float(spearmanr(range(len(when), 0, -1), when).statistic)


def _again(
    net: MLP, x: Tensor, y: Tensor, images: Images, rate: float, seed: int, label: str
) -> Iterator[Row]:
    """Let the layers below the last two go ahead; then let the last two follow."""
    probes, labels = pixels(x[:PROBES], images.pixel_max), y[:PROBES]
    start = _loss(net, probes, labels)
    ahead, moved = copy.deepcopy(net), {}
    for step, _ in _training(ahead, x, y, images, rate, max(AHEAD), seed, AHEAD, "ahead"):
        moved[step] = copy.deepcopy(ahead)
    for steps, both in moved.items():
        mixed = behind(net, both)
        rise = math.log(_loss(mixed, probes, labels) / start)
        yield _value(f"rise of ln loss, layers below {steps} steps ahead, {label}", rise)
        joint = math.log(_loss(both, probes, labels) / start)
        yield _value(f"change of ln loss, all layers {steps} steps ahead, {label}", joint)
        back = _steps_back(mixed, x, y, images, rate, seed, start, probes, labels)
        yield _value(f"steps of the last layers to get back after {steps}, {label}", back)


def behind(top: MLP, below: MLP) -> MLP:
    """A network whose last two linear layers, with what follows them, are ``top``'s."""
    mixed = copy.deepcopy(below)
    cut = [k for k, m in enumerate(mixed.layers) if isinstance(m, nn.Linear)][-2]
    for k in range(cut, len(mixed.layers)):
        mixed.layers[k] = copy.deepcopy(top.layers[k])
    return mixed


def _steps_back(
    net: MLP,
    x: Tensor,
    y: Tensor,
    images: Images,
    rate: float,
    seed: int,
    goal: float,
    probes: Tensor,
    labels: Tensor,
) -> int:
    """Steps of SGD on the last two layers alone until the loss is what it was; 100 at most."""
    cut = [k for k, m in enumerate(net.layers) if isinstance(m, nn.Linear)][-2]
    top = [p for layer in list(net.layers)[cut:] for p in layer.parameters()]
    flat = x.flatten(1)
    order = batches(len(flat), 64, stream(seed, "back"))
    for step, index in zip(range(max(AHEAD)), order, strict=False):
        if _loss(net, probes, labels) <= goal:
            return step
        logits = net.with_batch_statistics(pixels(flat[index], images.pixel_max))
        gradients = torch.autograd.grad(cross_entropy(logits, y[index]), top)
        with torch.no_grad():
            for parameter, gradient in zip(top, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
    return max(AHEAD)


def _loss(net: MLP, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy, x as one batch with its own statistics."""
    with torch.no_grad():
        return float(cross_entropy(net.with_batch_statistics(x), y))


def _training(
    net: MLP,
    x: Tensor,
    y: Tensor,
    images: Images,
    rate: float,
    steps: int,
    seed: int,
    stops: Sequence[int],
    purpose: str = "order",
) -> Iterator[tuple[int, float]]:
    return train(
        net,
        x,
        y,
        pixel_max=images.pixel_max,
        rate=rate,
        steps=steps,
        order=stream(seed, purpose),
        stops=stops,
    )


def _value(cell: str, number: float) -> Row:
    return {"kind": "value", "cell": cell, "value": float(number)}


def _point(curve: str, series: str, x: float, y: float) -> Row:
    # Drawn, not judged: four digits keep the rows small.
    return {"kind": "curve", "curve": curve, "series": series, "x": x, "y": float(f"{y:.4g}")}
