"""gb.gap: the train/eval gap and its parts, against a second computation by plain loops."""

import copy
import math

import pytest
import torch
from torch import nn

import gammabeta as gb
from tests.networks import batch_for, densenet_like, mobilenet_like, resnet_like

EPS = 1e-5
CAUSES = ("lag", "stale", "domain", "bessel", "dropout", "noise")
PARTS = {  # what each test plants -> the causes that may explain it
    "lag": {"lag"},
    "moved": {"lag"},
    "stale": {"stale"},
    "domain": {"domain"},
    "dropout": {"dropout"},
}


class FixedDropout(nn.Module):
    """Drops every second value in training mode: the variance of dropout, without its chance."""

    def forward(self, x):
        return x * kept(x) if self.training else x


def kept(x):
    return 2.0 * ((torch.arange(len(x))[:, None] + torch.arange(x.shape[1])) % 2).to(x.dtype)


def network(norm=nn.BatchNorm1d, dropout=False, depth=3, width=6, **keywords):
    torch.manual_seed(3)
    layers = []
    for i in range(depth):
        layers += [nn.Linear(4 if i == 0 else width, width, bias=False)]
        layers += [FixedDropout()] if dropout else []
        layers += [norm(width, **keywords), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 3)).double()
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.BatchNorm1d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return model


def data(n, size=16, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(size, 4, dtype=torch.float64, generator=generator) + shift
        for _ in range(n)
    ]


def settle(model, batches):
    """Let the running averages become those of the batches."""
    model.train()
    momenta = {}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            momenta[module], module.momentum = module.momentum, None
            module.reset_running_stats()
    for x in batches:
        model(x)
    for module, momentum in momenta.items():
        module.momentum = momentum
    return model


# -- the second computation: loops over channels and samples, no module of the package -----------


class Slow:
    """The network above as plain arithmetic."""

    def __init__(self, model, batches, reference=None, earlier=None):
        self.weights = self.of(model.state_dict(), model)
        self.old = self.of(earlier, model) if earlier else None
        self.batches, self.reference = batches, reference
        self.count = [int(m.num_batches_tracked) for m in model if isinstance(m, nn.BatchNorm1d)]
        self.momentum = [m.momentum for m in model if isinstance(m, nn.BatchNorm1d)]
        self.biased = [getattr(m, "stored_variance", "") == "biased" for m in model]
        self.biased = any(self.biased)

    @staticmethod
    def of(state, model):
        found = []
        for name, module in model.named_children():
            if isinstance(module, nn.Linear):
                found.append(("linear", state[f"{name}.weight"], state.get(f"{name}.bias", 0.0)))
            elif isinstance(module, nn.BatchNorm1d):
                keys = ("weight", "bias", "running_mean", "running_var")
                found.append(("norm", *(state[f"{name}.{key}"] for key in keys)))
            elif isinstance(module, FixedDropout):
                found.append(("drop",))
            else:
                found.append(("relu",))
        return found

    @staticmethod
    def moments(x):
        n = len(x)
        mean = torch.stack([sum(x[i, c] for i in range(n)) / n for c in range(x.shape[1])])
        square = torch.stack(
            [sum((x[i, c] - mean[c]) ** 2 for i in range(n)) for c in range(x.shape[1])]
        )
        return mean, square

    def run(self, x, statistics="batch", drop=False, weights=None, seen=None):
        """Outputs of all normalizations and of the model."""
        outputs, number = [], 0
        for kind, *values in weights or self.weights:
            if kind == "linear":
                x = x @ values[0].T + values[1]
            elif kind == "relu":
                x = x.clamp(min=0)
            elif kind == "drop":
                x = x * kept(x) if drop else x
            else:
                mean, square = self.moments(x)
                if seen is not None:
                    seen.append((mean, square, len(x)))
                var = square / len(x)
                if statistics != "batch":
                    mean, var = statistics[number]
                x = (x - mean) / (var + EPS) ** 0.5 * values[0] + values[1]
                outputs.append(x)
                number += 1
        return [*outputs, x]

    def average(self, batches, drop, biased=False, weights=None):
        total = None
        for x in batches:
            seen = []
            self.run(x, drop=drop, weights=weights, seen=seen)
            new = [(m, s / (n if biased or self.biased else n - 1)) for m, s, n in seen]
            total = (
                new
                if total is None
                else [(a + c, b + d) for (a, b), (c, d) in zip(total, new, strict=True)]
            )
        return [(a / len(batches), b / len(batches)) for a, b in total]

    def path(self, fold):
        """(cause, statistics) in order, for the batches of one fold."""
        others = self.batches[1 - fold :: 2]
        actual = [tuple(values[2:]) for kind, *values in self.weights if kind == "norm"]
        trained = others if self.reference is None else self.reference
        before = self.average(trained, True)
        first = self.average(trained, True, weights=self.old) if self.old else before
        started = []
        for (mean, var), goal, count, momentum in zip(
            actual, first, self.count, self.momentum, strict=True
        ):
            left = 0.0 if momentum is None else (1 - momentum) ** count
            new = (mean / (1 - left), (var - left) / (1 - left)) if 0 < left < 1 else (mean, var)

            def away(held, goal=goal):
                scale = goal[1] + EPS
                a = (held[0] - goal[0]) ** 2 / scale
                return float((a + ((held[1] - goal[1]) / scale) ** 2).sum())

            good = bool((new[1] >= 0).all()) and left > 1e-6 and away(new) < away((mean, var))
            started.append(new if good else (mean, var))
        steps = [("", actual), ("lag", started), ("stale", first)]
        if self.old:
            steps.append(("lag", before))
        if self.reference is not None:
            steps.append(("domain", self.average(others, True)))
        steps.append(("bessel", self.average(others, True, biased=True)))
        return [*steps, ("dropout", self.average(others, False, biased=True))]

    def rows(self):
        sums = {}
        paths = [self.path(0), self.path(1)]
        for number, x in enumerate(self.batches):
            goals = self.run(x)
            states = [(cause, self.run(x, s)) for cause, s in paths[number % 2]]
            for layer, goal in enumerate(goals):
                row = sums.setdefault(layer, {"square": 0.0, "spread": 0.0})
                away = states[0][1][layer] - goal
                row["square"] += float((away**2).sum())
                row["spread"] += float(((goal - goal.mean(0)) ** 2).sum())
                values = [y[layer] for _, y in states] + [goal]
                causes = [cause for cause, _ in states[1:]] + ["noise"]
                for cause, a, b in zip(causes, values[:-1], values[1:], strict=True):
                    row[cause] = row.get(cause, 0.0) + float(((a - b) * away).sum())
        result = []
        for row in sums.values():
            unit = (row["square"] * row["spread"]) ** 0.5
            parts = {c: row[c] / unit for c in CAUSES if c in row}
            result.append(((row["square"] / row["spread"]) ** 0.5, parts))
        return result


def planted(what, norm=nn.BatchNorm1d):
    """(model, batches, keywords) with one cause for the gap."""
    keywords = {}
    batches = data(40, seed=5)
    if what == "lag":
        model = network(norm).train()
        for x in data(2, size=256, seed=1):  # 0.81 of the average is still 0 and 1
            model(x)
    elif what in ("moved", "stale"):
        model = settle(network(norm), data(200, seed=1))
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for module in model:
                if isinstance(module, nn.Linear):
                    module.weight += 0.3 * torch.randn_like(module.weight)
        if what == "moved":
            keywords["earlier"] = before
    elif what == "domain":
        model = settle(network(norm), data(200, seed=1))
        batches = data(40, seed=5, scale=2.0, shift=1.0)
        keywords["reference"] = data(40, seed=9)
    elif what == "dropout":
        model = settle(network(norm, dropout=True), data(200, seed=1))
    else:
        model = settle(network(norm), data(200, seed=1))
    return model, batches, keywords


@pytest.mark.parametrize("what", [*PARTS, "healthy"])
def test_the_gap_and_its_parts_are_those_of_plain_loops_in_float64(what):
    model, batches, keywords = planted(what)
    table = gb.gap(model, batches[:10], **keywords)
    slow = Slow(model, batches[:10], **keywords).rows()
    for row, (size, parts) in zip([*table, table.output], slow, strict=True):
        assert row.gap == pytest.approx(size, rel=1e-8)
        assert list(row.parts) == list(parts)
        for cause, part in parts.items():
            assert row.parts[cause] == pytest.approx(part, abs=1e-8), (row.name, cause)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, gb.BatchNorm1d])
@pytest.mark.parametrize("what", PARTS)
def test_a_planted_cause_is_found_and_no_other(what, norm):
    model, batches, keywords = planted(what, norm)
    table = gb.gap(model.eval(), batches, **keywords)
    for row in [*table, table.output]:
        others = {c: p for c, p in row.parts.items() if c not in (*PARTS[what], "noise")}
        assert {row.cause} == PARTS[what], table
        assert row.parts[row.cause] > 0.15
        assert max(map(abs, others.values())) < 0.15 * row.parts[row.cause], table


@pytest.mark.parametrize("what", [*PARTS, "healthy"])
def test_the_parts_sum_to_the_gap(what):
    model, batches, keywords = planted(what)
    table = gb.gap(model, batches[:6], **keywords)
    for row in [*table, table.output]:
        assert sum(row.parts.values()) == pytest.approx(row.gap, rel=1e-10)
        assert ("domain" in row.parts) == ("reference" in keywords)


@pytest.mark.parametrize("what", PARTS)
def test_calibration_cures_every_cause_but_noise(what):
    model, batches, _ = planted(what)
    assert gb.gap(model, batches).output.systematic > 0.15
    gb.calibrate(model, data(40, seed=11) if what != "domain" else batches)
    after = gb.gap(model, batches).output
    assert after.systematic < 0.1
    assert after.cause == "noise"


def test_the_factor_m_by_m_minus_1_compounds_over_layers():
    """Twenty layers at 64 values: eval mode is (63/64)^10 = 0.854 of training mode."""
    model = nn.Sequential(*(nn.BatchNorm1d(50) for _ in range(20))).double()
    torch.manual_seed(0)
    batches = torch.randn(60 * 64, 50, dtype=torch.float64).split(64)
    settle(model, batches[:30])
    table = gb.gap(model, batches[30:])
    for depth, row in enumerate(table, start=1):
        lost = 1 - (63 / 64) ** (depth / 2)
        bessel = math.sqrt(max(0.0, row.gap * row.parts["bessel"]))
        assert bessel == pytest.approx(lost, abs=0.02), row
    assert table[-1].cause in ("bessel", "noise")
    assert table[-1].systematic == pytest.approx(1 - (63 / 64) ** 10, abs=0.01)


def test_with_a_stored_variance_that_is_biased_the_factor_has_no_part():
    model = settle(network(gb.BatchNorm1d, stored_variance="biased"), data(100, size=6, seed=1))
    batches = data(10, size=6, seed=5)
    table = gb.gap(model, batches)
    assert all(row.parts["bessel"] == 0 for row in table)
    slow = Slow(model, batches).rows()
    assert [row.gap for row in table] == pytest.approx([size for size, _ in slow[:-1]], rel=1e-8)


def test_chance_is_not_taken_for_a_cause():
    """Statistics of other samples than those looked at: the systematic part has mean zero."""
    model, _, _ = planted("healthy")
    gb.calibrate(model, data(400, seed=21))
    squares = []
    for seed in range(40):
        row = gb.gap(model, data(4, seed=100 + seed))[0]
        squares.append(row.gap * (row.gap - row.parts["noise"]) / row.gap**2)
    mean = sum(squares) / len(squares)
    error = (sum((s - mean) ** 2 for s in squares) / len(squares) / (len(squares) - 1)) ** 0.5
    assert abs(mean) < 3 * error
    assert abs(mean) < 0.15


def test_frozen_layers_have_no_gap_of_their_own():
    model, batches, _ = planted("stale", gb.BatchNorm1d)
    assert gb.gap(model, batches)[0].gap > 0.2
    gb.freeze(model)
    table = gb.gap(model, batches)
    assert all(row.gap == 0 and row.cause == "" for row in [*table, table.output])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [resnet_like, mobilenet_like, densenet_like])
def test_nothing_of_the_model_changes(make, training):
    model = make(norm="gb").train(training)
    before = copy.deepcopy(model.state_dict())
    ids = {name: (id(b), b._version) for name, b in model.named_buffers()}
    flags = [module.training for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    random = torch.get_rng_state()
    gb.gap(model, [batch_for(model, 16, seed) for seed in range(2)])
    with pytest.raises(ZeroDivisionError):
        gb.gap(model, [batch_for(model, 16)] * 2, forward=lambda m, b: m(b[0]) / (1 // 0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {name: (id(b), b._version) for name, b in model.named_buffers()} == ids
    assert [module.training for module in model.modules()] == flags
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)


def test_statistics_that_are_not_finite_make_an_infinite_gap():
    model, batches, _ = planted("healthy")
    model[1].running_mean[0] = math.nan
    row = gb.gap(model, batches)[0]
    assert row.gap == math.inf
    assert (row.cause, row.systematic) == ("stale", math.inf)
    assert "inf" in str(gb.gap(model, batches))


@pytest.mark.parametrize(
    "kind", [gb.BatchRenorm1d, gb.GhostBatchNorm1d, gb.DecorrelatedBatchNorm1d]
)
def test_methods_beside_batch_normalization_have_rows_too(kind):
    torch.manual_seed(0)
    ghosts = {"virtual_batch_size": 8} if kind is gb.GhostBatchNorm1d else {}
    model = nn.Sequential(
        nn.Linear(4, 6), kind(6, **ghosts), nn.Linear(6, 6), gb.BatchNorm1d(6)
    ).double()
    table = gb.gap(settle(model, data(30, 32)), data(4, 32))
    assert [row.name for row in table] == ["1", "3"]
    for row in table:
        assert sum(row.parts.values()) == pytest.approx(row.gap, rel=1e-10)


def test_a_compiled_model_is_looked_at_inside():
    model, batches, _ = planted("stale")
    plain = gb.gap(model, batches)
    compiled = gb.gap(torch.compile(model, backend="aot_eager"), batches)
    assert [row.gap for row in compiled] == [row.gap for row in plain]


def test_outputs_need_not_be_one_tensor():
    model, batches, _ = planted("stale")
    plain = gb.gap(model, batches)
    named = gb.gap(model, [{"x": x} for x in batches], forward=lambda m, b: {"y": [m(b["x"]), 3]})
    assert named.output.gap == plain.output.gap
    silent = gb.gap(model, batches, forward=lambda m, b: (m(b), None)[1])
    assert silent.output is None
    assert [row.gap for row in silent] == [row.gap for row in plain]


def test_a_head_that_runs_in_training_alone_is_left_out():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = planted("stale")[0], nn.BatchNorm1d(3).double()

        def forward(self, x):
            y = self.body(x)
            return {"main": y[:, :2], "head": self.head(y)} if self.training else {"main": y}

    table = gb.gap(Auxiliary().train(), data(4))
    assert [row.name for row in table] == ["body.1", "body.4", "body.7"]
    assert table.output == gb.gap(planted("stale")[0], data(4)).output


def test_the_table_is_at_most_80_wide_and_tells_the_cure():
    model, batches, keywords = planted("domain")
    long = nn.Sequential()
    long.add_module("a_rather_long_name_for_a_module_that_is_wrapped_many_times", model)
    text = str(gb.gap(long, batches, **keywords))
    assert max(map(len, text.splitlines())) <= 80
    assert "domain: gb.calibrate(model, batches)" in text
    assert "….".replace(".", "") in text
    assert "-0.0" not in text


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda m, x: gb.gap(m, x[:1]), ValueError, "at least two batches, got 1"),
        (lambda m, x: gb.gap(nn.Linear(4, 2), x), ValueError, "expected a model with batch"),
        (lambda m, x: gb.gap(m, x, earlier={"w": x[0]}), ValueError, "earlier must hold"),
        (lambda m, x: gb.gap(m, x, forward=lambda m, b: b), ValueError, "Pass forward="),
        (lambda m, x: gb.gap(m, [b[:1] for b in x]), ValueError, "more than 1 value per channel"),
        (lambda m, x: gb.gap(m, [*x, x[0][:1]]), ValueError, r"layer 1 for batches\[40\]"),
        (lambda m, x: gb.gap(m, [*x, x[0][:0]]), ValueError, r"batches\[40\] with an empty"),
        (lambda m, x: gb.gap(m, torch.cat(x)), ValueError, r"list of batches: x.split\(32\)"),
        (lambda m, x: gb.gap(m, [*x, x[0] * math.nan]), ValueError, r"Inf in batches\[40\]"),
        (
            lambda m, x: gb.gap(m, x, forward=lambda m, b: m(b) / 0),
            ValueError,
            r"the output of layer \(output\) for batches\[0\]",
        ),
        (lambda m, x: gb.gap(len, x), TypeError, "must be a torch.nn.Module"),
        (
            lambda m, x: gb.gap(nn.Sequential(gb.LazyBatchNorm1d()), x),
            ValueError,
            "Run one batch through the model first",
        ),
    ],
)
def test_a_wrong_input_is_answered_by_what_to_do(call, kind, words):
    model, batches, _ = planted("healthy", gb.BatchNorm1d)
    with pytest.raises(kind, match=words):
        call(model, batches)
