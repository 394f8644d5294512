"""Does a larger learning rate help logistic regression? An experiment for the runner's tests.

Two waves, as in a real one: wave 0 tries learning rates with a seed of its own; wave 1 compares
the best rate with a tenth of it. Each cell trains for 0.1 s or so.
"""

import time
import warnings

import torch

from gammabeta.studies._run import Cell

CLAIMS = ("toy-faster",)
RATES = (0.01, 0.1, 0.3)
TUNING_SEED = 800


def cells(budget, data, seeds, rows):
    wanted = [Cell("toy", {"part": "tune", "rate": r}, TUNING_SEED) for r in RATES]
    tuned = {row["rate"]: row["accuracy"] for row in rows if row["part"] == "tune"}
    if len(tuned) == len(RATES):
        best = max(tuned, key=tuned.get)
        for seed in range(seeds or 2):
            for rate in (best, best / 10):
                wanted.append(Cell("toy", {"part": "main", "rate": rate}, seed, 1.0, wave=1))
    return wanted


def expected(budget, data, seeds):
    tuning = cells(budget, data, seeds, [])
    arms = [{"part": "main", "rate": guess} for guess in (-1.0, -2.0)]
    return tuning + [Cell("toy", arm, s, wave=1) for arm in arms for s in range(seeds or 2)]


def measure(arm, seed, budget, data):
    started = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    x = data.train_x.flatten(1).float() / data.train_x.max()
    w = torch.zeros(x.shape[1], 10, requires_grad=True)
    warnings.warn("a toy trains", stacklevel=1)
    for step in range(1, 41):
        batch = torch.randint(len(x), (64,), generator=generator)
        loss = torch.nn.functional.cross_entropy(x[batch] @ w, data.train_y[batch])
        (slope,) = torch.autograd.grad(loss, w)
        with torch.no_grad():
            w -= arm["rate"] * slope
        time.sleep(0.002)
        if step % 20 == 0:
            accuracy = (x @ w).argmax(1).eq(data.train_y).double().mean().item()
            stray = torch.rand(()).item()  # drawn from the global generator, by mistake
            seconds = time.monotonic() - started
            yield {"step": step, "accuracy": accuracy, "stray": stray, "train_seconds": seconds}


def judge(rows):
    from gammabeta.studies._verdict import Verdict  # not in workers: scipy costs them a second

    last = [row for row in rows if row["part"] == "main" and row["step"] == 40]
    if not last:
        return []
    best = max(row["rate"] for row in last)
    gains = [
        a["accuracy"] - b["accuracy"]
        for a in last
        for b in last
        if a["rate"] == best and b["rate"] < best and a["seed"] == b["seed"]
    ]
    effect = 100 * sum(gains) / len(gains)
    sentence = f"The larger rate gains {effect:.1f} points."
    return [
        Verdict(
            claim="toy-faster",
            experiment="toy",
            status="demo",
            published_status=None,
            effect=effect,
            ci=(effect - 1, float("inf")),
            n=len(gains),
            unit="points",
            reported="",
            budget=rows[0]["budget"],
            data=rows[0]["data"],
            delta=0.3,
            half_width=None,
            planned_half_width=None,
            sentence=sentence,
        )
    ]


def figures(rows):
    rates = sorted({row["rate"] for row in rows})
    series = []
    for rate in rates:
        chosen = [row for row in rows if row["rate"] == rate and row["seed"] != 1]
        x, y = [row["step"] for row in chosen], [row["accuracy"] for row in chosen]
        series.append({"name": f"rate {rate}", "style": "bn", "x": x, "y": y, "n": 1})
    return [
        {
            "id": "toy-accuracy",
            "experiment": "toy",
            "kind": "curves",
            "title": "Does a larger rate help?",
            "caption": "One seed.",
            "alt": "Accuracy against step for each rate.",
            "x": {"label": "step", "log": False},
            "y": {"label": "accuracy", "log": False},
            "panels": [{"title": "", "series": series}],
        }
    ]
