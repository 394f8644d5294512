"""Superiority by a paired bootstrap over settings, where differences are -1, 0 and 1."""

import math
from collections.abc import Sequence

import numpy as np

from gammabeta.studies._verdict import Interval, Outcome

RESAMPLES = 20_000


def paired(values: Sequence[float], delta: float) -> Outcome:
    """Is the mean above 0, and at least delta? By the 95 % percentile interval of the bootstrap.

    Supported if lo > 0 and the mean is at least delta; refuted if hi < delta; else inconclusive.
    p is twice the share of resamples that do not lie above 0, at least 1 / their number. The
    resamples are always the same.

    >>> paired([1.0] * 12 + [0.0] * 12, 0.2).status
    'supported'
    """
    x = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, x.size, (RESAMPLES, x.size))
    means = x[draws].mean(axis=1)
    lo, hi = (float(q) for q in np.percentile(means, [2.5, 97.5]))
    mean = float(x.mean())
    found = Interval(mean, lo, hi, x.size, float(x.std(ddof=1)), None)
    p = min(1.0, 2 * max(float((means <= 0).mean()), 1 / RESAMPLES))
    if hi < delta:
        reason = "reversed" if hi < 0 else "too small to matter" if lo > 0 else "absent"
        return Outcome("refuted", found, reason, p=p)
    if lo > 0 and mean >= delta:
        return Outcome("supported", found, f"above 0, and at least {delta:g} on average", p=p)
    # Above delta the interval has to clear 0, below it has to clear delta.
    gap = mean if mean >= delta else delta - mean
    needed = math.ceil((1.96 * found.sd / gap) ** 2)
    reason = f"the interval is too wide; about {needed} settings would decide"
    return Outcome("inconclusive", found, reason, needed, p=p)
