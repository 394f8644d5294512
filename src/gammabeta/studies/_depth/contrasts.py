"""What is compared in the experiment on depth: networks, and differences of their accuracies."""

from gammabeta.studies._claims import claims
from gammabeta.studies._depth.nets import Network
from gammabeta.studies._outcomes import asked_for
from gammabeta.studies._pairs import NORMS, gains
from gammabeta.studies._tuned import LEAST_SEEDS, MOST_SEEDS, Tuned, complete

NETWORKS = {
    "2 layers": Network(2),
    "8 layers": Network(8),
    "20 layers": Network(20),
    "2 layers, N(0, 0.1)": Network(2, std=0.1),
    "20 layers, N(0, 0.1)": Network(20, std=0.1),
    "8 sigmoid layers": Network(8, "sigmoid"),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "2 layers": NORMS,
    "8 layers": (*NORMS, "selu"),
    "20 layers": NORMS,
    "2 layers, N(0, 0.1)": ("none",),
    "20 layers, N(0, 0.1)": ("none",),
    "8 sigmoid layers": NORMS,
}
# claim -> first and second network of each of its contrasts
CONTRASTS = {
    "deep-hard": {
        weights: (("2 layers" + more, "none"), ("20 layers" + more, "none"))
        for weights, more in (("He", ""), ("N(0, 0.1)", ", N(0, 0.1)"))
    },
    "selu": {"SELU − ReLU with BN": (("8 layers", "selu"), ("8 layers", "bn"))},
    "sigmoid-deep": {"BN − none": (("8 sigmoid layers", "bn"), ("8 sigmoid layers", "none"))},
}
USES = {
    "deep-hard": tuple(group for group in GROUPS if group.startswith("2")),
    "input-norm-shallow-only": ("2 layers", "20 layers"),
    "selu": ("8 layers",),
    "sigmoid-deep": ("8 sigmoid layers",),
}
DEPTHS = {f"{depth} layers": depth for depth in (60, 10, 40, 20)}  # of mf-depth-limit
DECIDING = ("60 layers", "10 layers")
MORE = "gain at 20 − gain at 2 layers"


def differences(claim: str, tuned: Tuned, part: str) -> dict[str, dict[int, float]]:
    """A claim's contrasts in test accuracy by seed; empty where a network is missing."""
    if not set(USES[claim]) <= tuned.best.keys():
        return {name: {} for name in CONTRASTS.get(claim, {MORE: ()})}
    if claim == "input-norm-shallow-only":
        deep, shallow = (tuned.minus(part, g, *NORMS) for g in ("20 layers", "2 layers"))
        return {MORE: {s: deep[s] - shallow[s] for s in sorted(deep.keys() & shallow.keys())}}
    return {
        name: gains(tuned.ended(part, *first), tuned.ended(part, *second))
        for name, (first, second) in CONTRASTS[claim].items()
    }


def planned(claim: str, tuned: Tuned) -> int | None:
    """Seeds that the pilot asks for, None before it is complete."""
    pilot = differences(claim, tuned, "pilot")
    if not complete(pilot):
        return None
    deltas = dict.fromkeys(pilot, claims()[claim].thresholds["delta"])
    return asked_for(pilot, deltas, LEAST_SEEDS, MOST_SEEDS)
