"""Training with a rate of their own for the weights of hidden units, or with fixed norms."""

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta.studies._nets import MLP
from gammabeta.studies._train import pixels, stream, train

BATCH = 64


def network(count: int, bn: bool, seed: int, width: float = 1.0) -> MLP:
    """The network before training, for images of so many pixels."""
    units = round(100 * width)
    return MLP((count, units, units, 10), "relu", bn, stream(seed, "weights"))


def hidden(net: MLP) -> list[Tensor]:
    """The weights that enter hidden units, layer by layer."""
    return [layer.weight for layer in net.layers if isinstance(layer, nn.Linear)][:-1]


def lengths(weight: Tensor) -> Tensor:
    """The norm of each unit's weights, as a column."""
    found: Tensor = torch.linalg.vector_norm(weight.detach(), dim=1, keepdim=True)
    return found


def run(
    net: MLP,
    x: Tensor,
    y: Tensor,
    *,
    pixel_max: int,
    rate: float,
    steps: int,
    seed: int,
    stops: Collection[int],
    weights: float | None = None,
    fixed: bool = False,
) -> Iterator[tuple[int, bool]]:
    """Train in place; yields each step of ``stops``, and whether a loss so far was not finite.

    Args:
        weights: the rate of the hidden weights, where it is not that of all else.
        fixed: after each step every hidden unit's weights get the norm that they had at first.
    """
    inside = hidden(net)
    first = [lengths(w) for w in inside]
    every = range(1, steps + 1)
    order = stream(seed, "order")
    diverged = False
    for step, loss in train(
        net, x, y, pixel_max=pixel_max, rate=rate, steps=steps, order=order, stops=every
    ):
        diverged = diverged or not math.isfinite(loss)
        with torch.no_grad():
            for w, length in zip(inside, first, strict=True):
                if weights is not None and w.grad is not None:
                    w.sub_(w.grad, alpha=weights - rate)
                if fixed:
                    w.mul_(length / lengths(w))
        if step in stops:
            yield step, diverged


def objective(net: MLP, x: Tensor, y: Tensor, pixel_max: int) -> float:
    """What is trained: the mean cross-entropy over all images, in batches, by their statistics."""
    whole = len(x) - len(x) % BATCH
    with torch.no_grad():
        logits = net.with_batch_statistics(pixels(x[:whole], pixel_max), BATCH)
        return float(cross_entropy(logits, y[:whole]))


def growth(net: MLP, first: Collection[Tensor]) -> float:
    """ln of the squared norm over the one at first, mean over hidden units."""
    ratios = [lengths(w) / was for w, was in zip(hidden(net), first, strict=True)]
    return float(2 * torch.cat(ratios).log().mean())
