"""How far best losses lie apart over the rates of the hidden weights, seed by seed."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from gammabeta._runs import Row

Best = Mapping[float, Mapping[int, float]]  # rate of the hidden weights -> seed -> best loss
_LEAST = 1e-12  # a loss of 0 has no logarithm


def best(rows: Sequence[Row], part: str, group: str, upto: float = math.inf) -> Best:
    """The lowest loss of each run, of those up to a step."""
    found: dict[float, dict[int, float]] = defaultdict(dict)
    for row in rows:
        loss, step, rate, seed = (row.get(k) for k in ("loss", "step", "weights", "seed"))
        if (row.get("part"), row.get("group")) != (part, group) or not isinstance(loss, float):
            continue
        if isinstance(step, int) and step <= upto and isinstance(rate, float):
            seeds = found[rate]
            seeds[int(str(seed))] = min(seeds.get(int(str(seed)), math.inf), max(loss, _LEAST))
    return found


def factor(losses: Best, rates: Sequence[float]) -> dict[int, float]:
    """ln of the smallest over the largest, by seed; of the seeds that have all rates.

    >>> factor({0.1: {0: 0.5, 1: 0.5}, 1.0: {0: 0.25}}, (0.1, 1.0))
    {0: -0.6931471805599453}
    """
    shared = set.intersection(*(set(losses.get(rate, {})) for rate in rates))
    return {
        seed: math.log(min(losses[r][seed] for r in rates) / max(losses[r][seed] for r in rates))
        for seed in sorted(shared)
    }


def spread(ended: Mapping[float, Mapping[int, float]]) -> dict[int, float]:
    """Smallest minus largest, in points, by seed; of the seeds that have all rates.

    >>> spread({0.1: {0: 0.5}, 1.0: {0: 0.75}})
    {0: -25.0}
    """
    shared = set.intersection(*(set(by) for by in ended.values())) if ended else set()
    values = {s: [by[s] for by in ended.values()] for s in sorted(shared)}
    return {s: 100 * (min(v) - max(v)) for s, v in values.items()}
