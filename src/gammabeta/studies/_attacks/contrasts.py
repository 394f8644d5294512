"""From rows to pairs of attacked networks."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from gammabeta._runs import Row, Scalar
from gammabeta.studies._pairs import NORMS

# column -> name, level
NAMES = {
    "pgd_linf": ("PGD-5, Linf 0.05", "adversarial examples"),
    "fgsm_linf": ("FGSM, Linf 0.05", "adversarial examples"),
    "pgd_l2": ("PGD-5, L2 1", "adversarial examples"),
    "fgsm_l2": ("FGSM, L2 1", "adversarial examples"),
    "noise": ("Gaussian noise 0.5", "noise"),
}

Nets = Mapping[str, Row]  # by net
Pairs = Mapping[int, Mapping[str, Nets]]  # by seed and stage


def pairs(rows: Sequence[Row], arm: Mapping[str, Scalar], limit: float) -> tuple[Pairs, int]:
    """Pairs at equal clean accuracy by seed and stage; and how many were left out.

    Args:
        arm: what other columns of these rows have to be.
        limit: by so many points the accuracy of the two may differ at the stage "equal".
    """
    found: dict[int, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        seed, ours = row["seed"], all(row.get(key) == value for key, value in arm.items())
        if ours and "net" in row and isinstance(seed, int):
            found[seed][str(row["stage"])][str(row["net"])] = row
    counted, left_out = {}, 0
    for seed, stages in sorted(found.items()):
        whole = {stage: nets for stage, nets in stages.items() if set(nets) == set(NORMS)}
        if "equal" not in whole:
            continue
        equal = whole["equal"]
        # Shares of images are compared: a rounding error is no difference.
        near = abs(less(equal, "clean")) <= limit + 1e-9
        if near and not any(row["diverged"] for row in equal.values()):
            counted[seed] = whole
        else:
            left_out += 1
    return counted, left_out


def less(nets: Nets, column: str) -> float:
    """Accuracy, none - bn, in points."""
    return 100 * (float(nets["none"][column] or 0.0) - float(nets["bn"][column] or 0.0))


def notes(counted: Pairs, left_out: int) -> list[str]:
    """Accuracies as they are, how far arms were taken back, and pairs that do not count."""
    found = []
    if left_out:
        found.append(f"Pairs that are not at equal clean accuracy, and are left out: {left_out}.")
    columns = {"clean": "as they are", **{column: name for column, (name, _) in NAMES.items()}}
    for net in NORMS if counted else ():
        said = ", ".join(
            f"{name} {100 * _mean(counted, net, column):.1f}" for column, name in columns.items()
        )
        step = _mean(counted, net, "step")
        found.append(f"Accuracy in % of {net}: {said}; at step {step:.0f} on average.")
    return found


def _mean(counted: Pairs, net: str, column: str) -> float:
    return statistics.fmean(float(p["equal"][net][column] or 0.0) for p in counted.values())
