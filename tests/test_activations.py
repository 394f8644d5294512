"""The experiment on activations: its networks, its loop, what it asks for and what it concludes."""

import copy
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gammabeta import _runs
from gammabeta.studies import _data, activations
from gammabeta.studies._claims import claims
from gammabeta.studies._data import Images
from gammabeta.studies._nets import ACTIVATIONS, MLP, m2
from gammabeta.studies._pairs import NORMS, Run, tune
from gammabeta.studies._train import accuracy, batches, log_steps, pixels, stream, train

DIGITS = _data.load("digits")


def net(activation="relu", norm=True, seed=0, **options):
    return m2(64, activation, norm, stream(seed, "weights"), **options)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- networks ---------------------------------------------------------------------------------


def weights(model):
    return [p for name, p in model.named_parameters() if p.ndim == 2]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_arms_of_every_activation_start_from_the_same_weights(activation):
    first = weights(net("relu", norm=False, seed=3))
    for norm in (True, False):
        pairs = zip(first, weights(net(activation, norm, seed=3)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first[0], weights(net(activation, seed=4))[0])


def test_weights_are_normal_truncated_at_two_standard_deviations():
    w = weights(m2(784, "relu", False, stream(0, "weights")))[0]
    std = math.sqrt(2 / 784)
    assert w.abs().max() <= 2 * std
    assert w.std().item() == pytest.approx(0.8796 * std, rel=0.01)


def test_a_bias_stands_only_where_no_batch_normalization_follows():
    def biases(norm):
        return [m.bias for m in net(norm=norm).layers if isinstance(m, torch.nn.Linear)]

    assert [b is None for b in biases(True)] == [True, True, False]
    assert all((b == 0.1).all() for b in (*biases(False), biases(True)[-1]))


def test_batch_normalization_stands_before_each_activation():
    kinds = [type(layer).__name__ for layer in net("tanh").layers]
    assert kinds == ["Linear", "BatchNorm1d", "Tanh"] * 2 + ["Linear"]
    layers = [m for m in net(eps=1e-3, momentum=0.001).layers if hasattr(m, "eps")]
    assert [(m.eps, m.momentum) for m in layers] == [(1e-3, 0.001)] * 2


def test_making_a_network_draws_nothing_from_the_global_random_state():
    before = torch.get_rng_state()
    net()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("sizes", "activation", "message"),
    [((4, 2), "swish", "one of relu, leaky_relu"), ((4,), "relu", "an input and an output")],
)
def test_a_network_that_cannot_be_made_says_why(sizes, activation, message):
    with pytest.raises(ValueError, match=message):
        MLP(sizes, activation, True, torch.Generator())


# -- the loop ---------------------------------------------------------------------------------


def fit(model, *, rate=0.1, steps=5, loss="mean", stops=(), seed=0):
    x, y = DIGITS.train_x, DIGITS.train_y
    options = {"pixel_max": 16, "order": stream(seed, "order"), "stops": stops, "loss": loss}
    return list(train(model, x, y, rate=rate, steps=steps, **options))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_the_loop_is_stochastic_gradient_descent(norm, loss):
    ours, plain = net(norm=norm), net(norm=norm)
    seen = fit(ours, rate=0.01, loss=loss, stops=[1, 5])
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    losses = []
    for index in itertools.islice(batches(1797, 64, stream(0, "order")), 5):
        value = F.cross_entropy(
            plain(pixels(DIGITS.train_x[index], 16)), DIGITS.train_y[index], reduction=loss
        )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item() / (64 if loss == "sum" else 1))
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    assert seen == [(1, pytest.approx(losses[0])), (5, pytest.approx(losses[4]))]


def test_a_rate_on_the_sum_is_that_rate_times_the_batch_on_the_mean():
    on_sum, on_mean = net(), net()
    fit(on_sum, rate=0.01, loss="sum")
    fit(on_mean, rate=0.64, loss="mean")
    for a, b in zip(on_sum.parameters(), on_mean.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_epoch_shows_each_image_at_most_once_and_the_next_has_another_order():
    order = list(itertools.islice(batches(20, 6, torch.Generator().manual_seed(0)), 6))
    first, second = torch.cat(order[:3]), torch.cat(order[3:])
    for epoch in (first, second):
        assert len(epoch.unique()) == 18
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="1 to 20"):
        next(batches(20, 21, torch.Generator()))


def test_pausing_changes_nothing_and_the_global_random_state_stays():
    before = torch.get_rng_state()
    straight, paused = net(), net()
    fit(straight, steps=6)
    assert [step for step, _ in fit(paused, steps=6, stops=range(1, 7))] == [1, 2, 3, 4, 5, 6]
    assert equal(state(straight), state(paused))
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_loss_or_statistic_is_named():
    with pytest.raises(ValueError, match="'median'"):
        fit(net(), loss="median")
    with pytest.raises(ValueError, match="'own'"):
        accuracy(net(), torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64), "own")


@pytest.mark.parametrize("statistics", ["running", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_no_trace(statistics, training):
    model = net()
    fit(model)
    model.train(training)
    before, random = state(model), torch.get_rng_state()
    accuracy(model, pixels(DIGITS.train_x, 16), DIGITS.train_y, statistics)
    assert equal(before, state(model))
    assert model.training is training
    assert torch.equal(random, torch.get_rng_state())


def test_evaluation_by_batch_statistics_is_what_training_mode_computes():
    model = net()
    fit(model, steps=20)
    x, y = pixels(DIGITS.train_x, 16), DIGITS.train_y
    with torch.no_grad():
        expected = copy.deepcopy(model).train()(x)
        torch.testing.assert_close(model.with_batch_statistics(x), expected)
        by_running = copy.deepcopy(model).eval()(x)
    assert accuracy(model, x, y, "batch") == (expected.argmax(1) == y).double().mean().item()
    assert accuracy(model, x, y) == (by_running.argmax(1) == y).double().mean().item()
    assert accuracy(model, x, y) != accuracy(model, x, y, "batch")


@pytest.mark.parametrize(("steps", "count"), [(1000, 11), (40000, 40), (30, 4), (2, 5)])
def test_evaluations_are_log_spaced_and_end_with_three_close_ones(steps, count):
    at = log_steps(steps, count)
    assert at == sorted(set(at))
    assert at[0] >= 1
    assert at[-1] == steps
    assert len(at) <= count
    if steps >= 1000:
        assert len(at) == count
        assert at[-3:] == [round(0.96 * steps), round(0.98 * steps), steps]


# -- one cell ---------------------------------------------------------------------------------


def arm(part="fair", activation="relu", norm="bn", rate=0.1):
    return {"part": part, "activation": activation, "norm": norm, "rate": rate}


def rows_of(cell_arm, seed=0, budget="tiny", data=DIGITS):
    return list(activations.measure(cell_arm, seed, budget, data))


@pytest.mark.parametrize("part", ["tuning", "fair", "pilot", "published"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_same_seed_gives_the_same_rows(part, norm):
    rows = rows_of(arm(part, norm=norm))
    assert rows == rows_of(arm(part, norm=norm))
    assert rows != rows_of(arm(part, norm=norm), seed=1)
    assert rows[-1]["step"] == 30
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_a_diverged_run_is_recorded_and_not_an_error():
    rows = rows_of(arm(norm="none", rate=1e30))
    assert rows[-1]["diverged"] is True
    assert "loss" not in rows[-1]
    assert 0 <= rows[-1]["accuracy"] <= 0.3
    json.dumps(rows, allow_nan=False)


def test_the_published_part_evaluates_by_batch_statistics_and_the_fair_part_beside():
    fair, published = rows_of(arm()), rows_of(arm("published", rate=0.01))
    assert all("accuracy_batch" in row for row in fair[-3:])
    assert fair[-1]["accuracy"] != fair[-1]["accuracy_batch"]
    # 30 steps at momentum 0.001 leave the running statistics near their start: chance level.
    assert published[-1]["accuracy"] > 0.5
    assert all("accuracy_batch" not in row for row in published)


@pytest.mark.parametrize(
    ("part", "rate", "loss", "eps", "momentum"),
    [("published", 0.01, "sum", 1e-3, 0.001), ("fair", 0.5, "mean", 1e-5, 0.1)],
)
def test_a_cell_is_its_protocol_step_by_step(part, rate, loss, eps, momentum):
    x, y, test_x, test_y = activations.split(part, 3, DIGITS)
    model = net("tanh", seed=3, eps=eps, momentum=momentum)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for index in itertools.islice(batches(1000, 64, stream(3, "order")), 30):
        value = F.cross_entropy(model(pixels(x[index], 16)), y[index], reduction=loss)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    model.train(part == "published")
    expected = (model(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    last = rows_of(arm(part, "tanh", rate=rate), seed=3)[-1]
    assert last["accuracy"] == pytest.approx(expected, abs=0.0021)  # one image of 500
    assert last["loss"] == pytest.approx(value.item() / (64 if loss == "sum" else 1), rel=1e-4)


def test_each_seed_splits_the_digits_anew_and_no_image_is_on_both_sides():
    marked = DIGITS._replace(train_y=torch.arange(1797))
    parts = {p: activations.split(p, 0, marked) for p in ("tuning", "fair", "published", "pilot")}
    assert all(len(split[1]) == 1000 for split in parts.values())
    assert len(parts["tuning"][3]) == 297
    assert len(parts["fair"][3]) == 500
    seen = torch.cat([parts["fair"][1], parts["tuning"][3], parts["fair"][3]])
    assert len(seen.unique()) == 1797
    assert torch.equal(parts["published"][3], parts["fair"][3])
    assert not torch.equal(parts["fair"][3], activations.split("fair", 1, marked)[3])


def test_mnist_is_split_as_the_source_did():
    blank = torch.zeros(60000, 1, 1, dtype=torch.uint8)
    data = Images("mnist", "0" * 16, blank, torch.arange(60000), blank[:9], -torch.arange(9))
    _, fair, _, test = activations.split("fair", 0, data)
    assert len(fair.unique()) == 5000
    assert fair.max() < 55000
    assert torch.equal(test, data.test_y)
    assert not torch.equal(fair, activations.split("fair", 1, data)[1])
    _, tuning, _, validation = activations.split("tuning", 0, data)
    assert torch.equal(tuning, fair)
    assert torch.equal(validation, torch.arange(55000, 60000))
    _, all_images, _, test = activations.split("published", 0, data)
    assert torch.equal(all_images, torch.arange(55000))
    assert torch.equal(test, data.test_y)


@pytest.mark.skipif("GAMMABETA_DATA" not in os.environ, reason="needs MNIST: set GAMMABETA_DATA")
@pytest.mark.parametrize("part", ["tuning", "fair", "published"])
def test_mnist_is_learned(part):
    rate = 0.01 if part == "published" else 0.1
    rows = rows_of(arm(part, rate=rate), budget="tiny", data=_data.load("mnist"))
    assert rows[-1]["accuracy"] > 0.6


# -- learning rates ---------------------------------------------------------------------------


def run(percent, diverged=False):
    return Run([1, 2, 3], [percent] * 3, [], diverged)


def trials(bn, none):
    """Runs of both tuning seeds; a value below 0 stands for a diverged run."""
    return {
        (norm, rate): {s: run(abs(v), v < 0) for s in (800, 801)}
        for norm, by_rate in (("bn", bn), ("none", none))
        for rate, v in by_rate.items()
    }


def search(bn, none, grid, **options):
    return tune(trials(bn, none), grid, (800, 801), **options)


def test_the_best_rate_inside_the_grid_is_chosen_for_each_arm():
    found = search({0.1: 1, 0.3: 5, 1.0: 2}, {0.1: 1, 0.3: 5, 1.0: 2}, (0.1, 0.3, 1.0))
    assert found == ((0.1, 0.3, 1.0), {"bn": 0.3, "none": 0.3}, 0, ())


def test_a_best_rate_at_an_edge_grows_the_grid_of_both_arms():
    bn, none = {0.1: 1, 0.3: 2, 1.0: 5}, {0.1: 1, 0.3: 5, 1.0: 2}
    found = search(bn, none, (0.1, 0.3, 1.0))
    assert found.grid == (0.1, 0.3, 1.0, 3.0)
    assert (found.best, found.missing) == (None, 4)
    # The other arm's trials are missing as long as its run at 3.0 is not there.
    assert search(bn | {3.0: 4}, none, (0.1, 0.3, 1.0)).missing == 2
    found = search(bn | {3.0: 4}, none | {3.0: 1}, (0.1, 0.3, 1.0))
    assert (found.grid, found.best) == ((0.1, 0.3, 1.0, 3.0), {"bn": 1.0, "none": 0.3})


def test_both_edges_may_grow_at_once_and_a_diverged_rate_ends_the_search():
    bn, none = {0.1: 1, 0.3: 2, 1.0: 5}, {0.1: 5, 0.3: 4, 1.0: -9}
    assert search(bn, none, (0.1, 0.3, 1.0)).grid == (0.03, 0.1, 0.3, 1.0, 3.0)
    more = {0.03: 1, 3.0: -99}
    found = search(bn | more, none | more, (0.1, 0.3, 1.0))
    assert found.best == {"bn": 1.0, "none": 0.1}
    assert found.at_edge == ()


def test_one_diverged_seed_is_enough_and_if_all_diverge_the_best_of_them_is_taken():
    grid = (0.1, 0.3, 1.0)
    mixed = trials({0.1: 1, 0.3: 9, 1.0: 2}, {0.1: -1, 0.3: -3, 1.0: -2})
    mixed["bn", 0.3][801] = run(9, diverged=True)
    found = tune(mixed, grid, (800, 801), grow=False)
    assert found.best == {"bn": 1.0, "none": 0.3}
    assert found.at_edge == ("bn",)


def test_of_equal_rates_the_smaller_is_taken():
    flat = {0.1: 1, 0.3: 5, 1.0: 5, 3.0: 1}
    assert search(flat, flat, tuple(flat)).best == {"bn": 0.3, "none": 0.3}


# -- what is asked for ------------------------------------------------------------------------


def simulate(score, budget="small", data="mnist", seeds=None, keep=lambda cell: True):
    """Ask for cells until nothing new is wanted; score(arm, seed) is the accuracy of each."""
    rows, done, asked = [], set(), []
    while True:
        wanted = activations.cells(budget, data, seeds, rows)
        new = [c for c in wanted if (json.dumps(c.arm), c.seed) not in done]
        if not new:
            return rows, asked
        for cell in new:
            done.add((json.dumps(cell.arm), cell.seed))
            asked.append(cell)
            if keep(cell):
                head = {**cell.arm, "seed": cell.seed, "budget": budget, "data": data}
                share = score(cell.arm, cell.seed)
                for step in (960, 980, 1000):
                    row = {"step": step, "accuracy": share, "diverged": False}
                    rows.append({**head, **row})


def noise(seed, key, sd):
    return np.random.default_rng([seed, *key.encode()]).normal(0, sd)


def scorer(gain, sd=0.0005, published=None):
    """Accuracies that peak at rate 0.3, with these gains (as shares) by activation."""

    def score(cell_arm, seed):
        by = gain
        if cell_arm["part"] == "published" and published is not None:
            by = published[cell_arm["rate"]]
        added = by[cell_arm["activation"]] if cell_arm["norm"] == "bn" else 0.0
        lost = 0.0 if cell_arm["part"] == "published" else abs(math.log(cell_arm["rate"] / 0.3))
        jitter = noise(seed, f"{cell_arm['activation']}{cell_arm['norm']}", sd)
        return 0.9 + added - lost / 100 + jitter

    return score


ALIKE = dict.fromkeys(ACTIVATIONS, 0.01)


def test_tuning_comes_first_with_the_same_trials_for_both_arms():
    wanted = activations.cells("small", "mnist", None, [])
    assert len(wanted) == 5 * 2 * 6 * 2
    assert {(c.wave, c.arm["part"]) for c in wanted} == {(0, "tuning")}
    assert {c.seed for c in wanted} == {800, 801}
    bn, none = ([c for c in wanted if c.arm["norm"] == norm] for norm in NORMS)
    assert len(bn) == len(none)


def test_every_activation_of_both_parts_has_a_seed_before_any_has_the_next():
    _, asked = simulate(scorer(ALIKE))
    main = [c for c in asked if c.wave == 1]
    assert [c.seed for c in main] == sorted(c.seed for c in main)
    for seed in range(5):
        arms = [tuple(c.arm.values()) for c in main if c.seed == seed]
        assert len(set(arms)) == len(arms) == 5 * 2 * (1 + 2)
    assert {c.arm["rate"] for c in main if c.arm["part"] == "fair"} == {0.3}
    assert {c.arm["rate"] for c in main if c.arm["part"] == "published"} == {0.01, 0.0001}
    assert [c.wave for c in asked] == sorted(c.wave for c in asked)
    assert len({(json.dumps(c.arm), c.seed) for c in asked}) == len(asked)


@pytest.mark.parametrize(("sd", "count"), [(0.0001, 5), (0.05, 16)])
def test_the_pilot_alone_decides_how_many_seeds(sd, count):
    rows, asked = simulate(scorer(ALIKE, sd))
    assert {c.seed for c in asked if c.arm["part"] == "pilot"} == {900, 901, 902, 903}
    assert {c.seed for c in asked if c.arm["part"] == "fair"} == set(range(count))
    assert {c.seed for c in asked if c.arm["part"] == "published"} == set(range(5))
    assert all(c.wave == 3 for c in asked if c.arm["part"] == "fair" and c.seed >= 5)
    others = [r for r in rows if r["part"] != "pilot" and r["seed"] < 5]
    assert not any(c.wave == 3 for c in activations.cells("small", "mnist", None, others))


@pytest.mark.parametrize("seeds", [1, 7])
def test_a_given_number_of_seeds_overrides_the_plan(seeds):
    _, asked = simulate(scorer(ALIKE, sd=0.05), seeds=seeds)
    for part in ("fair", "published"):
        assert {c.seed for c in asked if c.arm["part"] == part} == set(range(seeds))
    assert not any(c.arm["part"] == "pilot" for c in asked)


def test_full_is_the_protocol_of_the_source():
    plan = activations.PLANS["full"]
    assert plan.published_steps == 40000
    assert plan.published_evaluations == 40
    _, asked = simulate(scorer(ALIKE, sd=0.0001), budget="full")
    assert {c.seed for c in asked if c.arm["part"] == "published"} == {0, 1, 2}


def test_rows_of_another_budget_or_data_set_do_not_count():
    rows, _ = simulate(scorer(ALIKE), budget="tiny")
    assert activations.cells("small", "mnist", None, rows) == activations.cells(
        "small", "mnist", None, []
    )


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = activations.expected("small", "mnist", None)
    _, asked = simulate(scorer(ALIKE, sd=0.0001))
    assert sum(c.cost for c in expected) == pytest.approx(sum(c.cost for c in asked))
    assert len(expected) == len(asked)


# -- what is concluded ------------------------------------------------------------------------


def judged(score, **options):
    rows, _ = simulate(score, **options)
    return judge(rows)


def judge(rows):
    verdicts = activations.judge(rows)
    head = {"schema": 1, "gammabeta": "0", "surprises": [], "notice": None}
    plain = {**head, "verdicts": [v.to_json() for v in verdicts]}
    _runs.check_verdicts(json.loads(json.dumps(plain, allow_nan=False)), Path("verdicts.json"))
    figures = json.loads(json.dumps(activations.figures(rows), allow_nan=False))
    _runs.check_figures({"figures": figures}, Path("figures.json"))
    return {v.claim: v for v in verdicts}


def gains(**changes):
    return {**ALIKE, **changes}


def test_gains_with_every_activation_support_the_first_claim_and_equal_ones_refute_the_second():
    found = judged(scorer(ALIKE))
    verdict = found["act-all"]
    assert (verdict.status, verdict.published_status) == ("supported", "supported")
    assert verdict.sentence.startswith("Yes: on MNIST, MLP 100-100, each network at its best")
    assert verdict.effect == pytest.approx(1.0, abs=0.1)
    assert verdict.ci[0] < verdict.effect < verdict.ci[1]
    assert verdict.n == 5
    assert verdict.unit == "points of accuracy"
    assert verdict.reported == claims()["act-all"].reported
    assert verdict.half_width == pytest.approx((verdict.ci[1] - verdict.ci[0]) / 2)
    assert verdict.planned_half_width <= 0.15
    assert len(verdict.cells) == 15
    assert found["act-sigmoid-most"].status == "refuted"
    assert found["act-sigmoid-most"].sentence.startswith("No: on MNIST")
    assert len(found["act-sigmoid-most"].cells) == 12


def test_one_activation_without_a_gain_refutes_the_first_claim_and_is_named():
    found = judged(scorer(gains(tanh=0.0)))
    assert found["act-all"].status == "refuted"
    assert "with tanh (" in found["act-all"].sentence
    assert "ReLU" not in found["act-all"].sentence
    assert found["act-all"].effect == pytest.approx(0.0, abs=0.1)


def test_the_effect_of_the_second_claim_is_the_smallest_contrast():
    found = judged(scorer(gains(sigmoid=0.05, softplus=0.03)))
    verdict = found["act-sigmoid-most"]
    assert verdict.status == "supported"
    assert verdict.effect == pytest.approx(2.0, abs=0.1)
    assert "sigmoid − softplus" in verdict.sentence


def test_wide_intervals_are_inconclusive_and_say_how_many_seeds_would_decide():
    verdict = judged(scorer(ALIKE, sd=0.02))["act-all"]
    assert verdict.status == "inconclusive"
    assert verdict.sentence.startswith("Undecided: ")
    assert "seeds would decide" in verdict.sentence
    assert verdict.n == 16


def test_the_published_verdict_is_mixed_if_its_two_rates_disagree():
    nothing = dict.fromkeys(ACTIVATIONS, 0.0)
    both = {0.01: nothing, 0.0001: ALIKE}
    verdict = judged(scorer(ALIKE, published=both))["act-all"]
    assert (verdict.status, verdict.published_status) == ("supported", "mixed")
    assert any("rate 0.01" in note and "refuted" in note for note in verdict.notes)


def test_digits_are_a_demonstration_in_every_place():
    for verdict in judged(scorer(ALIKE), data="digits").values():
        assert (verdict.status, verdict.published_status) == ("demo", "demo")
        assert {cell["status"] for cell in verdict.cells} == {"demo"}
        assert verdict.sentence.startswith("A demonstration, no verdict: on the bundled digits")


def test_the_wiring_budget_decides_nothing():
    verdict = judged(scorer(ALIKE), budget="tiny", seeds=8)["act-all"]
    assert (verdict.status, verdict.published_status) == ("inconclusive", "inconclusive")


def test_three_seeds_decide_what_was_published_at_full_only():
    found = judged(scorer(ALIKE, sd=0.0001), budget="full")["act-all"]
    assert (found.status, found.published_status) == ("supported", "supported")
    found = judged(scorer(ALIKE, sd=0.0001), seeds=3)["act-all"]
    assert (found.status, found.published_status) == ("inconclusive", "inconclusive")
    assert "3 of at least 5 seeds" in found.sentence


def is_arm(cell, part, activation=None, norm=None):
    wanted = {"part": part, "activation": activation, "norm": norm}
    return all(v is None or cell.arm[k] == v for k, v in wanted.items())


@pytest.mark.parametrize(
    ("drop", "note"),
    [
        (lambda c: is_arm(c, "fair", "tanh"), "Missing: all runs (fair, tanh)"),
        (lambda c: is_arm(c, "fair", "tanh", "bn"), "seed 0, 1, 2, 3, 4 (fair, tanh)"),
        (lambda c: is_arm(c, "fair", "tanh") and c.seed == 2, None),
        (lambda c: is_arm(c, "fair", "tanh", "none") and c.seed == 2, "seed 2 (fair, tanh)"),
        (lambda c: is_arm(c, "fair"), "Missing: all runs (fair, sigmoid)"),
    ],
)
def test_missing_runs_leave_the_fair_verdict_open_and_are_told(drop, note):
    found = judged(scorer(ALIKE, sd=0.0001), keep=lambda c: not drop(c))
    assert found["act-all"].status == "inconclusive"
    assert found["act-all"].published_status == "supported"
    assert found["act-all"].n < 5
    assert note is None or any(note in n for n in found["act-all"].notes)


def test_missing_tuning_leaves_the_fair_verdict_open():
    rows, _ = simulate(scorer(ALIKE, sd=0.0001))
    lost = [
        r
        for r in rows
        if not (r["part"] == "tuning" and r["activation"] == "relu" and r["seed"] == 801)
    ]
    verdict = judge(lost)["act-all"]
    assert verdict.status == "inconclusive"
    assert any("12 tuning runs of ReLU" in note for note in verdict.notes)


def test_a_lone_seed_beside_enough_pairs_is_left_out():
    rows, _ = simulate(scorer(ALIKE, sd=0.0001))
    extra = [{**r, "seed": 5} for r in rows if r["part"] == "fair" and r["seed"] == 4]
    extra = [r for r in extra if (r["activation"], r["norm"]) == ("relu", "bn")]
    before, after = judge(rows)["act-all"], judge(rows + extra)["act-all"]
    assert after.status == "supported"
    assert after.cells == before.cells
    assert any("seed 5 (fair, ReLU)" in note for note in after.notes)


@pytest.mark.parametrize("part", [None, "tuning", "fair", "published", "pilot"])
def test_rows_of_a_single_part_never_crash(part):
    rows, _ = simulate(scorer(ALIKE))
    found = judge([r for r in rows if r["part"] == part])
    assert all(v.status == "inconclusive" for v in found.values())
    assert bool(found) == (part is not None)


def test_the_order_of_the_rows_does_not_matter_and_a_cell_measured_twice_counts_once():
    rows, _ = simulate(scorer(ALIKE))
    again = judge([*reversed(rows), *rows])
    for claim, verdict in judge(rows).items():
        assert again[claim] == verdict


def test_diverged_runs_are_counted():
    rows, _ = simulate(scorer(ALIKE, sd=0.0001))
    for row in rows:
        if (row["part"], row["activation"], row["norm"], row["seed"]) == ("fair", "relu", "bn", 1):
            row["diverged"] = True
    assert any("diverged" in n and n.endswith(": 1.") for n in judge(rows)["act-all"].notes)


def test_figures_show_both_arms_of_every_activation():
    rows, _ = simulate(scorer(ALIKE))
    figures = {f["id"]: f for f in activations.figures(rows)}
    assert list(figures) == [
        "activations-fair",
        "activations-published-0-01",
        "activations-published-0-0001",
        "activations-tuning",
        "activations-fig-4",
    ]
    again = figures.pop("activations-fig-4")  # the published figure, a panel for each rate
    assert len(again["panels"]) == 2 * len(activations.NAMES)
    for key, figure in figures.items():
        assert [p["title"] for p in figure["panels"]] == list(activations.NAMES.values())
        for panel in figure["panels"]:
            assert [s["style"] for s in panel["series"]] == ["bn", "none"]
            for series in panel["series"]:
                assert series["n"] == (2 if key == "activations-tuning" else 5)
                for lo, y, hi in zip(series["lo"], series["y"], series["hi"], strict=True):
                    assert 0 <= lo <= y <= hi <= 100
        assert "ReLU" in figure["alt"]


def test_the_whole_experiment_runs_on_the_digits():
    rows, done = [], set()
    while True:
        wanted = activations.cells("tiny", "digits", 1, rows)
        new = [c for c in wanted if (json.dumps(c.arm), c.seed) not in done]
        if not new:
            break
        for cell in new:
            done.add((json.dumps(cell.arm), cell.seed))
            head = {**cell.arm, "seed": cell.seed, "budget": "tiny", "data": "digits"}
            measured = activations.measure(cell.arm, cell.seed, "tiny", DIGITS)
            rows += [{**head, **row} for row in measured]
    assert len(done) == 40 + 10 + 20
    found = judge(rows)
    assert set(found) == set(activations.CLAIMS)
    assert found["act-all"].status == "demo"
