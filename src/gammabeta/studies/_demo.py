"""The demonstration: a few short trainings on the bundled digits, with and without BN.

Pixels-100-100-10 with ReLU, batches of 64, SGD, 1,000 training images, accuracy on 500 others; the
arms of a seed share initial weights, images and batch order.
"""

from typing import Any, NamedTuple

from gammabeta.studies._data import load
from gammabeta.studies._nets import m2
from gammabeta.studies._train import accuracy, fair_split, pixels, stream, train

HIGH, USUAL = 3.0, 0.1
STEPS, LOOKS, SEEDS = 300, 20, 3


class Curve(NamedTuple):
    """One arm: accuracies by look, one list for each seed."""

    norm: bool
    rate: float
    accuracy: list[list[float]]

    def mean(self) -> list[float]:
        return [sum(values) / len(values) for values in zip(*self.accuracy, strict=True)]

    def last(self) -> list[float]:
        return [values[-1] for values in self.accuracy]


class Race(NamedTuple):
    """What was seen: with BN and without at the high rate, and without at the usual one."""

    steps: list[int]
    seeds: int
    curves: list[Curve]

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values."""
        curves = [curve._asdict() for curve in self.curves]
        return {"data": "digits", **self._asdict(), "curves": curves}


def race(steps: int = STEPS, seeds: int = SEEDS) -> Race:
    """Train the three arms, seed by seed."""
    data = load("digits")
    stops = [round(steps * look / LOOKS) for look in range(1, LOOKS + 1)]
    curves = [Curve(norm, rate, []) for norm, rate in ((True, HIGH), (False, HIGH), (False, USUAL))]
    for seed in range(seeds):
        train_x, train_y, held_x, held_y = fair_split(data, seed, "test")
        held = pixels(held_x, data.pixel_max)
        for curve in curves:
            net = m2(held.shape[1], "relu", curve.norm, stream(seed, "weights"))
            training = train(
                net,
                train_x,
                train_y,
                pixel_max=data.pixel_max,
                rate=curve.rate,
                steps=steps,
                order=stream(seed, "order"),
                stops=stops,
            )
            curve.accuracy.append([accuracy(net, held, held_y) for _ in training])
    return Race(stops, seeds, curves)
