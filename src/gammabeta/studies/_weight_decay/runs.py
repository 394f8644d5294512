"""Runs with and without weight decay that share norms or effective rates (see the experiment)."""

import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gammabeta._runs import Row
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import stream, train

# Those that follow another one need its norms: the order counts.
RUNS = ("free", "hidden decay", "hidden norms", "all decay", "all norms", "hidden rates")
EVERY = 10
_POINTS = 20

Norms = dict[str, list[list[Tensor]]]  # "hidden" or "all" -> step -> layer -> norms of its units


class Watched:
    """How hidden units turn, and how long their weights are, every tenth step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.angles: list[float] = []
        self.norms: list[float] = []

    def see(self, step: int, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Weights before and after a step, layer by layer."""
        pairs = [(a.double(), b.double()) for a, b in zip(before, after, strict=True)]
        self.steps.append(step)
        self.angles.append(float(torch.cat([angle(a, b) for a, b in pairs]).mean().rad2deg()))
        self.norms.append(float(torch.cat([lengths(b) for _, b in pairs]).mean()))

    def ends(self, other: "Watched | None" = None) -> Row:
        """The norm at the end, the mean angle, and its correlation over time with another run's.

        None that is not finite.
        """
        numbers = {"norm": self.norms[-1], "angle": statistics.fmean(self.angles)}
        if other and len(self.angles) > 1:
            both = torch.tensor([self.angles, other.angles], dtype=torch.float64)
            numbers["correlation"] = float(torch.corrcoef(both)[0, 1])
        return {name: v for name, v in numbers.items() if abs(v) < float("inf")}

    def points(self, run: str) -> Iterator[Row]:
        """About 20 points of norm and angle over the steps."""
        for k in range(0, len(self.steps), max(len(self.steps) // _POINTS, 1)):
            for curve, values in (("norm", self.norms), ("angle", self.angles)):
                if 0 < values[k] < float("inf"):
                    row: Row = {"kind": "curve", "curve": curve, "series": run}
                    yield row | {"x": float(self.steps[k]), "y": float(f"{values[k]:.6g}")}


def lengths(weight: Tensor) -> Tensor:
    """The norm of each unit's weights."""
    found: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return found


def angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle between corresponding rows, exact for small ones too."""
    a, b = a / lengths(a)[:, None], b / lengths(b)[:, None]
    return 2 * torch.atan2(lengths(a - b), lengths(a + b))


def run(
    name: str,
    x: Tensor,
    y: Tensor,
    *,
    pixel_max: int,
    rate: float,
    decay: float,
    steps: int,
    seed: int,
    width: float,
    norms: Norms,
    watched: Watched,
) -> Iterator[tuple[MLP, int, float]]:
    """Train; yields the network, the step and its loss, after every step.

    ``norms`` takes those of a run with decay, and gives them to the runs that follow it.
    """
    units = round(100 * width)
    net = MLP((x[0].numel(), units, units, 10), "relu", True, stream(seed, "weights"))
    hidden = [layer.weight for layer in net.layers if isinstance(layer, nn.Linear)][:-1]
    scope, _, how = name.partition(" ")
    if how == "decay":
        norms[scope] = []
    previous = [lengths(w.detach()) for w in hidden]
    training = train(
        net,
        x,
        y,
        pixel_max=pixel_max,
        rate=rate,
        steps=steps,
        order=stream(seed, "order"),
        stops=range(1, steps + 1),
    )
    for step, loss in training:
        with torch.no_grad():
            before = [w + rate * _gradient(w) for w in hidden]  # what they were
            if how == "decay":
                for p in hidden if scope == "hidden" else net.parameters():
                    p.sub_(p + rate * _gradient(p), alpha=rate * decay)
                norms[scope].append([lengths(w) for w in hidden])
            elif how == "norms":
                for w, wanted in zip(hidden, norms[scope][step - 1], strict=True):
                    w.mul_((wanted / lengths(w))[:, None])
            elif how == "rates":
                for w, was, wanted in zip(hidden, before, previous, strict=True):
                    factor = (lengths(was) / wanted) ** 2 - 1
                    w.sub_(factor[:, None] * _gradient(w), alpha=rate)
                previous = norms[scope][step - 1]
            if step % EVERY == 0:
                watched.see(step, before, hidden)
        yield net, step, loss


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError("a gradient was expected, got none. Train with a stop at every step.")
    return parameter.grad
