"""Training steps and their processor time (the protocol is the experiment's)."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.moments import Moments
from gammabeta.ops import batch_norm
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP, Norm
from gammabeta.studies._train import pixels, stream

ROUNDS, ALL_ROUNDS = 30, 3
BATCHES = (16, 64, 256)
RATE = 0.01
EVERY = 10

Draw = Callable[[int], tuple[Tensor, Tensor]]
Kept = list[Moments]


def bn_cost(seed: int, data: Images, tiny: bool) -> Iterator[Row]:
    """Time of a step with over without, by layer and batch size; the replications' network."""
    draw, rounds = drawn_from(data, seed), 2 if tiny else ROUNDS

    def seconds_of(hidden: tuple[int, ...], activation: str, size: int) -> dict[str, float]:
        nets = networks(hidden, activation, seed, data)
        return taking_turns({n: stepping(net, draw, size) for n, net in nets.items()}, rounds)

    for size in BATCHES:
        seconds = seconds_of((100, 100), "relu", size)
        for name in ("this package", "PyTorch"):
            yield value(f"{name}, batch {size}", seconds[name] / seconds["without"])
        for name, each in seconds.items():
            yield point("step", name if name == "without" else f"BN of {name}", size, each)
    seconds = seconds_of((100, 100, 100), "sigmoid", 60)
    yield value("the replications' network", seconds["this package"] / seconds["without"])
    yield value("the replications' network, PyTorch", seconds["PyTorch"] / seconds["without"])


def full_statistics_cost(seed: int, data: Images, tiny: bool) -> Iterator[Row]:
    """Time of a step with statistics of all images over that of a usual step."""
    draw, everything = drawn_from(data, seed), pixels(data.train_x, data.pixel_max)
    net = networks((100, 100), "relu", seed, data)["this package"]
    rounds, usual, kept = 2 if tiny else ROUNDS, 1.0, population(net, everything)
    few = 1 if tiny else ALL_ROUNDS
    anew = taking_turns({"": lambda: population(net, everything)}, few)[""]
    for size in BATCHES:
        kinds = {"usual": stepping(net, draw, size), "frozen": stepping(net, draw, size, kept)}
        seconds = taking_turns(kinds, rounds)
        whole = anew + seconds["frozen"]
        seldom = anew / EVERY + seconds["frozen"]
        name = "statistics of all images"
        if size == 64:
            usual = seconds["usual"]
            yield value(name, whole / usual)
            yield value(f"{name}, anew every {EVERY} steps", seldom / usual)
        else:
            yield value(f"{name}, batch {size}", whole / seconds["usual"])
        yield point("statistics", "of the batch", size, seconds["usual"])
        yield point("statistics", "of all images", size, whole)
        yield point("statistics", f"of all images, every {EVERY} steps", size, seldom)
    began = time.process_time()
    step(net, everything, data.train_y)
    yield value("all images as one batch", (time.process_time() - began) / usual)


def stepping(net: MLP, draw: Draw, size: int, kept: Kept | None = None) -> Callable[[], object]:
    """A step with a batch of this size that is drawn for it."""
    return lambda: step(net, *draw(size), kept)


def networks(hidden: tuple[int, ...], activation: str, seed: int, data: Images) -> dict[str, MLP]:
    """The same network without BN, with that of this package, with PyTorch's."""
    sizes = (data.train_x[0].numel(), *hidden, 10)
    kinds: dict[str, Norm] = {"without": False, "this package": True, "PyTorch": nn.BatchNorm1d}
    return {
        name: MLP(sizes, activation, norm, stream(seed, "weights")) for name, norm in kinds.items()
    }


def drawn_from(data: Images, seed: int) -> Draw:
    """Batches of random images and their labels, drawn when asked for."""
    generator = stream(seed, "order")
    flat, labels = data.train_x.flatten(1), data.train_y

    def draw(size: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(flat), (size,), generator=generator)
        return pixels(flat[at], data.pixel_max), labels[at]

    return draw


def taking_turns(kinds: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median processor time of each kind; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, run in kinds.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def step(net: MLP, x: Tensor, y: Tensor, kept: Kept | None = None) -> None:
    """One step of SGD, in place; with the statistics that are given, else those of the batch."""
    parameters = list(net.parameters())
    loss = cross_entropy(net(x) if kept is None else logits(net, x, kept), y)
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=RATE)


@torch.no_grad()
def population(net: MLP, x: Tensor) -> Kept:
    """What the statistics of each BN are with x as the batch, in order."""
    found: Kept = []
    count = sum(isinstance(layer, BatchNorm1d) for layer in net.layers)
    for layer in net.layers:
        if isinstance(layer, BatchNorm1d):
            x, moments = batch_norm(x, layer.weight, layer.bias, eps=layer.eps)
            found.append(moments)
            if len(found) == count:
                break  # nothing after the last one is needed
        else:
            x = layer(x)
    return found


def logits(net: MLP, x: Tensor, kept: Kept) -> Tensor:
    """The network's output with these statistics."""
    left = iter(kept)
    for layer in net.layers:
        if isinstance(layer, BatchNorm1d):
            x, _ = batch_norm(x, layer.weight, layer.bias, moments=next(left), eps=layer.eps)
        else:
            x = layer(x)
    return x


def value(cell: str, number: float) -> Row:
    """One number of one draw; cells are judged, or shown, over the draws."""
    return {"kind": "value", "cell": cell, "value": number}


def point(curve: str, series: str, x: float, y: float) -> Row:
    """One point of a figure."""
    return {"kind": "curve", "curve": curve, "series": series, "x": float(x), "y": y}
