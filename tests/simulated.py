"""Synthetic runs of an experiment: its cells are asked for and answered until nothing is wanted."""

import json
from pathlib import Path

import numpy as np

from gammabeta import _runs


def simulate(experiment, answer, budget="small", data="mnist", seeds=None):
    """All rows: answer(arm, seed) gives the rows of one cell. And the cells that were asked for."""
    rows, done, asked = [], set(), []
    while True:
        wanted = experiment.cells(budget, data, seeds, rows)
        new = [c for c in wanted if (json.dumps(c.arm), c.seed) not in done]
        if not new:
            return rows, asked
        for cell in new:
            done.add((json.dumps(cell.arm), cell.seed))
            asked.append(cell)
            head = {**cell.arm, "seed": cell.seed, "budget": budget, "data": data}
            rows += [{**head, **row} for row in answer(cell.arm, cell.seed)]


def judged(experiment, rows):
    """Verdicts by claim; they and the figures can be stored."""
    verdicts = experiment.judge(rows)
    head = {"schema": 1, "gammabeta": "0", "surprises": [], "notice": None}
    plain = {**head, "verdicts": [v.to_json() for v in verdicts]}
    _runs.check_verdicts(json.loads(json.dumps(plain, allow_nan=False)), Path("verdicts.json"))
    figures = json.loads(json.dumps(experiment.figures(rows), allow_nan=False))
    _runs.check_figures({"figures": figures}, Path("figures.json"))
    return {v.claim: v for v in verdicts}


def noise(seed, *key, sd):
    """A number that depends on the seed and the key alone."""
    return np.random.default_rng([seed, *"".join(map(str, key)).encode()]).normal(0, sd)


def measured(experiment, arms, data, seeds=(0, 1), budget="tiny"):
    """Real rows of some arms."""
    return [
        {**arm, "seed": seed, "budget": budget, "data": data.name, **row}
        for arm in arms
        for seed in seeds
        for row in experiment.measure(arm, seed, budget, data)
    ]
