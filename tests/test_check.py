"""gb.check: each rule fires on its defect and on nothing else, and its cure cures."""

import copy
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gammabeta as gb
from gammabeta._check import RULES
from gammabeta._check._page import explain, page
from gammabeta.cli import main
from gammabeta.probes._spread import Spread
from gammabeta.studies._data import load
from tests.networks import batch_for, densenet_like, mobilenet_like, resnet_like

PAGE = Path(__file__).resolve().parents[1] / "docs" / "check.md"
HEALTHY = [resnet_like, mobilenet_like, densenet_like]
NEEDS_BATCH = {"BN001", "BN003", "BN005", "BN006", "BN008", "BN009"}


def calibrated(make, norm):
    model = make(norm=norm)
    gb.calibrate(model, [batch_for(model, 64, seed) for seed in range(50, 70)])
    return model


@pytest.mark.parametrize("norm", ["nn", "gb"])
@pytest.mark.parametrize("make", HEALTHY)
def test_a_healthy_network_has_no_finding_before_training_and_after(make, norm):
    fresh = make(norm=norm)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    found = gb.check(fresh, batch_for(fresh, 64), optimizer, epoch=100)
    assert found == []
    assert set(found.skipped) == {"BN005"}
    done = calibrated(make, norm)
    for model in (done.train(), done.eval()):
        for n, seed in ((16, 2), (64, 2), (64, 3), (256, 4)):
            found = gb.check(model, batch_for(model, n, seed), epoch=100)
            assert found == [], found
            assert len(found.tried) == 10


@pytest.mark.parametrize("make", HEALTHY)
def test_a_network_in_the_middle_of_its_training_has_no_finding(make):
    model = make(norm="gb").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(model, batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    # after 60 steps 0.002 of the initial variance 1 is left, which is much where it is 0.001
    for seed in range(150):
        step(model, batch_for(model, 64, seed))
    found = gb.check(model, batch_for(model, 128, 99), optimizer, step=step, epoch=100)
    assert found == [], found
    assert len(found.tried) == 10


# -- one defect each ------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        x = x.requires_grad_() if self.reentrant else x
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def counted_twice(norm, reentrant=False):
    return Checkpointed(calibrated(resnet_like, "nn"), reentrant), {}


def counted_twice_reentrant(norm):
    return counted_twice(norm, True)


def accumulating(norm):
    model = calibrated(resnet_like, norm)
    if norm == "nn":
        model = gb.convert(model)

    def step(model, batch):
        for x in batch[0].split(32):
            model(x).square().mean().backward()

    return model, {"step": step}


def looking_elsewhere(norm):
    model = calibrated(resnet_like, norm)

    def step(model, batch):
        model(batch[0]).square().mean().backward()
        with torch.no_grad():
            model(batch[0] * 3)

    return model, {"step": step}


def backward(model, batch):
    model(batch[0]).square().mean().backward()


def left_in_eval(norm):
    return calibrated(resnet_like, norm).eval(), {"step": backward}


def frozen(norm):
    model = calibrated(resnet_like, norm)
    model.layers.requires_grad_(False)
    return model, {}


def left_out_of_the_optimizer(norm):
    model = calibrated(resnet_like, norm)
    return model, {"optimizer": torch.optim.SGD(model.fc.parameters(), lr=0.1)}


def deaf(norm):
    model = calibrated(resnet_like, norm)
    kind = type(model.bn1)
    model.bn1.__class__ = type("Stubborn", (kind,), {"train": lambda m, _=True: kind.train(m)})
    return model, {}


def validating_in_training(norm):
    def evaluate(model, batch):
        with torch.no_grad():
            return model.train()(batch[0])

    return calibrated(resnet_like, norm).eval(), {"evaluate": evaluate}


def poisoned(norm):
    model = calibrated(resnet_like, norm)
    model.layers[1].bn1.running_var[2] = math.inf
    return model, {}


def loaded_without_buffers(norm):
    model = calibrated(resnet_like, norm)
    model.layers[1].bn1.reset_running_stats()
    model.layers[1].bn2.num_batches_tracked += 1
    return model, {}


def never_seen(norm):
    return resnet_like(norm=norm).eval(), {}


def put_in_eval(norm):
    model = resnet_like(norm=norm).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model, {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def stale(norm):
    model = calibrated(resnet_like, norm)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5 * p.std() * torch.randn(p.shape, generator=torch.manual_seed(1)).double()
    return model, {}


def few(norm):
    model = calibrated(resnet_like, norm)
    return model, {"batch": batch_for(model, 3)}


def one(norm):
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)).double()
    gb.calibrate(model, [torch.randn(64, 4).double()])
    model = gb.convert(model) if norm == "gb" else model
    return model, {"batch": torch.randn(1, 4).double()}


def still_average(norm):
    model = calibrated(resnet_like, norm)
    model.bn1.momentum = 0.0
    return model, {}


def decay_for_momentum(norm):
    model = calibrated(resnet_like, norm)
    for layer in (model.bn1, model.layers[0].bn1):
        layer.momentum = 0.99
    return model, {}


def long_average(norm):
    model = calibrated(resnet_like, norm)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.001
    return model, {"epoch": 100}


def dropout_first(norm):
    model = resnet_like(norm=norm)
    model.relu = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5))
    gb.calibrate(model, [batch_for(model, 64, seed) for seed in range(50, 70)])
    return model, {}


def biased(norm):
    model = resnet_like(norm=norm)
    torch.manual_seed(0)
    model.layers[1].conv2 = nn.Conv2d(6, 6, 3, padding=1).double()
    gb.calibrate(model, [batch_for(model, 64, seed) for seed in range(50, 70)])
    return model, {}


def twice_used(norm):
    model = resnet_like(norm=norm)
    model.layers[0].bn2 = model.layers[0].bn1
    gb.calibrate(model, [batch_for(model, 64, seed) for seed in range(50, 70)])
    return model, {}


DEFECTS = {
    counted_twice: "BN001",
    counted_twice_reentrant: "BN001",
    accumulating: "BN001",
    looking_elsewhere: "BN001",
    left_in_eval: "BN001",
    frozen: "BN002",
    left_out_of_the_optimizer: "BN002",
    deaf: "BN003",
    validating_in_training: "BN003",
    poisoned: "BN004",
    loaded_without_buffers: "BN004",
    never_seen: "BN004",
    put_in_eval: "BN004",
    stale: "BN005",
    few: "BN006",
    one: "BN006",
    still_average: "BN007",
    decay_for_momentum: "BN007",
    long_average: "BN007",
    dropout_first: "BN008",
    biased: "BN009",
    twice_used: "BN010",
}
PLACES = {
    frozen: {f"layers.{i}.bn{j}" for i in range(3) for j in (1, 2)}
    | {"layers.1.downsample.1", "layers.2.downsample.1"},
    deaf: {"bn1"},
    poisoned: {"layers.1.bn1"},
    loaded_without_buffers: {"layers.1.bn1"},
    one: {"1"},
    still_average: {"bn1"},
    decay_for_momentum: {"bn1", "layers.0.bn1"},
    biased: {"layers.1.conv2"},
    twice_used: {"layers.0.bn1"},
}
# what follows from the defect: where places are mixed, eval mode is another network
ALSO = {twice_used: {"BN005"}, dropout_first: {"BN005"}}


def found_in(defect, norm):
    model, given = defect(norm)
    given = {"batch": None, **given}
    if given["batch"] is None:
        sample = getattr(model, "inner", model)
        given["batch"] = batch_for(sample, 64)
    return model, given, gb.check(model, **given)


@pytest.mark.parametrize("norm", ["nn", "gb"])
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda f: f.__name__)
def test_a_planted_defect_is_found_where_it_is_and_no_other(defect, norm):
    _, _, found = found_in(defect, norm)
    code = DEFECTS[defect]
    assert code in found.codes, found
    assert set(found.codes) <= {code} | ALSO.get(defect, set()), found
    (finding,) = (f for f in found if f.code == code)
    assert finding.title == RULES[code].title
    assert set(finding.places) == PLACES.get(defect, set(finding.places))
    assert set(finding.values) == set(finding.places) != set()
    assert finding.effect


CURES = {  # where the line printed is for the training loop or the data, not for the model
    accumulating: lambda model, given: {"step": gentle(given["step"], gb.accumulate)},
    looking_elsewhere: lambda model, given: {"step": looking_away},
    validating_in_training: lambda model, given: {"evaluate": lambda m, b: m.eval()(b[0])},
    few: lambda model, given: {"batch": batch_for(model, 3 * 6)},
    one: lambda model, given: {"batch": torch.randn(16, 4).double()},
}
MADE_ANEW = "  # then make the optimizer anew"


def hers(given):
    """What stands around the line where it is printed."""
    return {"step": given.get("step"), "batch": given["batch"]}


def gentle(step, around):
    def within(model, batch):
        with around(model):
            step(model, batch)

    return within


def looking_away(model, batch):
    model(batch[0]).square().mean().backward()
    with gb.no_update(model), torch.no_grad():
        model(batch[0] * 3)


@pytest.mark.parametrize("norm", ["nn", "gb"])
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda f: f.__name__)
def test_the_cure_that_is_printed_cures(defect, norm):
    model, given, found = found_in(defect, norm)
    code = DEFECTS[defect]
    (cure,) = (f.cure for f in found if f.code == code)
    assert "\n" not in cure
    compile(cure, "cure", "exec")
    if defect in CURES:
        exec(cure, {"model": model, "gb": gb, "torch": torch, **hers(given)})
        given = {**given, **CURES[defect](model, given)}
        model = gb.convert(model) if defect is looking_elsewhere else model
    else:
        sample = getattr(model, "inner", model)
        batches = [batch_for(sample, 64, seed) for seed in range(70, 90)]
        names = {"model": model, "gb": gb, "copy": copy, "torch": torch, "batches": batches}
        exec(cure, names)
        model = names["model"]
        if cure.endswith(MADE_ANEW):
            given["optimizer"] = torch.optim.SGD(model.fc.parameters(), lr=0.1)
    assert code not in gb.check(model, **given).codes


@pytest.mark.parametrize("code", RULES)
def test_the_cures_of_a_rules_example_are_python_that_runs(code):
    (example,) = re.findall(r"```python\n(.*?)```", explain(code), re.S)
    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, "copy": copy, "x": torch.randn(512, 8), "print": list}
    cures = []

    class Listening:
        def __getattr__(self, name):
            return check if name == "check" else getattr(gb, name)

    def check(model, *args, **given):
        found = gb.check(model, *args, **given)
        cures.extend((finding.cure, copy.deepcopy(model)) for finding in found)
        return found

    exec(example, {**names, "gb": Listening()})
    assert cures
    for cure, model in cures:
        around = {"step": lambda m, b: m(b), "batch": names["x"], "batches": [names["x"]]}
        exec(cure, {**names, **around, "gb": gb, "model": model})


class Own(nn.BatchNorm1d):
    """A subclass, which gb.convert leaves as it is."""


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, gb.BatchNorm1d, Own])
@pytest.mark.parametrize("apart", [False, True])
def test_the_cure_of_what_is_frozen_runs_and_cures_for_layers_of_any_kind(kind, apart):
    layers = [nn.Linear(8, 16, bias=False), kind(16), nn.Linear(16, 16, bias=False), kind(16)]
    model = nn.Sequential(*layers)
    for layer in layers if apart else layers[:2]:
        layer.requires_grad_(isinstance(layer, nn.Linear) and apart)
    x = torch.randn(256, 8)
    gb.calibrate(model, [x])
    (finding,) = gb.check(model, x, select="BN002")
    assert len(finding.places) == 1 + apart
    names = {"model": model, "gb": gb}
    exec(finding.cure, names)
    before = copy.deepcopy(dict(names["model"].named_buffers()))
    if kind is Own:
        assert finding.cure.endswith("# after each model.train()")
    else:
        names["model"].train()
    names["model"](x + 1)
    for name in finding.places:
        key = f"{name}.running_mean"
        assert torch.equal(before[key], names["model"].get_buffer(key))


@pytest.mark.parametrize("norm", ["nn", "gb"])
def test_the_cures_of_small_batches_run_on_layers_of_either_kind(norm):
    model, _, found = found_in(few, norm)
    line, alternative = found[0].cure.split("  # or ")
    names = {}
    exec(line, names)
    assert names["batch_size"] == 6
    assert gb.check(model, batch_for(model, names["batch_size"]), select="BN006") == []
    assert alternative.startswith("after model = gb.convert(model) gb.freeze") == (norm == "nn")


@pytest.mark.parametrize("norm", ["nn", "gb"])
def test_the_bias_that_the_cure_takes_out_changes_no_output(norm):
    model, given, found = found_in(biased, norm)
    x = given["batch"][0]
    before = [model.train(mode)(x) for mode in (False, True)]
    model, _, _ = found_in(biased, norm)
    exec(found[0].cure, {"model": model})
    after = [model.train(mode)(x) for mode in (False, True)]
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


class Fork(nn.Module):
    """One output into two layers, or one module in front of both."""

    def __init__(self, shared):
        super().__init__()
        self.shared, self.fc = shared, nn.Linear(4, 8)
        self.n1, self.n2 = gb.BatchNorm1d(8), nn.BatchNorm1d(8)

    def forward(self, x):
        y = self.fc(x)
        return self.n1(y) + 2 * self.n2(self.fc(x.square()) if self.shared else y).relu()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
def test_a_bias_that_feeds_two_layers_is_taken_out_of_both(shared, wrap):
    torch.manual_seed(0)
    model, x = Fork(shared), torch.randn(256, 4)
    gb.calibrate(model, [x])
    (finding,) = gb.check(wrap(model), x, select="BN009")
    before = model.eval()(x)
    exec(finding.cure, {"model": wrap(model), "gb": gb})
    assert model.fc.bias is None
    torch.testing.assert_close(model(x), before)


def test_a_bias_before_a_layer_with_other_inputs_too_is_cured_by_calibration():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)
            self.norm = gb.BatchNorm1d(8)

        def forward(self, x):
            return self.norm(self.a(x)) + self.norm(self.b(x))

    (finding,) = gb.check(Joined(), torch.randn(256, 4), select="BN009")
    assert finding.cure.startswith("model.a.bias = None; gb.calibrate(model, batches)")


@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="aot_eager")],
)
def test_cures_reach_into_wrappers_and_names_that_are_no_identifiers(wrap):
    model = nn.Module()
    model.add_module("a-b", nn.Sequential(nn.Linear(4, 8), gb.BatchNorm1d(8, momentum=0.9)))
    model.add_module("0", gb.BatchNorm1d(8, momentum=0.9))
    model.forward = lambda x: model._modules["0"](model._modules["a-b"](x))
    names = {"model": wrap(model), "gb": gb}
    x = torch.randn(256, 4)
    found = gb.check(names["model"], x, select="BN007,BN009")
    assert found.codes == ("BN007", "BN009")
    for finding in found:
        exec(finding.cure, names)
    assert gb.check(names["model"], x, select="BN007,BN009") == []


# -- what cannot be measured ----------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, gb.BatchNorm1d])
def test_without_running_statistics_rules_about_them_are_not_tried(norm):
    model = nn.Sequential(nn.Linear(8, 16), norm(16, track_running_stats=False))
    for given in ({"batch": torch.randn(8, 8)}, {"batches": torch.randn(24, 8).split(8)}):
        found = gb.check(model, **given)
        assert found.codes == ("BN006", "BN009")
        assert set(found.skipped) == {"BN005", "BN008"}
        assert "no layer has running statistics" in found.skipped["BN008"]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, gb.BatchNorm1d])
@pytest.mark.parametrize(("value", "what"), [("batch", "the batch"), ("weight", "layer 2")])
def test_what_is_not_finite_is_said_and_not_measured(norm, value, what):
    model = nn.Sequential(nn.Linear(8, 16), norm(16), nn.Linear(16, 16), norm(16))
    x = torch.randn(256, 8)
    gb.calibrate(model, [x])
    with torch.no_grad():
        (x if value == "batch" else model[2].weight)[3, 3] = math.nan
    found = gb.check(model, x)
    assert {"BN005", "BN008", "BN009"} <= set(found.skipped)
    for code in ("BN005", "BN008", "BN009"):
        assert f"{what} is not finite" in found.skipped[code]
    assert "nan" not in str(found).lower()


def test_a_measurement_that_fails_leaves_the_other_rules():
    class Fussy(nn.Sequential):
        def forward(self, x):
            if self.training:
                raise RuntimeError("no training here")
            return super().forward(x)

    model = Fussy(nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=0.9))
    found = gb.check(model, torch.randn(64, 8))
    assert found.codes == ("BN007",)
    assert "raised RuntimeError: no training here" in found.skipped["BN009"]


def test_an_optimizer_must_be_one_of_this_model():
    model = resnet_like()
    other = torch.optim.SGD(resnet_like().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"holds none: make it after gb\.convert"):
        gb.check(model, optimizer=other)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got float"):
        gb.check(model, optimizer=0.1)


# -- the effects are numbers of this model --------------------------------------------------------


def test_counted_twice_is_measured_by_counters():
    _, _, found = found_in(counted_twice, "nn")
    assert set(found[0].values.values()) == {2.0}
    _, _, found = found_in(accumulating, "gb")
    assert set(found[0].values.values()) == {2.0}
    assert "parts of one batch" in found[0].effect
    _, _, found = found_in(looking_elsewhere, "gb")
    assert "several forward passes" in found[0].effect


def test_the_shift_of_a_frozen_layer_is_that_of_one_training_batch():
    model, given, found = found_in(frozen, "nn")
    names = found[0].places
    before = {n: copy.deepcopy(model.get_submodule(n)) for n in names}
    model.train()(given["batch"][0])
    for name, value in found[0].values.items():
        old, new = before[name], model.get_submodule(name)
        shift = (new.running_mean - old.running_mean).abs() / (old.running_var + old.eps).sqrt()
        assert value == pytest.approx(float(shift.max()), rel=1e-12)


def test_the_gap_is_that_of_gb_gap():
    model, _, _ = found_in(stale, "gb")
    batches = [batch_for(model, 64, seed) for seed in range(4)]
    (finding,) = gb.check(model, batches=batches, select="BN005")
    rows = {row.name: row for row in gb.gap(model, batches)}
    for name, value in finding.values.items():
        if name != "(output)":
            assert value == rows[name].systematic > 0.05
    assert "stale" in finding.effect


def test_values_per_channel_are_counted_in_the_model():
    _, _, found = found_in(few, "gb")
    # 8 by 8 images; two blocks with stride 2: 2 by 2 positions of 3 samples
    last = ("layers.2.bn1", "layers.2.bn2", "layers.2.downsample.1")
    assert found[0].values == dict.fromkeys(last, 12.0)


def test_dropout_is_measured_by_the_deviation_that_it_adds():
    """For a ReLU of a normal value x, E x² = 1/2 and var x = 1/2 - 1/(2π); p = 1/2 adds E x²."""
    layers = nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(64)
    torch.manual_seed(0)
    (finding,) = gb.check(nn.Sequential(*layers), torch.randn(4096, 64), select="BN008")
    var = 0.5 - 1 / (2 * math.pi)
    assert finding.values["2"] == pytest.approx(math.sqrt((var + 0.5) / var), rel=0.01)
    assert finding.cure.startswith("model[1].p = 0.0")


def test_momentum_is_judged_by_its_half_life():
    model = resnet_like()
    model.bn1.momentum = 0.1  # half-life 6.58 steps
    assert gb.check(model, epoch=7, select="BN007") == []
    assert gb.check(model, epoch=6, select="BN007").codes == ("BN007",)
    model.bn1.momentum = None
    for layer in model.layers.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.5
    assert gb.check(model, epoch=1, select="BN007") == []


# -- on real trainings ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    data = load("digits")
    x, y = data.train_x.float() / data.train_x.max(), data.train_y
    x = x.reshape(len(x), -1)
    return x[:-300], y[:-300], x[-300:], y[-300:]


def perceptron(norm):
    torch.manual_seed(0)
    kind = {"nn": nn.BatchNorm1d, "gb": gb.BatchNorm1d}[norm]
    layers = [nn.Linear(64, 64, bias=False), kind(64), nn.ReLU()]
    layers += [nn.Linear(64, 64, bias=False), kind(64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def trained(model, batches, epochs=5, momentum=0.9):
    """Trains in the mode that the model is in."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    for _ in range(epochs):
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return optimizer


def accuracy(model, x, y):
    return float((model(x).argmax(1) == y).double().mean())


def shuffled(x, y):
    return [(x[rows], y[rows]) for rows in torch.randperm(len(x)).split(64)[:-1]]


@pytest.mark.parametrize("norm", ["nn", "gb"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_where_train_was_forgotten_the_cure_is_to_train_again(digits, norm, momentum):
    x, y, test_x, test_y = digits
    model = perceptron(norm).eval()
    optimizer = trained(model, lambda: shuffled(x, y), momentum=momentum)
    planted = accuracy(model, test_x, test_y)
    calibrated = copy.deepcopy(model)
    gb.calibrate(calibrated, shuffled(x, y))
    for mode in (False, True):
        found = gb.check(model.train(mode), (x[:256], y[:256]), optimizer)
        assert found.codes == ("BN004",)
        assert "in eval mode" in found[0].effect
        assert "weights that were loaded without their buffers" in found[0].effect
        assert found[0].cure.startswith("model.train()")
    cured = perceptron(norm)
    exec(found[0].cure, {"model": cured})
    optimizer = trained(cured, lambda: shuffled(x, y), momentum=momentum)
    assert gb.check(cured, (x[:256], y[:256]), optimizer, select="BN004") == []
    restored = accuracy(cured.eval(), test_x, test_y)
    assert restored > planted
    assert restored > max(0.85, accuracy(calibrated, test_x, test_y) + 0.1)


@pytest.mark.parametrize("norm", ["nn", "gb"])
@pytest.mark.parametrize("first", [0, 2], ids=["from the start", "after validation"])
def test_a_step_before_which_train_was_forgotten_is_named_and_the_cure_restores(
    digits, norm, first
):
    x, y, test_x, test_y = digits

    def training(cure):
        model = perceptron(norm).train(first > 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def step(model, batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()

        for batch in shuffled(x, y)[:first]:
            step(model, batch)
        for _ in range(5):
            model.eval()  # to validate
            exec(cure, {"model": model})
            for batch in shuffled(x, y):
                step(model, batch)
        found = gb.check(model, (x[:256], y[:256]), optimizer, step=step)
        return found, accuracy(model.eval(), test_x, test_y)

    found, planted = training("")
    assert found.codes == ("BN001", "BN004")[: 1 if first else 2], found
    assert found[0].values == {"1": 0.0, "4": 0.0}
    assert "2 of 2 normalization layers were in eval mode" in found[0].effect
    assert all(finding.cure.startswith("model.train()") for finding in found)
    assert ("BN001" if first else "BN004") in found.skipped["BN005"]
    found, restored = training(found[0].cure)
    assert found == []
    assert restored > planted + 0.1


@pytest.mark.parametrize("norm", ["nn", "gb"])
def test_layers_put_in_eval_mode_before_any_batch_are_named_and_the_cure_restores(digits, norm):
    x, y, test_x, test_y = digits

    def training(cure):
        model = perceptron(norm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for layer in (model[1], model[4]):
            layer.eval()
        exec(cure, {"model": model})
        found = gb.check(model, (x[:256], y[:256]), optimizer)
        for _ in range(5):
            for batch in shuffled(x, y):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
                optimizer.step()
        return found, accuracy(model.eval(), test_x, test_y)

    found, planted = training("")
    assert found.codes == ("BN004",)
    assert found[0].places == ("1", "4")
    assert "in eval mode, while the model is in training mode" in found[0].effect.lower()
    found, restored = training(found[0].cure)
    assert found == []
    assert restored > planted + 0.1


class Freezing(nn.Sequential):
    """Keeps its normalizations in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.training = False
        return self


def test_a_train_method_that_keeps_untouched_layers_in_eval_mode_is_taken_away():
    model = Freezing(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16)).train()
    kind, x = Freezing.train, torch.randn(64, 8)
    try:
        (finding,) = gb.check(model, x)
        exec(finding.cure, {"model": model, "torch": torch})
        assert gb.check(model, x) == []
    finally:
        Freezing.train = kind


def test_untouched_layers_that_are_frozen_one_by_one_are_named_and_calibration_cures():
    model, x = perceptron("nn"), torch.rand(256, 64)
    for layer in (model[1], model[4]):
        layer.eval().requires_grad_(False)
    (finding,) = gb.check(model, x)
    assert (finding.code, finding.places) == ("BN004", ("1", "4"))
    exec(finding.cure, {"gb": gb, "model": model, "batches": [x]})
    assert gb.check(model, x) == []


class Student(nn.Module):
    """With a network beside it that is used as it is, without gradients."""

    def __init__(self, net):
        super().__init__()
        self.net, self.teacher = net, copy.deepcopy(net).eval()

    def forward(self, x):
        with torch.no_grad():
            wanted = self.teacher(x)
        return self.net(x) - 0.1 * wanted

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self


def normalizations(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def validates_first(model):
    def step(x):
        with torch.no_grad():
            model.eval()(x)
        return model.train()(x)

    return step


def attacks_first(model):
    def step(x):
        attacked = x.clone().requires_grad_()
        (towards,) = torch.autograd.grad(model.eval()(attacked).square().sum(), attacked)
        return model.train()(x + 0.01 * towards.sign())

    return step


def each(change):
    return lambda model: [change(layer) for layer in normalizations(model)] and None


def frozen_on_purpose(model):
    gb.freeze(model, affine=random.random() < 0.5)


ON_PURPOSE = {  # what is done to a trained model in training mode; it may return (what is called)
    "training": lambda model: None,
    "frozen statistics": each(lambda layer: layer.eval()),
    "frozen layers": each(lambda layer: layer.eval().requires_grad_(False)),
    "gb.freeze": frozen_on_purpose,
    "gb.freeze in eval mode": lambda model: frozen_on_purpose(model.eval()),
    "a backbone in eval mode": lambda model: model[0].eval() and None,
    "a frozen backbone in eval mode": lambda model: model[0].eval().requires_grad_(False) and None,
    "a frozen backbone, all in eval mode": lambda m: m.eval()[0].requires_grad_(False) and None,
    "a head alone": lambda model: model.eval()[1].train() and None,
    "validation in the step": validates_first,
    "an attack in the step": attacks_first,
}


@pytest.mark.parametrize("purpose", [*ON_PURPOSE, "features", "a teacher", "synchronized"])
@pytest.mark.parametrize("norm", ["nn", "gb"])
def test_eval_mode_on_purpose_is_no_finding_in_ordinary_training(digits, norm, purpose):
    """Pretrained networks, eight set-ups each."""
    x, y, *_ = digits
    if norm == "nn" and purpose.startswith("gb."):
        norm = "gb"
    kind = {"nn": nn.BatchNorm1d, "gb": gb.BatchNorm1d}[norm]
    for seed in range(8):
        torch.manual_seed(seed)
        random.seed(seed)
        width = random.choice([16, 32])
        layers = [nn.Linear(64, width, bias=False), kind(width), nn.ReLU()]
        for _ in range(random.randrange(3)):
            layers += [nn.Linear(width, width, bias=False), kind(width), nn.ReLU()]
        model = nn.Sequential(nn.Sequential(*layers), nn.Linear(width, 10))
        gb.calibrate(model, [part for part, _ in shuffled(x, y)])
        if purpose == "synchronized":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = Student(model) if purpose == "a teacher" else model
        called = ON_PURPOSE.get(purpose, lambda model: None)(model.train()) or model
        if purpose == "features":
            model.eval()
        parameters = (model[1] if purpose == "features" else model).parameters()
        make = random.choice(
            [
                lambda p: torch.optim.SGD(p, lr=0.01),
                lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
                lambda p: torch.optim.AdamW(p, lr=0.001),
            ]
        )
        optimizer = make([p for p in parameters if p.requires_grad])

        def step(model, batch, called=called, optimizer=optimizer):
            optimizer.zero_grad()
            nn.functional.cross_entropy(called(batch[0]), batch[1]).backward()
            optimizer.step()

        batch = shuffled(x, y)[0]
        for _ in range(random.randrange(3)):
            step(model, batch)
        given = optimizer if random.random() < 0.5 else None
        found = gb.check(model, batch, given, step=step, select="BN001,BN004")
        assert len(found.tried) == 2
        assert found == [], (purpose, seed, found)


def frozen_and_in_eval(part):
    gb.freeze(part)
    part[1].eval()


def test_parts_that_are_used_as_they_are_may_have_statistics_as_built():
    x = torch.randn(64, 8)
    as_it_is = (lambda part: part.eval().requires_grad_(False), gb.freeze, frozen_and_in_eval)
    for freeze in as_it_is:
        part = nn.Sequential(nn.Linear(8, 16, bias=False), gb.BatchNorm1d(16))
        freeze(part)
        model = nn.Sequential(part, nn.ReLU(), nn.Linear(16, 2))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        assert gb.check(model, x, optimizer, step=lambda m, x: m(x).sum().backward()) == []


def test_a_step_in_eval_mode_that_trains_no_normalization_is_no_finding(digits):
    x, y, *_ = digits
    model = perceptron("gb")
    gb.calibrate(model, [x])
    head = torch.optim.SGD(model[-1].parameters(), lr=0.1)
    model.eval()
    # gradients reach all, the optimizer holds the head
    assert gb.check(model, (x, y), head, step=backward, select="BN001") == []

    def averages(model, batch):
        with torch.no_grad():
            model(batch[0])
            for p in model.parameters():
                p.mul_(0.9)

    assert gb.check(model, (x, y), step=averages, select="BN001") == []
    everything = torch.optim.SGD(model.parameters(), lr=0.1)
    assert gb.check(model, (x, y), everything, step=backward, select="BN001") != []


@pytest.mark.parametrize("norm", ["nn", "gb"])
def test_where_buffers_were_not_loaded_the_cure_is_to_calibrate(digits, norm):
    x, y, test_x, test_y = digits
    model = perceptron(norm).train()
    trained(model, lambda: shuffled(x, y))
    weights = {key: value for key, value in model.state_dict().items() if "running" not in key}
    weights = {key: value for key, value in weights.items() if "tracked" not in key}
    loaded = perceptron(norm).eval()
    loaded.load_state_dict(weights, strict=False)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.05, momentum=0.9)
    planted = accuracy(loaded, test_x, test_y)
    found = gb.check(loaded, (x[:256], y[:256]), optimizer)
    assert found.codes == ("BN004",)
    assert "eval mode, call" not in found[0].effect
    exec(found[0].cure, {"gb": gb, "model": loaded, "batches": shuffled(x, y)})
    wanted = accuracy(model.eval(), test_x, test_y)
    assert accuracy(loaded, test_x, test_y) > wanted - 0.02 > planted + 0.05


def domains(x, y, mixed):
    """Batches, each of one of two domains, or of both."""
    found = []
    for number, (part, labels) in enumerate(shuffled(x, y)):
        other = torch.rand(len(part), 1) < 0.5 if mixed else torch.tensor(number % 2 == 1)
        found.append((torch.where(other, 3 * part + 4, part), labels))
    return found


@pytest.mark.parametrize("norm", ["nn", "gb"])
def test_batches_of_two_domains_are_named_and_mixing_them_cures(digits, norm):
    x, y, *_ = digits
    right = {}
    for mixed in (False, True):
        model = perceptron(norm)
        optimizer = trained(model, lambda mixed=mixed: domains(x, y, mixed), epochs=8)
        both = domains(x, y, mixed)
        if mixed:
            gb.calibrate(model, both)
        right[mixed] = [
            sum(accuracy(copy.deepcopy(model).train(mode), *batch) for batch in both) / len(both)
            for mode in (True, False)
        ]
        found = gb.check(model.train(), both[0], optimizer, batches=both)
        table = gb.gap(model, both)
        assert ("fall into groups" in str(table)) == (not mixed)
        if mixed:
            assert found == [], found
            assert table.groups == {}
        else:
            assert found.codes == ("BN005",)
            assert "groups whose statistics differ" in found[0].effect
            assert "gb.calibrate" not in found[0].cure
            exec(found[0].cure, {})
            assert set(found[0].places) == set(table.groups) >= {"1"}
            assert "larger batches" not in str(table)
            assert all("calibrate" not in row.cure for row in table if row.cause == "noise")
    assert right[False][0] > 0.9 > 0.6 > right[False][1]
    assert right[True][1] > 0.85


def groups_of(batches):
    spread = Spread()
    for batch in batches:
        spread.of(batch)(("", 0), batch, None)
    return spread.groups()


@pytest.mark.parametrize("size", [4, 16, 64, 256])
@pytest.mark.parametrize("number", [2, 6])
def test_shuffled_batches_do_not_fall_into_groups(digits, size, number):
    x = digits[0]
    torch.manual_seed(0)
    heavy = torch.distributions.StudentT(3.0).sample((1497, 5))
    for population in (x, x.reshape(-1, 8, 8), heavy):
        if size * number > len(population):
            population = torch.cat([population, population])
        for _ in range(200):
            rows = torch.randperm(len(population))[: size * number]
            assert groups_of(population[rows].split(size)) == {}


@pytest.mark.parametrize("change", [lambda x: x + 1.0, lambda x: 2 * x], ids=["mean", "scale"])
def test_batches_of_which_each_second_is_of_another_domain_fall_into_groups(digits, change):
    torch.manual_seed(0)
    x = torch.randn(8, 64, 5)
    found = groups_of([change(part) if number % 2 else part for number, part in enumerate(x)])
    assert found.keys() == {""}
    assert groups_of(x) == {}


def test_batches_of_one_class_each_fall_into_groups(digits):
    x, y, *_ = digits
    apart = groups_of([x[y == label][:64] for label in range(10)])[""]
    assert apart.mean > 0.25


# -- without a trace ------------------------------------------------------------------------------


def trace(model, optimizer):
    """All that could change, with the identity and the memory of each tensor."""

    def tensor(t):
        return None if t is None else (id(t), t.data_ptr(), t.detach().clone())

    modules = [
        (
            {k: v for k, v in m.__dict__.items() if isinstance(v, bool | int | float | str)},
            {k: tensor(v) for k, v in (*m._parameters.items(), *m._buffers.items())},
            [len(getattr(m, name)) for name in ("_forward_hooks", "_forward_pre_hooks")],
            sorted(m.__dict__),
        )
        for m in model.modules()
    ]
    grads = [tensor(p.grad) for p in model.parameters()]
    state = [
        {k: tensor(v) if isinstance(v, torch.Tensor) else v for k, v in s.items()}
        for s in optimizer.state.values()
    ]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [modules, grads, state, groups, torch.get_rng_state(), random.getstate()]


def differences(a, b, at=""):
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [at]
    if isinstance(a, dict):
        missing = [f"{at}.{key}" for key in a.keys() ^ b.keys()]
        return missing + [
            d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{at}.{k}")
        ]
    if isinstance(a, list | tuple) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{at}[{i}]")]
    return [] if a == b else [f"{at}: {a!r:.50} != {b!r:.50}"]


def ordinary(optimizer):
    def step(model, batch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(batch[0]), batch[1]).backward()
        optimizer.step()
        random.random()
        torch.rand(1)

    return step


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("norm", ["nn", "gb"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes_by_any_rule(norm, kind, training):
    model = calibrated(mobilenet_like, norm)
    optimizer = kind(model.parameters(), lr=0.01)
    step = ordinary(optimizer)
    batch = batch_for(model, 32)
    step(model, batch)  # a state, and gradients
    model.train(training)
    evaluate = validating_in_training(norm)[1]["evaluate"]
    before = trace(model, optimizer)
    found = gb.check(model, batch, optimizer, step=step, evaluate=evaluate, epoch=10)
    assert len(found.tried) == 10
    assert found.codes == ("BN003",)
    assert differences(before, trace(model, optimizer)) == []


@pytest.mark.parametrize("argument", ["step", "evaluate", "forward"])
def test_nothing_changes_where_the_users_function_fails(argument):
    model = calibrated(resnet_like, "gb")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = batch_for(model, 32)
    ordinary(optimizer)(model, batch)
    before = trace(model, optimizer)

    def fails(model, batch):
        ordinary(optimizer)(model, batch) if argument == "step" else model.train()(batch[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gb.check(model, batch, optimizer, **{argument: fails})
    assert differences(before, trace(model, optimizer)) == []


def test_a_pending_backward_pass_goes_on():
    model = calibrated(resnet_like, "nn").eval()
    batch = batch_for(model, 32)
    loss = model(batch[0]).square().mean()
    gb.check(model, batch)
    loss.backward()
    assert model.bn1.weight.grad is not None


def test_a_recurrent_step_is_undone_too():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.norm = nn.GRU(4, 6, batch_first=True), gb.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(self.rnn(x)[0][:, -1])

    model = Net()
    optimizer = torch.optim.Adam(model.parameters())

    def step(model, x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()

    x = torch.randn(64, 5, 4)
    before = trace(model, optimizer)
    flat = [id(p) for p in model.rnn._flat_weights]
    assert gb.check(model, x, optimizer, step=step) == []
    assert differences(before, trace(model, optimizer)) == []
    assert [id(p) for p in model.rnn._flat_weights] == flat


# -- what comes in and what comes out -------------------------------------------------------------


def test_without_a_batch_rules_that_need_one_say_so():
    model, given = long_average("nn")
    model.layers.requires_grad_(False)
    model.layers[0].bn2 = model.layers[0].bn1
    model.bn1.running_mean[0] = math.nan
    found = gb.check(model, epoch=given["epoch"])
    assert found.codes == ("BN002", "BN004", "BN007", "BN010")
    assert set(found.skipped) == NEEDS_BATCH
    assert str(found).endswith("a batch is\nneeded, batch=.") or "batch=" in str(found)


def test_rules_that_are_tried_in_part_say_what_would_make_them_whole(tmp_path):
    model = calibrated(resnet_like, "gb")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [batch_for(model, 64, seed) for seed in range(4)]
    found = gb.check(model, batches[0], optimizer)
    assert found.partly.keys() == {"BN001", "BN003", "BN005", "BN007"}
    assert set(found.partly) <= set(found.tried)
    assert "10 rules tried, 4 of them in part." in str(found)
    assert "In part: BN003 for model.eval() only: give evaluate=." in str(found)
    whole = {"batches": batches, "step": ordinary(optimizer), "epoch": 100}
    whole["evaluate"] = lambda model, batch: model.eval()(batch[0])
    found = gb.check(model, batches[0], optimizer, **whole)
    assert found.partly == {}
    assert str(found) == "No findings, 10 rules tried."


def test_sorted_data_are_told_to_be_given_as_training_draws_them():
    _, _, found = found_in(stale, "nn")
    assert "Give batches as training draws them" in found[0].effect


def test_select_and_ignore_choose_rules():
    model, given, _ = found_in(decay_for_momentum, "gb")
    assert gb.check(model, given["batch"], select="bn007,BN009").tried == ("BN007", "BN009")
    assert gb.check(model, given["batch"], select=["BN009"]) == []
    found = gb.check(model, given["batch"], ignore=["BN007"])
    assert (found, len(found.tried)) == ([], 9)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda m: gb.check(nn.Linear(2, 2)), ValueError, "with batch normalizations, got Linear"),
        (lambda m: gb.check(m, select="BN11"), ValueError, "BN001 to BN010, got 'BN11'"),
        (lambda m: gb.check(m, ignore=["x"]), ValueError, "ignore must name rules"),
        (lambda m: gb.check(len), TypeError, "must be a torch.nn.Module"),
        (lambda m: gb.check(m, step=3), TypeError, r"step must be a function.*, got 3"),
        (lambda m: gb.check(m, evaluate=3), TypeError, r"evaluate\(model, batch\), got 3"),
        (lambda m: gb.check(m, forward="x"), TypeError, "forward must be a function"),
        (lambda m: gb.check(m, batches=3), TypeError, "batches must be several batches, .* got 3"),
        (
            lambda m: gb.check(nn.Sequential(nn.LazyBatchNorm1d())),
            ValueError,
            "Run one batch through the model first",
        ),
    ],
)
def test_a_wrong_input_is_answered_by_what_to_do(call, kind, words):
    with pytest.raises(kind, match=words):
        call(resnet_like())


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.randn(32, 7), r"layer 0 \(Linear\), which got float32 values of shape \(32, 7\)"),
        (torch.zeros(32, 8, dtype=torch.int64), "got int64 values of shape"),
        (torch.randn(8), r"layer 1 \(BatchNorm1d\), which got float32 values of shape \(16,\)"),
        ("text", r"layer 0 \(Linear\): TypeError: "),
        ({}, ": TypeError: .* missing 1 required"),
    ],
    ids=["width", "integers", "dimensions", "text", "nothing"],
)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, gb.BatchNorm1d])
def test_a_batch_that_the_model_cannot_be_run_on_is_named_with_the_layer(norm, batch, words):
    model = nn.Sequential(nn.Linear(8, 16, bias=False), norm(16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = trace(model, optimizer)
    whole = "could not be run on the batch that was given.*" + words
    for given in ({}, {"step": lambda m, x: m(x)}, {"evaluate": lambda m, x: m(x)}):
        for select in ((), "BN001", "BN003"):
            with pytest.raises(RuntimeError, match=whole) as raised:
                gb.check(model, batch, optimizer, select=select, **given)
            cause = raised.value.__cause__
            assert type(cause).__name__ in str(raised.value)
            assert "\n" not in str(raised.value)
    assert differences(before, trace(model, optimizer)) == []


def test_wrapped_and_compiled_models_are_looked_at_inside():
    model, given, found = found_in(decay_for_momentum, "nn")
    compiled = gb.check(torch.compile(model, backend="aot_eager"), given["batch"])
    assert compiled.codes == found.codes
    parallel = nn.DataParallel(model)
    assert gb.check(parallel, given["batch"])[0].places == found[0].places


def test_batches_may_be_dicts_and_outputs_anything():
    model, given, _ = found_in(biased, "gb")
    x, y = given["batch"]
    found = gb.check(
        model,
        {"images": x, "labels": y},
        forward=lambda m, b: {"loss": m(b["images"]).square().mean(), "n": len(b["labels"])},
    )
    assert found.codes == ("BN009",)
    assert len(found.tried) == 10
    quiet = gb.check(model, x, forward=lambda m, b: (m(b), None)[1])
    assert len(quiet.tried) == 10


def test_every_line_but_the_cure_has_at_most_80_columns():
    for defect in (decay_for_momentum, frozen, biased, stale):
        _, _, found = found_in(defect, "nn")
        for line in str(found).splitlines():
            assert len(line) <= 80 or line.startswith("    cure    "), line
        assert repr(found) == str(found)


# -- the page and the command ---------------------------------------------------------------------


def test_the_page_is_made_from_the_rules():
    """After a change of a rule: python -m tests.test_check."""
    assert PAGE.read_text() == page()


def test_every_rule_says_why_when_with_an_example_and_the_cure():
    for code in RULES:
        text = explain(code)
        for part in ("**Why.**", "**Fires**", "**Cure.**", "```python", "Values:"):
            assert part in text, (code, part)


FACTORIES = """
import torch
from torch import nn

def network(bias):
    layers = nn.Linear(4, 8, bias=bias), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
    return nn.Sequential(*layers)

def faulty():
    model = network(True)
    return model, torch.randn(64, 4), torch.optim.SGD(model.parameters(), lr=0.1)

def clean():
    return {"model": network(False), "batch": torch.randn(64, 4), "epoch": 100}

def raises():
    raise KeyError("lost")

def raises_from():
    try:
        raises()
    except KeyError as error:
        raise RuntimeError("no model") from error

def mismatched():
    return network(False), torch.randn(3, 7)

def own_forward():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(False)

        def forward(self, x):
            return self.inner(x)

    return Net(), torch.randn(3, 7)

def nothing():
    return 3

def leaves():
    raise SystemExit(0)

def talks():
    print("loading")
    return clean()

def misspelled():
    return {**clean(), "optimiser": None}

model = network(False)
number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "factories_of_the_test.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "factories_of_the_test"
    sys.modules.pop("factories_of_the_test", None)


def command(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main(["check", *words])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def test_the_command_leaves_with_1_for_findings_and_0_without(factories, capsys):
    code, out, _ = command(capsys, f"{factories}:faulty")
    assert code == 1
    assert out.startswith("BN009 bias before the layer\n")
    code, out, _ = command(capsys, f"{factories}:clean")
    assert code == 0
    assert out.startswith("No findings, 9 rules tried, 3 of them in part.\n")
    assert "In part: BN003 for model.eval() only: let clean() return a dict with 'evaluate'." in out
    code, out, _ = command(capsys, f"{factories}:model")
    assert code == 0
    assert "let model() return (model, batch, optimizer)" in " ".join(out.split())
    assert "batch=" not in out
    assert command(capsys, f"{factories}:faulty", "--ignore", "BN009")[0] == 0
    assert command(capsys, f"{factories}:faulty", "--select", "BN001,BN002")[0] == 0


def test_the_command_tells_the_same_as_json(factories, capsys):
    code, out, _ = command(capsys, f"{factories}:faulty", "--json")
    told = json.loads(out)
    assert code == 1
    assert [f["code"] for f in told["findings"]] == ["BN009"]
    assert told["findings"][0]["places"] == ["0"]
    assert told["skipped"].keys() == {"BN005"}
    assert len(told["tried"]) == 9
    assert told["partly"].keys() == {"BN001", "BN003", "BN007"}


def test_what_a_factory_prints_is_no_part_of_the_json(factories, capsys):
    code, out, err = command(capsys, f"{factories}:talks", "--json")
    assert code == 0
    assert json.loads(out)["findings"] == []
    assert err == "loading\n"


def test_the_command_explains_rules(capsys):
    code, out, _ = command(capsys, "--explain", "bn004")
    assert code == 0
    assert out == explain("BN004") + "\n"


def test_the_help_has_examples_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = command(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "    gammabeta check --explain BN004" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "A model was expected"),
        (["{}"], "MODULE:FACTORY was expected"),
        (["{}.py:clean"], "got a file: write {}:clean"),
        (["src/train.py:build"], "write src.train:build"),
        (["there_is_no_such_module:f"], "There is no module 'there_is_no_such_module'"),
        (["{}:absent"], "has no 'absent'"),
        (["{}:number"], "must be a function, got int"),
        (["{}:nothing"], "must return a model"),
        (["{}:raises"], "raised KeyError: 'lost'"),
        (["{}:leaves"], "left with SystemExit(0)"),
        (["{}:misspelled"], "keys among model, batch, optimizer, batches"),
        (["{}:mismatched"], "shapes cannot be multiplied"),
        (["{}:clean", "--select", "BN99"], "BN001 to BN010, got 'BN99'"),
        (["--explain", "BN011"], "BN001 to BN010, got 'BN011'"),
        (["{}:clean", "--explain", "BN001"], "takes no MODULE:FACTORY"),
        (["{}:clean", "--frobnicate"], "--frobnicate"),
    ],
)
def test_what_the_command_cannot_use_is_said_with_code_2(factories, capsys, words, said):
    code, out, err = command(capsys, *(word.format(factories) for word in words))
    assert (code, out) == (2, "")
    assert (said.format(factories) if "write" in said else said) in err


@pytest.mark.parametrize(
    ("name", "frames"),
    [("raises", 1), ("raises_from", 3), ("mismatched", 0), ("own_forward", 1)],
)
def test_of_a_factory_that_raises_only_its_own_frames_are_shown(factories, capsys, name, frames):
    _, _, err = command(capsys, f"{factories}:{name}")
    shown = [line for line in err.splitlines() if line.startswith("  File ")]
    assert len(shown) == frames
    assert all(f"{factories}.py" in line for line in shown)
    *_, last = err.splitlines()
    assert " raised " in last
    assert err.count(last.partition(" raised ")[2]) == 1


def test_the_command_finds_modules_beside_it(factories):
    done = subprocess.run(
        [sys.executable, "-m", "gammabeta", "check", f"{factories}:clean"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    PAGE.write_text(page())
