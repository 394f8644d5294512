"""The largest learning rate that works (the protocol is the experiment's)."""

import math
from collections.abc import Iterator, Sequence

from gammabeta._runs import Row
from gammabeta.studies._data import Images
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import accuracy, fair_split, pixels, stream, train

FIRST, LAST, LEAST = -4, 10, -12  # powers of two
ENOUGH = 0.85
FAILURES = 2  # in a row end the search


def climb(
    depth: int, norm: bool, seed: int, data: Images, steps: int, width: float, last: int = LAST
) -> Iterator[Row]:
    """A row for each rate tried: doubled until two in a row fail; halved if the first one fails."""
    x, y, held_x, held_y = fair_split(data, seed, "validation")
    held, labels = pixels(held_x[:1000], data.pixel_max), held_y[:1000]
    sizes = (held.shape[1], *[round(100 * width)] * depth, 10)

    def works(power: int) -> Row:
        net = MLP(sizes, "relu", norm, stream(seed, "weights"))
        training = train(
            net,
            x,
            y,
            pixel_max=data.pixel_max,
            rate=2.0**power,
            steps=steps,
            order=stream(seed, "order"),
            stops=range(1, steps + 1),
        )
        for _, loss in training:
            if not math.isfinite(loss):
                return {"power": power, "works": False, "validation": 0.0}
        share = accuracy(net, held, labels)
        return {"power": power, "works": share > ENOUGH, "validation": share}

    failed, any_works = 0, False
    for power in range(FIRST, last + 1):
        row = works(power)
        yield row
        any_works |= bool(row["works"])
        failed = 0 if row["works"] else failed + 1
        if failed == FAILURES:
            break
    for power in range(FIRST - 1, LEAST - 1, -1) if not any_works else ():
        row = works(power)
        yield row
        if row["works"]:
            break


def largest(rows: Sequence[Row]) -> tuple[int, bool]:
    """The largest power of two that worked, and whether the search ended there by failures.

    Where none worked it is one less than the least that was tried.
    """
    tried = {row["power"]: bool(row["works"]) for row in rows if isinstance(row["power"], int)}
    good = [power for power, works in tried.items() if works]
    if not good:
        return min(tried) - 1, False
    return max(good), max(good) < max(tried)
