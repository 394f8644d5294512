"""The experiment on heads and on which layers learn first: what it trains and concludes."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gammabeta.studies import _data, deep_layers
from gammabeta.studies._claims import overruled
from gammabeta.studies._deep_layers import heads, layers
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")
STEPS = 12


# -- networks ---------------------------------------------------------------------------------


def plainly(activation, norm, taught, rate, depth=6):
    """The same training one network at a time, written out; test accuracy at the end."""
    x, y, test_x, test_y = fair_split(DIGITS, 3, "test")
    g = stream(3, "weights")
    net = MLP((64, *[100] * depth, 10), activation, norm, g)
    head = MLP((100, 10), activation, False, g).layers[0]
    size = 3 if norm else 2
    update = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=rate)
    first = None
    for index in itertools.islice(batches(len(x), 64, stream(3, "order")), STEPS):
        update.zero_grad()
        h = net.layers[: 3 * size](pixels(x[index], 16))
        loss = F.cross_entropy(net.layers[3 * size :](h), y[index])
        (loss + 0.3 * taught * F.cross_entropy(head(h), y[index])).backward()
        first = first or net.layers[0].weight.grad.norm().item()
        update.step()
    share = (net.eval()(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    return first, share


@pytest.mark.parametrize(("activation", "norm"), [("relu", False), ("sigmoid", True)])
def test_networks_side_by_side_train_as_each_would_alone(activation, norm):
    trials = [heads.Trial(False, 0.1), heads.Trial(True, 0.3), heads.Trial(False, 1e30)]
    found = {k: [] for k in range(3)}
    for k, row in heads.trained(3, DIGITS, activation, norm, trials, "test", STEPS, 500, 6):
        found[k].append(row)
    for k, (taught, rate) in enumerate(trials[:2]):
        first, share = plainly(activation, norm, taught, rate)
        assert found[k][0]["gradient"] == pytest.approx(first, rel=1e-4)
        assert found[k][-1]["accuracy"] == pytest.approx(share, abs=0.004)
        assert found[k][-1]["step"] == STEPS
        assert not found[k][-1]["diverged"]
    if not norm:  # the neighbor that diverged left no mark
        assert found[2][-1]["diverged"]


def test_similarity_is_that_of_the_centered_columns():
    a, b = (torch.randn(60, 7, generator=stream(k, "x"), dtype=torch.float64) for k in (0, 1))
    a0, b0 = a - a.mean(0), b - b.mean(0)
    k, m = a0 @ a0.T, b0 @ b0.T  # the same by kernels: HSIC
    assert layers.similarity(a, b) == pytest.approx(((k * m).sum() / k.norm() / m.norm()).item())
    q, _ = torch.linalg.qr(torch.randn(7, 7, generator=stream(2, "x"), dtype=torch.float64))
    assert layers.similarity(a, 3 * a @ q + 1) == pytest.approx(1)
    assert layers.similarity(a, torch.ones(60, 7)) == 0


def test_settled_finds_the_first_time_by_either_measure():
    near = {0: 0.8, 10: 0.85, 20: 0.95, 40: 1.0}
    assert layers.settled(near, of_the_way=False) == pytest.approx(15.0)
    assert layers.settled(near, of_the_way=True) == pytest.approx(32.0)
    assert layers.correlation([5.0, 5.0, 5.0]) == 0
    assert layers.correlation([1.0, 2.0, 3.0, 4.0]) == pytest.approx(-1)


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_the_last_two_layers_stay_and_those_below_move(norm):
    top, below = (layers.network(64, norm, seed) for seed in (0, 1))
    mixed = layers.behind(top, below)
    ours, theirs, mixture = (layers.weights(net) for net in (top, below, mixed))
    for k, w in enumerate(mixture):
        assert torch.equal(w, (ours if k >= 4 else theirs)[k])
    # normalization belongs to the layer before it
    if norm == "bn":
        with torch.no_grad():
            [m for m in top.layers if isinstance(m, nn.BatchNorm1d)][-1].weight.fill_(7)
        gammas = [
            m.weight for m in layers.behind(top, below).layers if isinstance(m, nn.BatchNorm1d)
        ]
        assert [g[0].item() for g in gammas] == [1, 1, 1, 1, 7]


def test_a_draw_has_all_its_numbers():
    rows = list(layers.draw(0, DIGITS, "none", 0.1, 60))
    assert rows == list(layers.draw(0, DIGITS, "none", 0.1, 60))
    found = {row["cell"]: row["value"] for row in rows if row["kind"] == "value"}
    assert {deep_layers._ORDER, deep_layers._AGAIN} <= found.keys()
    assert -1 <= found[deep_layers._ORDER] <= 1
    # where all layers train on, the loss falls
    assert found["change of ln loss, all layers 100 steps ahead, without"] < -0.1
    assert 0 <= found["steps of the last layers to get back after 100, without"] <= 100


# -- made-up rows -----------------------------------------------------------------------------

HELPED = {
    ("ReLU", "plain"): 90,
    ("ReLU", "heads"): 92,
    ("ReLU", "bn"): 94,
    ("sigmoid", "plain"): 11,
    ("sigmoid", "heads"): 60,
    ("sigmoid", "bn"): 90,
}


def world(levels=(), sd=0.1, order=0.8, rise=0.5, spread=0.05):
    levels = {**HELPED, **dict(levels)}

    def rows(cell, seed):
        if cell["part"] == "layers":
            label = layers.LABELS[cell["arm"]]
            numbers = {
                f"rank correlation with depth, {label}": order,
                f"rise of ln loss, layers below 100 steps ahead, {label}": rise,
            }
            return [
                {"kind": "value", "cell": name, "value": x + noise(seed, name, sd=spread)}
                for name, x in numbers.items()
            ]
        named = [
            t.split()
            for t in cell.get("trials", f"{cell.get('arm')} {cell.get('rate')}").split(", ")
        ]
        found = []
        for arm, text in named:
            rate = float(text)
            level = levels.get((cell["group"], arm), 90) - abs(math.log10(rate) + 1)
            level += noise(seed, cell["group"], arm, sd=sd)
            own = {"arm": arm, "rate": rate} if "trials" in cell else {}
            found += [{**own, "step": 0, "gradient": 2.0 if arm == "heads" else 1.0}]
            found += [
                {**own, "step": s, "accuracy": level / 100, "diverged": False} for s in (1, 2, 3)
            ]
        return found

    return rows


def verdicts(budget="small", data="mnist", seeds=None, **changes):
    rows, _ = simulate(deep_layers, world(**changes), budget, data, seeds)
    return judged(deep_layers, rows)


def test_a_world_that_fits_both_claims_supports_them():
    found = verdicts()
    assert {v.status for v in found.values()} == {"supported"}
    assert {v.published_status for v in found.values()} == {None}
    assert found["deep-supervision"].effect == pytest.approx(2, abs=0.3)
    gradients = [c for c in found["deep-supervision"].cells if c["name"].startswith("ln gradient")]
    assert [c["effect"] for c in gradients] == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize(
    ("claim", "changes", "status"),
    [
        ("deep-supervision", {"levels": {("ReLU", "heads"): 90}}, "mixed"),
        ("deep-supervision", {"levels": {("ReLU", "bn"): 92}}, "mixed"),
        ("deep-supervision", {"levels": {("ReLU", "bn"): 92, ("sigmoid", "heads"): 11}}, "refuted"),
        ("deep-supervision", {"levels": {("ReLU", "heads"): 91.3}, "sd": 4.0}, "inconclusive"),
        ("top-first", {"order": -0.8}, "mixed"),
        ("top-first", {"rise": -0.2}, "mixed"),
        ("top-first", {"order": 0.0, "rise": 0.0, "spread": 0.01}, "refuted"),
        ("top-first", {"order": 0.4, "spread": 2.0}, "inconclusive"),
    ],
)
def test_other_worlds(claim, changes, status):
    found = verdicts(**changes)[claim]
    assert found.status == status
    if status in ("refuted", "mixed"):
        assert found.sentence.startswith("No:" if status == "refuted" else "In part:")


def test_thresholds_are_those_of_the_registry():
    rows, _ = simulate(deep_layers, world())
    with overruled(
        {"deep-supervision": {"delta": 100.0}, "top-first": {"delta": 0.9, "rise": 1.0}}
    ):
        assert {v.status for v in judged(deep_layers, rows).values()} == {"refuted"}


def test_a_rate_that_a_grid_grew_by_is_tried_by_all_arms_in_cells_of_its_own():
    def rows(cell, seed):
        found = world()(cell, seed)
        for row in found:  # heads at their best at the largest rate there was
            if cell["group"] == "ReLU" and row.get("arm") == "heads" and "accuracy" in row:
                row["accuracy"] = 0.5 + min(row["rate"], 1.0) / 10 - (row["rate"] > 1) / 10
        return found

    _, asked = simulate(deep_layers, rows)
    tuning = [c.arm for c in asked if (c.arm["part"], c.arm["group"]) == ("tuning", "ReLU")]
    trials = {arm["trials"] for arm in tuning if not arm["norm"]}
    assert "plain 1, heads 1" in trials
    assert {arm["trials"] for arm in tuning if arm["norm"]} >= {"bn 1"}
    fair = {c.arm["trials"] for c in asked if (c.arm["part"], c.arm["group"]) == ("fair", "ReLU")}
    assert fair == {"plain 0.1, heads 1", "bn 0.1, both 0.1"}


def test_missing_runs_leave_verdicts_open():
    rows, _ = simulate(deep_layers, world())
    for part in ("tuning", "fair", "pilot"):
        found = judged(deep_layers, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    assert deep_layers.judge([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in deep_layers.expected("small", "mnist", None))
    _, asked = simulate(deep_layers, world(sd=0.4, spread=0.1))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    assert {v.status for v in verdicts(data="digits").values()} == {"demo"}
    assert {v.status for v in verdicts("tiny", seeds=8).values()} == {"inconclusive"}


def test_the_whole_experiment_runs_on_the_digits():
    rows, _ = simulate(
        deep_layers,
        lambda cell, seed: deep_layers.measure(cell, seed, "tiny", DIGITS),
        "tiny",
        "digits",
        2,
    )
    found = judged(deep_layers, rows)
    assert set(found) == set(deep_layers.CLAIMS)
    assert {v.status for v in found.values()} == {"demo"}
