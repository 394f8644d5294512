"""Training as the studies do it: one plain loop, and the two ways of evaluating.

Images stay uint8 in memory; a batch becomes float32 in [0, 1] when it is drawn, which is as fast
as gathering floats and needs a quarter of the memory.
"""

import hashlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP


def stream(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for each (seed, purpose): drawing from one moves no other.

    >>> torch.rand(1, generator=stream(0, "weights")) == torch.rand(1, generator=stream(0, "order"))
    tensor([False])
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    # 63 bits: torch takes a signed 64-bit seed.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def pixels(images: Tensor, pixel_max: int) -> Tensor:
    """Float32 rows in [0, 1] of uint8 images: (N, H, W) or (N, H W) -> (N, H W)."""
    return images.flatten(1).to(torch.float32).div_(pixel_max)


def batches(count: int, size: int, order: torch.Generator) -> Iterator[Tensor]:
    """Indices of one batch after another, for ever: each epoch in a fresh random order.

    The images left over at the end of an epoch, fewer than a batch, are skipped in that epoch.

    Raises:
        ValueError: fewer images than one batch needs.
    """
    if not 0 < size <= count:
        raise ValueError(f"a batch needs 1 to {count} (all) images, got {size}.")
    while True:
        permutation = torch.randperm(count, generator=order)
        yield from permutation[: count - count % size].view(-1, size)


def fair_split(
    data: Images, seed: int, evaluation: str, count: int = 5000
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and evaluation images and labels of a fair comparison, by the seed alone.

    MNIST: ``count`` images drawn from the first 55,000; evaluation is "validation" (the last 5,000
    training images) or "test". Digits: each seed splits the 1,797 anew, 1,000 for training (fewer
    if ``count`` is), 297 for validation, 500 for testing.
    """
    if evaluation not in ("validation", "test"):
        raise ValueError(f'evaluation must be "validation" or "test", got {evaluation!r}.')
    validation = evaluation == "validation"
    x, y = data.train_x, data.train_y
    if data.name == "digits":
        order = torch.randperm(len(x), generator=stream(seed, "split"))
        at = order[1000:1297] if validation else order[1297:1797]
        return x[order[: min(count, 1000)]], y[order[: min(count, 1000)]], x[at], y[at]
    order = torch.randperm(55000, generator=stream(seed, "images"))[:count]
    if validation:
        return x[order], y[order], x[55000:], y[55000:]
    return x[order], y[order], data.test_x, data.test_y


def published_split(data: Images, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images and labels as the MNIST study had them: 55,000 and 10,000.

    On the digits the split of a fair comparison.
    """
    if data.name == "digits":
        return fair_split(data, seed, "test")
    return data.train_x[:55000], data.train_y[:55000], data.test_x, data.test_y


def train(
    net: MLP,
    images: Tensor,
    labels: Tensor,
    *,
    pixel_max: int,
    rate: float,
    steps: int,
    order: torch.Generator,
    stops: Collection[int],
    batch: int = 64,
    loss: str = "mean",
    optimizer: str = "sgd",
) -> Iterator[tuple[int, float]]:
    """Train on cross-entropy, in place; pauses where it is asked to.

    L is the mean or the sum over the batch; SGD is w <- w - rate * dL/dw. After each step in
    ``stops`` it yields the step and that step's mean loss (of the batch, before the update); the
    parameters' ``grad`` then holds that step's dL/dw. The caller evaluates there, then the loop
    goes on. A loss that is not finite is not an error.

    Args:
        images: uint8 (N, H, W) or (N, pixels); labels: int64 (N,).
        pixel_max: the pixel value that becomes 1.0.
        order: source of the batch order.
        stops: steps, counted from 1, after which to pause.
        loss: "mean" or "sum".
        optimizer: "sgd" (without momentum) or "adam" (PyTorch's, its defaults but for the rate).
    """
    if loss not in ("mean", "sum"):
        raise ValueError(f'loss must be "mean" or "sum", got {loss!r}.')
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f'optimizer must be "sgd" or "adam", got {optimizer!r}.')
    flat = images.flatten(1)
    parameters = list(net.parameters())
    wanted = frozenset(stops)
    # Fused: a third of the time, and at batches of 4 the update is most of a step.
    adam = torch.optim.Adam(parameters, lr=rate, fused=True) if optimizer == "adam" else None
    net.train()
    for step, index in zip(range(1, steps + 1), batches(len(flat), batch, order), strict=False):
        x = pixels(flat.index_select(0, index), pixel_max)
        value = cross_entropy(net(x), labels.index_select(0, index), reduction=loss)
        gradients = torch.autograd.grad(value, parameters)
        if adam is not None or step in wanted:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        if adam is not None:
            adam.step()
        else:
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient, alpha=rate)
        if step in wanted:
            yield step, value.item() / (batch if loss == "sum" else 1)


def accuracy(net: MLP, x: Tensor, labels: Tensor, statistics: str = "running") -> float:
    """Share of the float rows x that the network labels rightly, from 0 to 1.

    ``statistics`` is "running" (evaluation as usual) or "batch": x as a single batch, normalized by
    its own mean and variance. Neither changes the network, its mode or any random state.
    """
    if statistics not in ("running", "batch"):
        raise ValueError(f'statistics must be "running" or "batch", got {statistics!r}.')
    mode = net.training
    with torch.no_grad():
        if statistics == "batch":
            logits = net.with_batch_statistics(x)
        else:
            try:
                logits = net.eval()(x)
            finally:
                net.train(mode)
        return float((logits.argmax(1) == labels).double().mean())


def log_steps(steps: int, count: int, first: int = 10) -> list[int]:
    """About ``count`` steps from ``first`` to ``steps`` in equal ratios, the last three together.

    The last three are 96 %, 98 % and 100 % of the steps: a metric may be their mean. Steps that
    round to the same number are given once.

    >>> log_steps(1000, 8)
    [10, 25, 62, 155, 385, 960, 980, 1000]
    """
    last = [round(steps * share) for share in (0.96, 0.98, 1.0)]
    early = max(count - 3, 1)
    top = last[0] / first
    spaced = [round(first * top ** (k / early)) for k in range(early)] if top > 1 else []
    return sorted({step for step in (*spaced, *last) if step >= 1})
