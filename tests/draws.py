"""Made-up rows for the judge of claims about draws."""

import math

from gammabeta.studies._draws import measured


def rows(claim, numbers, draws=8, noise=1e-4, **columns):
    """Rows of so many draws around a number for each cell."""
    return [
        {
            "budget": "small",
            "data": "mnist",
            "kind": "value",
            "claim": claim,
            "seed": seed,
            "cell": cell,
            "value": number + noise * max(abs(number), 1e-3) * (-1) ** seed,
            **columns,
        }
        for cell, number in numbers.items()
        for seed in range(draws)
    ]


def holding(*groups):
    """A number for each cell that its target wants; several levels of one number are averaged."""
    found = {}
    for group in groups:
        for name, target in (group or {}).items():
            low = target.low if target.delta is None else target.delta
            ends = [end for end in (low, target.high) if math.isfinite(end)]
            shift = 0.0 if len(ends) == 2 else (1.0 if math.isfinite(low) else -1.0)
            cell = measured(name, target)
            found.setdefault(cell, []).append(sum(ends) / len(ends) + shift)
    return {name: values[0] for name, values in found.items()}


def off(target):
    """A number far outside a target."""
    return target.high + 1 if math.isfinite(target.high) else target.low - 1
