"""The judges on real rows whose pairs have changed places by chance: no effect is left to find.

For each kept claim of superiority: in how many of 1,000 draws does its judge find "supported"? It
must be at most 5 %, and two standard deviations of the draws more. Pairs are cells with and without
normalization (their rows change places) or differences measured within a cell (they change sign).
"""

import math
import os
import random
import time
from pathlib import Path

import pytest

from gammabeta import _runs
from gammabeta._runs import StoredCell
from gammabeta.studies import _claims, _judge
from gammabeta.studies._experiments import experiments
from gammabeta.studies._verdict import superiority

RESULTS = Path(__file__).parents[1] / "results"
DRAWS = 1000
SECONDS = 60  # of one experiment; a judge that is slower is tried with fewer draws, 100 at least
PAIRS = {"brn-small": ("brn", "bn")}  # others: with and without batch normalization
# compares ways of evaluating one network: exchanging networks leaves its effect
OTHER = {"f-mismatch"}


def limit(draws):
    """6.4 % of 1,000 draws."""
    return 0.05 + 2 * math.sqrt(0.05 * 0.95 / draws)


def flipped(cells, pair, chance):
    """Rows after each pair has changed places or not, and each difference its sign or not."""
    own = [cell for cell in cells if cell.spec["arm"].get("norm") in pair]
    others = [cell for cell in cells if cell.spec["arm"].get("norm") not in pair]
    rows = _judge.sign_flipped(own, "norm", chance)
    for cell in others:
        sign = chance.choice((-1, 1))
        for row in cell.flat():
            if row.get("kind") == "value":
                row = row | {"value": sign * row["value"]}
            rows.append(row)
    return rows


def wrong(judge, cells, claims, draws=None):
    """Share of draws in which each claim is supported, and how many there were.

    A claim whose effect no flip moves has no pairs of this kind, and is left out.
    """
    counts, effects = dict.fromkeys(claims, 0), {claim: set() for claim in claims}
    chance, done, before = random.Random(2017), 0, time.process_time()
    while done < (draws or DRAWS):
        for pair in {PAIRS.get(claim, ("bn", "none")) for claim in claims}:
            for verdict in judge(flipped(cells, pair, chance)):
                claim = verdict.claim
                if claim in counts and PAIRS.get(claim, ("bn", "none")) == pair:
                    counts[claim] += verdict.status == "supported"
                    effects[claim].add(verdict.effect)
        done += 1
        if draws is None and done >= 100 and time.process_time() - before > SECONDS:
            break
    return {c: counts[c] / done for c in claims if len(effects[c]) > 1}, done


class Answer:
    def __init__(self, claim, status, effect):
        self.claim, self.status, self.effect = claim, status, effect


def differences(rows):
    by = {(row["seed"], row["norm"]): row["x"] for row in rows}
    return [by[seed, "bn"] - by[seed, "none"] for seed, norm in by if norm == "bn"]


def toy(n):
    """Pairs that differ by about 1."""
    luck = random.Random(3)
    for seed in range(n):
        for norm, mean in (("bn", 1.0), ("none", 0.0)):
            spec = {"seed": seed, "budget": "small", "data": {"name": "mnist"}}
            arm = {"norm": norm, "rate": 0.1 if norm == "bn" else 0.3}
            row = {"x": mean + luck.gauss(0, 0.3)}
            yield StoredCell({**spec, "arm": arm}, [row], Path(f"{norm}-{seed}"))


def test_a_sound_judge_passes_and_a_hasty_one_is_found():
    cells = list(toy(8))
    real = differences([row for cell in cells for row in cell.flat()])
    assert superiority(real, 0.1).status == "supported"

    def sound(rows):
        outcome = superiority(differences(rows), 0.1)
        return [Answer("act-all", outcome.status, outcome.interval.mean)]

    def hasty(rows):
        mean = sum(differences(rows)) / 8
        return [Answer("act-all", "supported" if mean > 0.1 else "refuted", mean)]

    shares, draws = wrong(sound, cells, ["act-all"], 1000)
    assert draws == 1000
    assert shares["act-all"] <= limit(1000) == pytest.approx(0.064, abs=4e-4)
    shares, _ = wrong(hasty, cells, ["act-all"], 200)
    assert shares["act-all"] > 0.3


def test_differences_within_a_cell_change_their_sign_together():
    spec = {"seed": 0, "budget": "small", "data": {"name": "mnist"}, "arm": {"claim": "c"}}
    rows = [{"kind": "value", "cell": "a", "value": 2.0}, {"kind": "curve", "y": 3.0}]
    cells = [StoredCell(spec, rows, Path("0"))]
    seen = set()
    for draw in range(20):
        first, second = flipped(cells, ("bn", "none"), random.Random(draw))
        assert second["y"] == 3.0
        seen.add(first["value"])
    assert seen == {2.0, -2.0}
    # a claim that no flip reaches is not counted
    assert wrong(lambda rows: [Answer("act-all", "supported", 1.0)], cells, ["act-all"], 9)[0] == {}


@pytest.mark.parametrize("experiment", experiments().values(), ids=lambda e: e.id)
@pytest.mark.skipif(
    not os.environ.get("GAMMABETA_SLOW"), reason="takes minutes: set GAMMABETA_SLOW=1"
)
def test_flipped_kept_rows_are_seldom_supported(experiment):
    path = RESULTS / f"{experiment.id}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no rows of {experiment.id} are kept in results/ yet")
    known = _claims.claims()
    claims = [c for c in experiment.CLAIMS if c not in OTHER and "superiority" in known[c].rule]
    if not claims:
        pytest.skip(f"{experiment.id} decides no claim of superiority")
    stored = _runs.read_cells([path])
    cells = _judge.select(stored, experiment.code_of, data="mnist").cells
    shares, draws = wrong(experiment.judge, cells, claims)
    if not shares:
        pytest.skip(f"no contrast of {experiment.id} is between cells with and without BN")
    assert all(share <= limit(draws) for share in shares.values()), (shares, draws)
