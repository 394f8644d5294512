"""The experiment on the size of the statistics' batch: runs, what is asked for and concluded."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from gammabeta.layers.ghost import GhostBatchNorm1d
from gammabeta.studies import _data, batch_noise
from gammabeta.studies._claims import claims, overruled
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, noise, simulate

DIGITS = _data.load("digits")
SIZE_CLAIMS = ("bigger-batch-less-reg", "batch-too-large", "batch-U")


# -- one cell ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "arm"), [("size", "m = 4"), ("size", "m = 512"), ("size", "all"), ("large", "small")]
)
def test_only_the_statistics_differ(group, arm, monkeypatch):
    tiny = batch_noise.PLANS["tiny"]._replace(steps=4)
    monkeypatch.setitem(batch_noise.PLANS, "tiny", tiny)
    steps, batch = (8, 128) if arm == "small" else (4, 512)
    x, y, test_x, test_y = fair_split(DIGITS, 2, "test", 1000)
    x, held = pixels(x, 16), pixels(test_x, 16)[:500]
    net = MLP((64, 100, 100, 10), "relu", True, stream(2, "weights"))
    running = {}
    update = torch.optim.SGD(net.parameters(), lr=0.3)
    for index in itertools.islice(batches(1000, batch, stream(2, "order")), steps):
        update.zero_grad()
        h = x if arm == "all" else x[index]
        size = 4 if arm == "m = 4" else len(h)
        for layer in net.layers:
            if isinstance(layer, torch.nn.BatchNorm1d):
                mean, var = running.get(layer, (torch.zeros(100), torch.ones(100)))
                seen = h.detach()
                running[layer] = mean.lerp(seen.mean(0), 0.1), var.lerp(seen.var(0), 0.1)
                parts = h.view(-1, size, 100)
                off = parts - parts.mean(1, keepdim=True)
                h = off / (parts.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
                h = h.view(-1, 100) * layer.weight + layer.bias
            else:
                h = layer(h)
        F.cross_entropy(h[index] if arm == "all" else h, y[index]).backward()
        update.step()
    for layer, (mean, var) in running.items():
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    net.eval()
    cell = {"part": "fair", "group": group, "arm": arm, "rate": 0.3}
    *_, last = batch_noise.measure(cell, 2, "tiny", DIGITS)
    assert last["step"] == steps
    for key, (a, b) in {"accuracy": (held, test_y), "train_accuracy": (x, y)}.items():
        share = (net(a).argmax(1) == b[: len(a)]).double().mean().item()
        assert last[key] == pytest.approx(share, abs=0.006)


def test_the_norm_of_a_ghost_arm_has_its_size(monkeypatch):
    sizes = []

    class Seen(GhostBatchNorm1d):
        def __init__(self, *args, virtual_batch_size):
            sizes.append(virtual_batch_size)
            super().__init__(*args, virtual_batch_size=virtual_batch_size)

    monkeypatch.setattr(batch_noise, "GhostBatchNorm1d", Seen)
    for group, arm in (("size", "m = 16"), ("large", "ghosts of 64")):
        cell = {"part": "fair", "group": group, "arm": arm, "rate": 0.3}
        list(batch_noise.measure(cell, 2, "tiny", DIGITS))
    assert sizes == [16, 16, 64, 64]


def test_small_batches_see_as_many_images():
    plan = batch_noise.PLANS["small"]
    assert batch_noise._shape(plan, "fair", "large", "small") == (480, 128, 128)
    assert batch_noise._shape(plan, "real", "size", "batch of 64") == (800, 64, 64)
    assert batch_noise._shape(plan, "fair", "size", "all") == (100, 512, 0)
    assert batch_noise._shape(plan, "fair", "large", "whole") == (30, 2048, 2048)


# -- made-up rows -----------------------------------------------------------------------------


def sizes(curve, gap=lambda m: 5.0, *, ghosts=0.5, small=1.0, sd=0.1):
    """Test accuracy and gap over m; points that ghosts of 64 and small batches gain."""

    def rows(cell, seed):
        arm, rate = cell["arm"], cell["rate"]
        if cell["group"] == "large":
            held = {"ghosts of 64": ghosts, "small": small}.get(arm, 0.0)
            wide, best = 5.0, 1.0
        else:
            m = batch_noise.SIZES.get(arm, 64 if arm.startswith("batch") else 2000)
            held, wide, best = curve(m), gap(m), 1.0
            rate = 1.0 if cell["part"] == "real" else rate
        held += 90 - abs(math.log(rate / best)) + noise(seed, arm, sd=sd)
        wide += noise(seed, arm, "gap", sd=sd)
        both = {"accuracy": held / 100, "train_accuracy": (held + wide) / 100}
        return [{"step": s, **both, "diverged": False} for s in (1, 2, 3)]

    return rows


def hill(m, top=64.0, depth=0.15):
    return -depth * (math.log2(m) - math.log2(top)) ** 2


def verdicts(*args, **kwargs):
    options = {k: kwargs.pop(k) for k in ("budget", "data", "seeds") if k in kwargs}
    rows, _ = simulate(batch_noise, sizes(*args, **kwargs), **options)
    return judged(batch_noise, rows)


@pytest.mark.parametrize(
    ("curve", "statuses"),
    [
        (hill, ("supported", "supported")),
        # the best size is beyond the middle
        (lambda m: hill(m, 2000), ("refuted", "refuted")),
        (lambda m: hill(m, 3), ("supported", "refuted")),
        # a curve that levels off has a parabola with a top, and no optimum
        (lambda m: -8 / m, ("refuted", "refuted")),
        # too flat to matter
        (lambda m: hill(m, depth=0.004), ("refuted", "refuted")),
    ],
)
def test_an_optimum_in_the_middle_is_one_from_which_accuracy_falls(curve, statuses):
    found = verdicts(curve, sd=0.05)
    assert (found["batch-too-large"].status, found["batch-U"].status) == statuses
    assert found["batch-U"].published_status is None
    assert len([c for c in found["batch-U"].cells if c["part"] == "fair"]) == 5


def test_a_parabola_alone_does_not_make_an_optimum():
    found = verdicts(lambda m: -8 / m)["batch-U"]
    cells = {c["name"]: c["status"] for c in found.cells}
    assert cells["−curvature"] == "supported"
    assert cells["best in the middle − all"] == "refuted"


@pytest.mark.parametrize(
    ("slope", "sd", "status"),
    [(0.3, 0.1, "supported"), (0.0, 0.05, "refuted"), (-0.3, 0.1, "refuted"),
     (0.07, 1.5, "inconclusive")],
)  # fmt: skip
def test_a_gap_that_grows_with_the_size_is_less_regularization(slope, sd, status):
    found = verdicts(hill, lambda m: slope * math.log2(m), sd=sd)["bigger-batch-less-reg"]
    assert found.status == status
    if sd < 1:
        assert found.effect == pytest.approx(3 * slope, abs=0.1)
        # the SGD batch of 64 has the same gap as the ghosts here
        assert found.cells[1]["effect"] == pytest.approx(3 * slope, abs=0.2)
    assert any(note.startswith("Gap (points): m = 4 ") for note in found.notes)


@pytest.mark.parametrize(
    ("ghosts", "small", "status"),
    [(0.6, 1.2, "supported"), (0.0, 1.2, "refuted"), (-0.5, 1.2, "refuted"),
     (0.6, 0.0, "inconclusive")],
)  # fmt: skip
def test_ghosts_help_only_where_there_is_a_gap(ghosts, small, status):
    found = verdicts(hill, ghosts=ghosts, small=small)["ghost-bn"]
    assert found.status == status
    notes = " ".join(found.notes)
    if ghosts > 0:
        assert found.effect == pytest.approx(ghosts, abs=0.1)
        assert "Best ghosts, chosen on validation: ghosts of 64." in notes
    if status == "inconclusive":
        assert "nothing to explain here" in found.sentence
    if status == "supported":
        assert "% of it is closed" in notes


def test_noise_is_inconclusive():
    found = verdicts(lambda m: hill(m, depth=0.03), ghosts=0.1, small=4.0, sd=1.5)
    assert found["batch-U"].status == found["ghost-bn"].status == "inconclusive"
    assert found["batch-U"].n == 16


def test_all_sizes_have_the_same_trials_and_only_the_best_ghosts_go_on():
    _, asked = simulate(batch_noise, sizes(hill))
    tried, fair = {}, set()
    for cell in asked:
        arm = (cell.arm["group"], cell.arm["arm"])
        if cell.arm["part"] == "tuning":
            tried.setdefault(arm, set()).add(cell.arm["rate"])
        else:
            fair.add(arm)
    assert len(tried) == 6 + 5
    assert {frozenset(v) for v in tried.values()} == {frozenset({0.3, 1.0, 3.0})}
    assert {arm for group, arm in fair if group == "large"} == {"whole", "ghosts of 64", "small"}
    assert ("size", "batch of 64") in fair


def test_another_delta_and_missing_runs():
    rows, _ = simulate(batch_noise, sizes(hill, lambda m: math.log2(m)))
    with overruled({claim: {"delta": 9.0} for claim in batch_noise.CLAIMS}):
        found = judged(batch_noise, rows)
        assert {found[c].status for c in SIZE_CLAIMS} == {"refuted"}
    for part in ("tuning", "fair", "pilot"):
        found = judged(batch_noise, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    assert batch_noise.judge([]) == []
    assert judged(batch_noise, rows)["batch-U"].reported == claims()["batch-U"].reported


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in batch_noise.expected("small", "mnist", None))
    _, asked = simulate(batch_noise, sizes(hill, sd=0.15))
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    assert {v.status for v in verdicts(hill, data="digits").values()} == {"demo"}
    assert {v.status for v in verdicts(hill, budget="tiny", seeds=8).values()} == {"inconclusive"}


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        batch_noise,
        lambda cell, seed: batch_noise.measure(cell, seed, "tiny", DIGITS),
        "tiny",
        "digits",
        1,
    )
    assert len(asked) == 11 * 2 + 6 + 1 + 3
    assert {v.status for v in judged(batch_noise, rows).values()} == {"demo"}
