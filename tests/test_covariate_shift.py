"""The experiment on covariate shift: what it looks at, asks for, and concludes."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn.functional import cross_entropy

from gammabeta.studies import _data, covariate_shift
from gammabeta.studies._claims import claims
from gammabeta.studies._covariate_shift import deep, exact, inputs, linear
from gammabeta.studies._covariate_shift.contrasts import CONTROL
from gammabeta.studies._train import batches, fair_split, pixels, stream
from tests.simulated import judged, measured, noise, simulate

DIGITS = _data.load("digits")
X = torch.rand(64, 36, generator=stream(0, "x"))
Y = torch.randint(0, 10, (64,), generator=stream(0, "y"))
# the fields of an arm whose measurement is tried
FAIR = {"part": "fair", "group": "deep", "rate": 0.1}


def probed(arm):
    net = deep.deep(36, arm, 3)
    return net, deep.one_step(net, nn.CrossEntropyLoss(), (X, Y), 0.2)


# -- the networks -----------------------------------------------------------------------------


def test_all_arms_start_from_the_same_weights():
    nets = {arm: deep.deep(36, arm, 3) for arm in ("none", "bn", "noisy", "noise", "frozen")}
    weights = {
        arm: [m.weight for m in net.layers if isinstance(m, nn.Linear)] for arm, net in nets.items()
    }
    assert [w.shape[0] for w in weights["none"]] == [100] * 5 + [10]
    for each in weights.values():
        assert all(torch.equal(a, b) for a, b in zip(each, weights["none"], strict=True))
    kinds = {arm: [type(m).__name__ for m in net.layers[:4]] for arm, net in nets.items()}
    assert kinds["noisy"] == ["Linear", "BatchNorm1d", "Noise", "ReLU"]
    assert kinds["noise"][:3] == ["Linear", "Noise", "ReLU"]
    assert nets["noise"].layers[0].bias is not None
    assert nets["frozen"].layers[1].weight is None
    assert deep.deep(36, "bn", 3, width=0.5).layers[0].weight.shape[0] == 50


def test_noise_is_that_of_the_source():
    layer = deep.Noise(stream(0, "noise"))
    zeros = torch.stack([layer(torch.zeros(400, 50)) for _ in range(20)])
    centers = zeros.mean(1)  # of each batch and unit
    assert centers.min() < -0.4
    assert centers.max() > 0.4
    assert abs(float(centers.mean())) < 0.05
    assert float((zeros - centers[:, None]).abs().max()) < 0.13
    gains = torch.stack([layer(torch.full((400, 50), 1e6)) / 1e6 for _ in range(20)])
    assert float(gains.mean(1).min()) > 0.97
    assert float(gains.mean(1).max()) < 1.28
    assert float((gains - gains.mean(1, keepdim=True)).std()) == pytest.approx(0.1, rel=0.02)
    assert torch.equal(layer.eval()(torch.ones(2, 3)), torch.full((2, 3), 1.125))


def test_harder_images_are_half_the_size_and_depend_on_the_seed_alone():
    images = DIGITS.train_x[:20]
    one = deep.varied(images, "hard", 1, "test", 16)
    assert one.shape == (20, *(side // 2 for side in images.shape[1:]))
    assert one.dtype == torch.uint8
    assert torch.equal(one, deep.varied(images, "hard", 1, "test", 16))
    assert not torch.equal(one, deep.varied(images, "hard", 2, "test", 16))
    assert deep.varied(images, "plain", 1, "test", 16) is images


# -- what is looked at ------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["bn", "none"])
def test_gradients_turn_as_they_do_step_by_step(arm):
    net, step = probed(arm)
    parameters = dict(net.named_parameters())
    start = {name: p.detach().clone() for name, p in parameters.items()}
    linears = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]

    def gradient():
        return dict(zip(parameters, torch.autograd.grad(cross_entropy(net(X), Y),
                                                        list(parameters.values())),
                        strict=True))  # fmt: skip

    first, cosines = gradient(), []
    for layer in linears[1:]:
        own = [n for n in parameters if n.rpartition(".")[0] == layer]
        below = list(parameters)[: list(parameters).index(own[0])]
        with torch.no_grad():
            for name in below:
                parameters[name].sub_(first[name], alpha=0.2)
        second = gradient()
        with torch.no_grad():
            for name in below:
                parameters[name].copy_(start[name])
        a, b = (torch.cat([g[n].flatten() for n in own]).double() for g in (first, second))
        cosines.append(float(a @ b / (a.norm() * b.norm())))
    found = deep.turns(step, {"own": None})["turn_own"]
    assert found == pytest.approx(1 - np.median(cosines), abs=1e-5)
    assert found > 1e-4


@pytest.mark.parametrize("arm", ["bn", "none"])
def test_influence_and_shift_are_those_of_the_inputs_before_and_after(arm):
    net, step = probed(arm)
    sums = {}
    found = deep.alone(step, 0.01, sums)
    parameters = dict(net.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(cross_entropy(net(X), Y),
                                                         list(parameters.values())),
                         strict=True))  # fmt: skip
    linears = [m for m in net.layers if isinstance(m, nn.Linear)]
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)]

    def received():
        seen, hooks = [], []
        for layer in linears:
            hooks.append(layer.register_forward_hook(lambda _, x, __: seen.append(x[0].detach())))
        with torch.no_grad():
            net(X)
        for hook in hooks:
            hook.remove()
        return [x.double().numpy() for x in seen]

    def move(chosen):
        by_layer = {}
        for n in chosen:
            by_layer.setdefault(n.rpartition(".")[0], []).append(n)
        with torch.no_grad():
            for group in by_layer.values():
                size = math.sqrt(sum(float(parameters[n].square().sum()) for n in group))
                length = math.sqrt(sum(float(gradients[n].square().sum()) for n in group))
                for n in group:
                    parameters[n].sub_(gradients[n], alpha=0.01 * size / length)

    start = {name: p.detach().clone() for name, p in parameters.items()}

    def restore():
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(start[n])

    before = received()
    moments, turned = [], []
    for k, name in enumerate(names[:-1]):
        move([n for n in parameters if n.rpartition(".")[0] == name])
        after = received()
        restore()
        moved, changed = [], []
        for place in range(k + 1, 6):
            a, b = before[place], after[place]
            counted = (a.std(0) > 0) | (b.std(0) > 0)
            with np.errstate(divide="ignore", invalid="ignore"):
                sizes = np.abs(b.mean(0) - a.mean(0)) / a.std(0)
                widths = np.abs(np.log(b.std(0) / a.std(0)))
                r, s = (np.nan_to_num(np.corrcoef(v.T)) for v in (a, b))
            moved.append(np.median(sizes[counted]) + np.median(widths[counted]))
            changed.append(np.linalg.norm(s - r) / np.linalg.norm(r))
        moments.append(np.mean(moved))
        turned.append(np.mean(changed))
        assert sums[k + 1, 6] == [pytest.approx(moved[-1], rel=0.02)]
    assert found["moments"] == pytest.approx(np.mean(moments), rel=0.02)
    assert found["correlations"] == pytest.approx(np.mean(turned), rel=0.02)
    assert ("affine" in found) == (arm == "bn")
    move(parameters)
    after = received()
    restore()
    shifts = []
    for a, b in zip(before[1:], after[1:], strict=True):
        each = [wasserstein_distance(a[:, u], b[:, u]) / a[:, u].std()
                for u in range(100) if a[:, u].std() > 1e-6]  # fmt: skip
        shifts.append(np.sort(each)[(len(each) - 1) // 2])
    assert deep.joint_shift(step, 0.01) == pytest.approx(np.mean(shifts), rel=0.02)


@pytest.mark.parametrize("arm", ["bn", "none", "frozen"])
def test_inputs_of_layers_are_those_of_training_mode_and_nothing_changes(arm):
    net = deep.deep(36, arm, 3)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = deep.layer_inputs(net, X, stream(0, "look"))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    seen = []
    for layer in net.layers:
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    net.train()(X)
    for place, (x, _) in enumerate(seen, 1):
        torch.testing.assert_close(found[str(place)], x.detach().double().T.sort(1).values,
                                   atol=1e-5, rtol=1e-4)  # fmt: skip
    torch.testing.assert_close(found["last"], seen[-1][1].detach().double().T.sort(1).values,
                               atol=1e-5, rtol=1e-4)  # fmt: skip


def test_a_look_takes_no_draw_of_the_trainings_noise():
    net = deep.deep(36, "noisy", 3)
    first = next(m for m in net.layers if isinstance(m, deep.Noise))
    state = first.draw.get_state()
    looks = [deep.layer_inputs(net, X, stream(0, f"look {k}"))["1"] for k in (1, 1, 2)]
    assert torch.equal(first.draw.get_state(), state)
    assert torch.equal(looks[0], looks[1])
    assert not torch.equal(looks[0], looks[2])


def test_drift_is_the_wasserstein_distance_and_shape_knows_no_moments():
    draw = np.random.default_rng(0)
    a, b = np.sort(draw.normal(size=(4, 300))), np.sort(draw.normal(1, 2, size=(4, 300)))
    found = deep._drift(torch.tensor(a), torch.tensor(b))
    spread = np.sqrt((a.var(1) + b.var(1)) / 2)
    each = [wasserstein_distance(*pair) for pair in zip(a, b, strict=True)]
    assert found["drift"] == pytest.approx(np.mean(each / spread))
    moved = np.abs(a.mean(1) - b.mean(1)) + np.abs(a.std(1) - b.std(1))
    assert found["moments"] == pytest.approx(np.mean(moved / spread))
    assert deep._drift(torch.tensor(a), torch.tensor(3 * a + 2))["shape"] < 1e-9
    constant = torch.ones(2, 10, dtype=torch.float64)
    assert deep._drift(constant, constant) == {"drift": 0, "moments": 0, "shape": 0}
    assert deep._drift(constant, constant * math.nan)["drift"] == 1e6


def test_sums_over_the_steps_end_at_the_target():
    steps, losses = [1, 2, 4, 8], [3.0, 2.0, 1.0, 0.9]
    assert deep.integrals(steps, losses, [2.0] * 4, 1.0) == pytest.approx((3.0, 4.0))
    assert deep.integrals(steps, losses, [2.0] * 4, 1.5) == pytest.approx((4 / 1.5, 3.0))
    assert deep.integrals(steps, losses, [2.0] * 4, 0.5) is None
    assert deep.integrals(steps, losses, [2.0] * 4, 3.5) is None


def test_a_cell_trains_as_plain_pytorch_does_and_looking_changes_nothing():
    x, y, test_x, test_y = fair_split(DIGITS, 3, "test")
    net = deep.deep(64, "bn", 3)
    update = torch.optim.SGD(net.parameters(), lr=0.1)
    for index in itertools.islice(batches(1000, 128, stream(3, "order")), 10):
        update.zero_grad()
        cross_entropy(net(pixels(x[index], 16)), y[index]).backward()
        update.step()
    share = (net.eval()(pixels(test_x, 16)).argmax(1) == test_y).double().mean().item()
    rows = measured(covariate_shift, [{**FAIR, "arm": "bn"}], DIGITS, [3])
    last = next(r for r in rows if r.get("step") == 10)
    assert last["accuracy"] == pytest.approx(share, abs=0.0041)
    assert {"turn_relative", "shift_own", "moments_own", "correlations_relative",
            "fixed_loss"} <= last.keys()  # fmt: skip
    assert sum("drift" in r for r in rows) == 9
    assert sum(r["kind"] == "influence" for r in rows) == 15


def test_frozen_moments_do_not_drift_and_shapes_do():
    rows = measured(covariate_shift, [{**FAIR, "arm": "frozen"}], DIGITS, [0])
    assert max(r["drift_moments"] for r in rows if "drift" in r) < 1e-4
    assert min(r["drift_shape"] for r in rows if "drift" in r) > 1e-3


@pytest.mark.parametrize("norm", [True, False])
def test_the_linear_network_halves_its_loss_in_the_steps_it_is_given(norm):
    rate, halved = linear.halving_rate(norm, 800, 600, 2000)
    assert halved
    descent = linear.descend(linear.network(norm, 800), linear.samples(800), rate)
    losses = list(itertools.islice(descent, 601))
    assert losses[-1] / losses[0] == pytest.approx(0.5, abs=0.05)
    x, y = linear.samples(800)
    fitted = x @ torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(fitted, y, atol=1e-4, rtol=1e-4)  # a linear map fits it


def test_inputs_change_as_they_should():
    draws = inputs.Changed("random", stream(0, "c"), 100, 10)
    found = torch.tensor([draws.now() for _ in range(2000)])
    assert found[:, 0].min() > 0.5
    assert found[:, 0].max() < 1.5
    torch.testing.assert_close(found.std(0), torch.full((2,), 0.5 / 3**0.5), rtol=0.05, atol=0)
    assert draws.eval().now() == (1.0, 0.0)
    slow = inputs.Changed("slow", stream(0, "c"), 100, 10)
    seen = [tuple(slow(torch.ones(1, 1)).flatten().tolist()) and slow.now() for _ in range(100)]
    assert seen[-1] == pytest.approx((2.0, 1.0))
    assert seen[-6] == pytest.approx((1.0, 0.0))
    assert seen[-11] == pytest.approx((2.0, 1.0))
    assert slow.eval().now() == (2.0, 1.0)
    assert torch.equal(slow(torch.ones(1, 1)), torch.full((1, 1), 3.0))
    assert inputs.Changed("final", stream(0, "c"), 100, 10).now() == (2.0, 1.0)
    assert inputs.Changed("clean", stream(0, "c"), 100, 10).now() == (1.0, 0.0)


def test_statistics_are_kept_by_halves():
    for row in exact.measure(1):
        allowed = 100 * 2.0**-52 * row["condition"]
        assert (row["error"] <= allowed) == (row["half"] == exact.MARGINAL)
        assert row["half"] == exact.MARGINAL or row["error"] > 1000 * allowed


# -- made-up rows -----------------------------------------------------------------------------

COLUMNS = ("shift", "turn", "moments", "correlations")


def answer(
    gain=1.0, noisy=1.0, drifted=2.0, outputs=0.5, drift=0.5, lost=(1.0, 1.0), turned=0.2,
    linear_turned=0.2, own_turned=0.2, sd=0.02, joint=1e-3, marginal=1e-16, best=0.3, **ratios
):  # fmt: skip
    """BN is so many points better; shifts without BN are ``ratios`` times those with it."""
    logs = dict.fromkeys(COLUMNS, 2.0) | ratios

    def rows(cell, seed):
        arm, rate, part = cell["arm"], cell["rate"], cell["part"]
        jitter = noise(seed, arm, rate, part, sd=sd)
        if part == "exact":
            head = {"kind": "check", "condition": 10.0, "before": 1.0, "after": 2.0}
            return [
                {**head, "half": exact.MARGINAL, "compared": "mean", "error": marginal},
                {**head, "half": exact.JOINT, "compared": "correlations", "error": joint},
            ]
        run = {"kind": "run", "diverged": False}
        base = 0.1 * math.exp(jitter)
        if cell["group"] == "linear":
            turn = base + (linear_turned if arm == "bn" else 0)
            own = base + (own_turned if arm == "bn" else 0)
            head = {**run, "rate_found": 1e-4, "halved": True, "turn_own": own}
            return [{**head, "step": s, "turn_relative": turn} for s in (1, 10)]
        if part == "published":
            turn = base + (own_turned if arm == "bn" else 0)
            return [{**run, "step": s, "turn_own": turn} for s in (1, 10)]
        points = {"bn": gain, "noisy": noisy, "noise": -20, "random": -lost[0], "slow": -lost[1]}
        share = 90 - abs(math.log(rate / best)) + points.get(arm, 0.0) + jitter
        found = [{**run, "step": 1000 + k, "accuracy": share / 100} for k in range(3)]
        if part == "tuning" or cell["group"] == "inputs":
            return found
        sizes = {"bn": drift, "noisy": drifted}
        drifts = {
            "drift": sizes.get(arm, 1.0) * math.exp(jitter),
            "drift_outputs": (outputs if arm == "bn" else 1.0) * math.exp(jitter),
            "drift_moments": 0.1,
            "drift_shape": 0.1,
        }
        found += [{**run, "step": 10 * k, "batch_loss": 1.0, **(drifts if k else {})}
                  for k in range(10)]  # fmt: skip
        if arm in ("none", "bn"):
            look = {}
            for name in COLUMNS:
                size = math.exp(noise(seed, arm, name, part, sd=sd))
                look[f"{name}_relative"] = 0.1 * size * (logs[name] if arm == "none" else 1)
                look[f"{name}_own"] = look[f"{name}_relative"]
            if "turn" not in ratios:
                look["turn_relative"] = base + (turned if arm == "bn" else 0)
            look["affine_relative"] = 0.1
            losses = (2.5, 1.0, 0.4)
            found += [{**run, "step": 3 * k + 1, **look, "fixed_loss": losses[k]}
                      for k in range(3)]  # fmt: skip
            found.append({"kind": "influence", "from": 1, "to": 2, "shift": 0.1})
        return found

    return rows


def verdicts(**kwargs):
    options = {key: kwargs.pop(key) for key in ("data", "budget", "seeds") if key in kwargs}
    rows, _ = simulate(covariate_shift, answer(**kwargs), **options)
    return judged(covariate_shift, rows)


@pytest.mark.parametrize(
    ("claim", "changes", "status"),
    [
        ("ics-reduced", {"turn": 2.0}, "supported"),
        ("ics-reduced", {"shift": 1.0, "turn": 1.0}, "refuted"),
        ("ics-reduced", {"turn": 0.2}, "mixed"),
        ("ics-reduced", {"turn": 2.0, "sd": 2.0}, "inconclusive"),
        ("ics-reduced", {"turn": 2.0, "gain": 0.0}, "inconclusive"),
        ("cross-layer-stats", {"moments": 3.0, "correlations": 3.0}, "supported"),
        ("cross-layer-stats", {"moments": 3.0, "correlations": 1.0}, "mixed"),
        ("cross-layer-stats", {"moments": 1.5, "correlations": 1.0}, "refuted"),
        ("cross-layer-stats", {"moments": 2.0, "correlations": 2.0, "sd": 2.0}, "inconclusive"),
        ("cross-layer-stats", {"moments": 3.0, "correlations": 3.0, "gain": 0.0}, "inconclusive"),
        ("noisy-bn", {}, "supported"),
        ("noisy-bn", {"noisy": 0.1}, "refuted"),
        ("noisy-bn", {"drifted": 0.5}, "refuted"),
        ("noisy-bn", {"gain": 0.0}, "inconclusive"),
        ("noisy-bn", {"noisy": 0.3, "sd": 1.0, "gain": 5.0}, "inconclusive"),
        ("keep-consistent", {}, "refuted"),
        ("keep-consistent", {"noisy": 0.1}, "supported"),
        ("keep-consistent", {"noisy": 0.1, "drifted": 0.5}, "inconclusive"),
        ("keep-consistent", {"drifted": 0.5}, "inconclusive"),
        ("keep-consistent", {"noisy": 0.1, "gain": 0.0}, "inconclusive"),
        ("ics-gradient", {}, "supported"),
        ("ics-gradient", {"turned": 0.05, "linear_turned": 0.0}, "refuted"),
        ("ics-gradient", {"turned": 0.05}, "mixed"),
        ("ics-gradient", {"turned": 0.1, "linear_turned": 0.1, "sd": 1.0}, "inconclusive"),
        ("gamma-beta-shift", {}, "supported"),
        ("gamma-beta-shift", {"outputs": 0.02}, "refuted"),
        ("gamma-beta-shift", {"outputs": 0.1}, "inconclusive"),
        ("not-reduce-shift", {"drift": 2.0}, "supported"),
        ("not-reduce-shift", {"drift": 0.5}, "mixed"),
        ("not-reduce-shift", {"drift": 0.5, "turned": 0.0}, "refuted"),
        ("not-reduce-shift", {"drift": 1.2, "turned": 0.1, "sd": 1.0}, "inconclusive"),
        ("stats-by-gamma-beta", {}, "mixed"),
        ("stats-by-gamma-beta", {"marginal": 1e-3}, "fails"),
        ("stats-by-gamma-beta", {"joint": 1e-16}, "exact"),
        ("stats-by-gamma-beta", {"joint": 1e-11}, "inconclusive"),
        ("constant-dist", {}, "supported"),
        ("constant-dist", {"lost": (0.0, 0.0)}, "refuted"),
        ("constant-dist", {"lost": (1.0, 0.0)}, "mixed"),
        ("constant-dist", {"lost": (0.5, 0.5), "sd": 4.0}, "inconclusive"),
    ],
)  # fmt: skip
def test_each_verdict_can_be_reached(claim, changes, status):
    found = verdicts(**changes)[claim]
    assert found.status == status
    opening = {
        "supported": "Yes: ",
        "refuted": "No: ",
        "mixed": "In part: ",
        "inconclusive": "Undecided: ",
        "fails": "It fails: ",
        "exact": "Exact: ",
    }[status]
    assert found.sentence.startswith(opening)


def test_as_published_the_own_steps_decide():
    assert verdicts()["ics-gradient"].published_status == "supported"
    found = verdicts(own_turned=0.0)["ics-gradient"]
    assert (found.status, found.published_status) == ("supported", "refuted")
    part = [c for c in found.cells if c["part"].startswith("published")]
    assert len(part) == 3
    assert verdicts()["noisy-bn"].published_status is None


def test_the_effect_is_that_of_the_primary_contrast_and_the_control_stands_beside():
    found = verdicts(moments=3.0, correlations=8.0)["cross-layer-stats"]
    assert found.effect == pytest.approx(math.log(3), abs=0.03)
    found = verdicts(moments=8.0, correlations=3.0)["cross-layer-stats"]
    assert found.effect == pytest.approx(math.log(8), abs=0.03)
    assert found.half_width < found.delta / 2
    assert found.planned_half_width < found.delta / 2
    assert found.n >= 8
    (control,) = (c for c in found.cells if c["part"] == "control")
    assert (control["name"], control["status"]) == (CONTROL, "supported")


def test_between_its_bounds_the_ratio_of_drifts_is_open_in_its_cell_too():
    found = verdicts(outputs=0.1)["gamma-beta-shift"]
    (cell,) = (c for c in found.cells if c["part"] == "fair")
    assert cell["status"] == "inconclusive"
    assert cell["reason"] == "not below 0.05"


def test_a_loss_that_is_not_reached_is_told_and_leaves_its_levels_open():
    def rows(cell, seed):
        found = answer(turn=2.0)(cell, seed)
        return [r | ({"fixed_loss": 1.0} if "fixed_loss" in r else {}) for r in found]

    found = judged(covariate_shift, simulate(covariate_shift, rows)[0])["ics-reduced"]
    assert found.status == "inconclusive"
    assert any("Did not reach the loss of 0.5 (none): 16" in note for note in found.notes)


def test_pilots_give_the_seeds_and_serve_nothing_else():
    rows, asked = simulate(covariate_shift, answer())
    main = [c for c in asked if c.arm["part"] == "fair"]

    def seeds(arm, group="deep"):
        return {c.seed for c in main if (c.arm["group"], c.arm["arm"]) == (group, arm)}

    assert seeds("bn") == seeds("none") == seeds("noisy") == set(range(8))
    assert seeds("noise") == seeds("frozen") == set(range(5))
    assert seeds("bn", "linear") == seeds("random", "inputs") == set(range(5))
    assert {c.seed for c in asked if c.arm["part"] == "pilot"} == {900, 901, 902, 903}
    effects = {v.claim: v.effect for v in judged(covariate_shift, rows).values()}
    without = [r for r in rows if r["part"] != "pilot"]
    assert {v.claim: v.effect for v in judged(covariate_shift, without).values()} == effects
    _, asked = simulate(covariate_shift, answer(sd=1.0))
    assert max(c.seed for c in asked if c.arm["part"] == "fair") == 15


def test_rates_are_chosen_alike_and_shown_arms_borrow_theirs():
    wanted = covariate_shift.cells("small", "mnist", None, [])
    assert sum(c.arm["part"] == "tuning" for c in wanted) == (3 + 4) * 6 * 2
    assert not any(c.arm["part"] == "fair" for c in wanted)
    _, asked = simulate(covariate_shift, answer(best=3.0))
    main = [c.arm for c in asked if c.arm["part"] == "fair" and c.arm["group"] != "linear"]
    assert {a["rate"] for a in main} == {3.0}
    grid = {c.arm["rate"] for c in asked if c.arm["part"] == "tuning"}
    assert max(grid) == 10.0


def test_missing_runs_leave_the_verdicts_open():
    rows, _ = simulate(covariate_shift, answer())
    for part in ("tuning", "pilot", "published"):
        found = judged(covariate_shift, [r for r in rows if r["part"] == part])
        assert {v.status for v in found.values()} == {"inconclusive"}
    lost = [r for r in rows if not (r["arm"] == "none" and r["part"] == "fair")]
    found = judged(covariate_shift, lost)
    assert found["ics-reduced"].status == "inconclusive"
    assert covariate_shift.judge([]) == covariate_shift.figures([]) == []


def test_the_estimate_is_about_what_a_run_asks_for():
    expected = sum(c.cost for c in covariate_shift.expected("small", "mnist", None))
    _, asked = simulate(covariate_shift, answer())
    assert expected == pytest.approx(sum(c.cost for c in asked), rel=0.3)
    assert expected < 900


def test_digits_are_a_demonstration_and_tiny_decides_nothing():
    found = verdicts(data="digits")
    assert {v.status for c, v in found.items() if c != "stats-by-gamma-beta"} == {"demo"}
    found = verdicts(budget="tiny", seeds=8)
    assert {v.status for c, v in found.items() if c != "stats-by-gamma-beta"} == {"inconclusive"}


def test_the_whole_experiment_runs_on_the_digits():
    rows, asked = simulate(
        covariate_shift,
        lambda cell, seed: covariate_shift.measure(cell, seed, "tiny", DIGITS),
        "tiny",
        "digits",
    )
    assert len(asked) == 34
    found = judged(covariate_shift, rows)
    assert set(found) == set(covariate_shift.CLAIMS)
    owned = {i for i, claim in claims().items() if claim.experiment == "covariate-shift"}
    assert owned == set(covariate_shift.CLAIMS)
    influence = next(f for f in covariate_shift.figures(rows) if "influence" in f["id"])
    assert [panel["title"] for panel in influence["panels"]] == ["without", "with BN"]
    assert [len(panel["series"]) for panel in influence["panels"]] == [5, 5]


def test_robustness_variants_are_fields_of_the_arm():
    cell = {"part": "fair", "group": "deep", "arm": "none", "rate": 0.1}
    kinds = [cell, {**cell, "width": 0.5}, {**cell, "images": "hard"}]
    ends = [measured(covariate_shift, [arm], DIGITS, [0])[-1]["shift"] for arm in kinds]
    assert len(set(ends)) == 3
    other = {"part": "fair", "group": "inputs", "arm": "slow", "rate": 0.1}
    kinds = [other, {**other, "width": 2.0}, {**other, "images": "hard"}]
    ends = [measured(covariate_shift, [arm], DIGITS, [0])[-1]["accuracy"] for arm in kinds]
    assert all(0 <= share <= 1 for share in ends)
