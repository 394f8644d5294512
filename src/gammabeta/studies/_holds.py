"""In how many variations the verdict of a headline claim holds, and how certain each verdict is.

The rows of variations lie in `robustness/` beside the accepted ones. A verdict holds in a variation
if the fair verdict there has the same status; "inconclusive" there counts as not holding. Fresh
seeds repeat the whole procedure, Holm's correction over the twelve claims included; the three other
variations, which have fewer seeds, try each claim alone.

A  exact: an identity, or a counterexample to one
B  the same verdict in at least three of the four variations
C  not in three of the four variations, or none was tried
D  undecided
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from gammabeta.studies._experiments import VARIATIONS
from gammabeta.studies._headline import TITLES
from gammabeta.studies._verdict import Verdict

FOLDER = "robustness"
NEEDED = 3  # of the four
Statuses = Mapping[str, Mapping[str, str]]  # claim -> variation -> status


def folders(paths: Sequence[Path]) -> list[Path]:
    """Where the rows of variations lie, beside kept rows."""
    homes = dict.fromkeys(path if path.is_dir() else path.parent for path in paths)
    return [home / FOLDER for home in homes if (home / FOLDER).is_dir()]


def certain(verdicts: Sequence[Verdict], varied: Statuses) -> list[Verdict]:
    """The verdicts with their certainty, and in how many variations each holds."""
    return [_certain(verdict, varied.get(verdict.claim, {})) for verdict in verdicts]


def _certain(verdict: Verdict, by_variation: Mapping[str, str]) -> Verdict:
    letter = {"exact": "A", "fails": "A", "inconclusive": "D", "demo": "D"}.get(verdict.status)
    if letter is not None or not by_variation:
        return dataclasses.replace(verdict, certainty=letter or "C")
    held = holding(verdict.status, by_variation)
    told = "; ".join(f"{TITLES[name]} {status}" for name, status in by_variation.items())
    return dataclasses.replace(
        verdict,
        certainty="B" if held >= NEEDED else "C",
        variations=f"Holds in {held} of {len(by_variation)} variations tried"
        f"{missing(by_variation)}: {told}.",
    )


def holding(status: str, by_variation: Mapping[str, str]) -> int:
    """In how many variations the verdict is the same.

    >>> holding("supported", {"fresh-seeds": "supported", "width-half": "inconclusive"})
    1
    """
    return sum(other == status for other in by_variation.values())


def missing(by_variation: Mapping[str, str]) -> str:
    """Which variations have no rows yet, in words."""
    absent = [TITLES[name] for name in VARIATIONS if name not in by_variation]
    return f" ({len(absent)} of {len(VARIATIONS)} not run: {'; '.join(absent)})" if absent else ""
