"""A Step gives the numbers of a real training step, and leaves no trace, whatever happens."""

import copy
import gc
import random
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gammabeta as gb
from tests import networks
from tests.networks import NETWORKS, batch_for, step_for
from tests.traces import same, state_of

NORMS = ("nn", "gb")


def real_step(model, loss_fn, batch):
    """Loss and gradients of an ordinary training step of a copy."""
    model = copy.deepcopy(model)
    loss = loss_fn(model(batch[0]), batch[1])
    loss.backward()
    return loss.detach(), {
        n: torch.zeros_like(p) if p.grad is None else p.grad
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def everything(step):
    """Ask for all that a Step gives."""
    for name in ("loss", "parameters", "gradients", "sites", "activations", "weights"):
        getattr(step, name)
    site = step.sites[0].name if step.sites else None
    step.run(watch=[site] if site else [], graph=True)
    step.run(training=False)
    step.gradient()
    step.along(step.gradients, [-0.1])
    if step.optimizer is not None:
        step.updated()
        step.updated([next(iter(step.weights))])
    shape = step.output("").shape
    step.vjp(torch.ones(shape, dtype=step.loss.dtype), wrt=site)
    start = step.output(site) if site else step._batch[0]
    step.jvp(torch.ones_like(start), wrt=site)
    step.jvp(torch.ones_like(start), wrt=site, training=False)


# -- numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_loss_and_gradients_are_those_of_a_training_step(network, norm):
    model = NETWORKS[network](norm=norm)
    torch.manual_seed(5)
    step = step_for(model)
    expected = real_step(model, nn.CrossEntropyLoss(), batch_for(model))
    torch.manual_seed(5)
    assert torch.equal(step.loss, expected[0])
    assert step.gradients.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(step.gradients[name], gradient, rtol=1e-12, atol=1e-14)
    assert same(step.gradient(), (step.loss, step.gradients))  # the same dropout masks again


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", ["mlp", "resnet_like", "densenet_like", "mobilenet_like"])
def test_activations_are_what_the_layers_took_and_gave(network, norm):
    model = NETWORKS[network](norm=norm)
    step = step_for(model)
    torch.manual_seed(0)
    assert list(step.activations) == [site.name for site in step.sites]
    acts = {"relu": F.relu, "relu6": F.relu6, None: lambda t: t}
    for site in step.sites:
        got = step.activations[site.name]
        layer = copy.deepcopy(site.module)
        # activations in place must not have written to what was kept
        torch.testing.assert_close(got.output, layer(got.input), rtol=1e-12, atol=1e-12)
        assert torch.equal(got.activated, acts[site.activation](got.output))
        assert not any(t.requires_grad for t in got)


def test_an_activation_that_is_written_to_later_is_kept_as_it_was():
    class Added(nn.Module):
        def forward(self, x):
            h = F.silu(x)
            h += 1
            h.mul_(2)
            return h

    model = networks.mlp()
    model[2] = Added()
    got = step_for(model).activations["1"]
    assert torch.equal(got.activated, F.silu(got.output))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", ["mlp", "conv_residual", "densenet_like"])
def test_the_gradient_of_an_activation_is_that_of_finite_differences(network, norm):
    model = NETWORKS[network](norm=norm)
    step = step_for(model)
    for name, activation in step.activations.items():
        direction = torch.randn_like(activation.output)
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            shift = sign * 1e-6 * direction
            moved.get_submodule(name).register_forward_hook(lambda m, a, o, s=shift: o + s)
            losses.append(nn.CrossEntropyLoss()(moved(batch_for(model)[0]), batch_for(model)[1]))
        slope = (losses[0] - losses[1]).item() / 2e-6
        # a kink of ReLU within the distance makes the rest
        assert (activation.gradient * direction).sum().item() == pytest.approx(slope, abs=1e-6)


def test_weights_are_the_layers_in_order_with_their_trainable_parameters():
    model = networks.conv_residual()
    model.fc.bias.requires_grad_(False)
    model.layers[0].conv2.weight.requires_grad_(False)
    assert step_for(model).weights == {
        "conv1": ("conv1.weight",),
        "layers.0.conv1": ("layers.0.conv1.weight",),
        "layers.0.conv2": (),
        "fc": ("fc.weight",),
    }


def test_an_unused_parameter_has_a_gradient_of_zeros_and_is_not_updated():
    model = networks.mlp()
    model.spare = nn.Linear(2, 2).double()
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.5)
    step = step_for(model, optimizer=optimizer)
    assert not step.gradients["spare.weight"].any()
    assert torch.equal(step.updated()["spare.weight"], model.spare.weight)


def test_points_along_a_direction_are_runs_at_moved_parameters():
    model = networks.functional_net()
    step = step_for(model)
    points = step.along(step.gradients, [0.0, -0.3])
    assert same(points[0], (0.0, step.loss, step.gradients))
    moved = {n: p - 0.3 * step.gradients[n] for n, p in step.parameters.items()}
    assert same(points[1][1:], step.gradient(moved))
    assert torch.equal(step.run(moved).loss, points[1].loss)
    assert points[1].loss < points[0].loss


def test_a_run_with_a_graph_is_differentiable_in_what_was_given_and_watched():
    step = step_for(networks.mlp(act="tanh"))
    given = {"0.weight": step.parameters["0.weight"].clone().requires_grad_()}
    run = step.run(given, watch=["1"], graph=True)
    wanted = torch.autograd.grad(run.loss, [given["0.weight"], run.outputs["1"]])
    torch.testing.assert_close(wanted[0], step.gradients["0.weight"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(wanted[1], step.activations["1"].gradient, rtol=1e-12, atol=1e-14)
    assert torch.equal(run.inputs["1"], step.activations["1"].input)
    plain = step.run(watch=["1", "2"])
    assert torch.equal(plain.loss, run.loss)
    assert not plain.outputs["1"].requires_grad


def test_a_watched_input_is_kept_from_a_module_that_writes_in_place():
    model = networks.mlp()
    model[2] = nn.ReLU(inplace=True)
    step = step_for(model)
    run = step.run(watch=["1", "2"])
    assert torch.equal(run.inputs["2"], run.outputs["1"])
    assert torch.equal(run.outputs["2"], run.outputs["1"].relu())
    assert not torch.equal(run.outputs["2"], run.outputs["1"])


@pytest.mark.parametrize("norm", NORMS)
def test_eval_mode_normalizes_by_the_running_statistics(norm):
    model = networks.mlp(norm=norm)
    with torch.no_grad():
        for _ in range(3):
            model(batch_for(model, 32)[0] * 2)
    step = step_for(model)
    expected = copy.deepcopy(model).eval()(batch_for(model)[0])
    assert torch.equal(step.run(training=False).output, expected)
    assert torch.equal(step.output(training=False), expected)
    assert not torch.equal(step.output(), expected)


# -- virtual steps ----------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW([{"params": list(p), "lr": 0.02}], lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def train_once(model, optimizer, batch):
    def closure():
        optimizer.zero_grad()
        loss = nn.CrossEntropyLoss()(model(batch[0]), batch[1])
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_virtual_step_is_the_optimizers_next_one(name):
    model = networks.mlp(act="tanh")
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    batch = batch_for(model)
    for _ in range(3):
        train_once(model, optimizer, batch)
        scheduler.step()
    before = state_of(model, optimizer)
    after = step_for(model, optimizer=optimizer).updated()
    assert same(state_of(model, optimizer), before)
    train_once(model, optimizer, batch)
    for parameter, value in model.named_parameters():
        torch.testing.assert_close(after[parameter], value.detach(), rtol=1e-12, atol=1e-14)
    assert not same(state_of(model, optimizer)["values"], before["values"])


def test_a_virtual_step_of_some_layers_leaves_the_others():
    model = networks.mlp()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = step_for(model, optimizer=optimizer)
    whole, part = step.updated(), step.updated(["0", "4"])
    for name, value in part.items():
        chosen = name.split(".")[0] in ("0", "4")
        assert torch.equal(value, whole[name] if chosen else step.parameters[name])
        assert not torch.equal(whole[name], step.parameters[name])


def test_the_hooks_of_an_optimizer_do_not_fire():
    model, fired = networks.mlp(), []
    optimizer = OPTIMIZERS["adam"](model.parameters())
    optimizer.register_step_post_hook(lambda *args: fired.append(args))
    step_for(model, optimizer=optimizer).updated()
    assert fired == []


def test_a_virtual_step_needs_an_optimizer_of_the_model():
    model = networks.mlp()
    with pytest.raises(RuntimeError, match=r"needs the optimizer .* optimizer=optimizer"):
        step_for(model).updated()
    model[0].weight.requires_grad_(False)
    frozen = torch.optim.SGD([model[0].weight], lr=0.1)
    with pytest.raises(ValueError, match="holds none of the trainable ones"):
        step_for(model, optimizer=frozen).updated()


def test_an_optimizer_of_something_else_is_said_at_once():
    model = networks.mlp(norm="nn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"gammabeta.Step: .* holds none of them.*gb.convert"):
        step_for(gb.convert(model), optimizer=optimizer)
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got float"):
        step_for(model, optimizer=0.1)


# -- products with Jacobians ------------------------------------------------------------


def jacobian_between(model, x, wrt, of):
    """The full Jacobian in training mode, by torch.autograd.functional, on copies."""

    def run(value):
        twin, found = copy.deepcopy(model), {}
        if wrt is not None:
            twin.get_submodule(wrt).register_forward_hook(lambda *args: value.clone())

        def keep(module, args, output):
            found["y"] = output.clone()  # a shortcut is added in place

        twin.get_submodule(of).register_forward_hook(keep)
        torch.manual_seed(7)
        twin(value if wrt is None else x)
        return found["y"]

    torch.manual_seed(7)
    start = x if wrt is None else step_for(model, len(x)).output(wrt)
    return torch.autograd.functional.jacobian(run, start)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("network", "wrt", "of"),
    [
        ("linear_chain", None, ""),
        ("linear_chain", "0", "3"),
        ("mlp", None, ""),
        ("mlp", "0", "1"),
        ("mlp", "1", ""),
        ("conv_residual", "bn1", "layers.0.bn2"),
        ("conv_residual", "layers.0.conv1", ""),
        ("functional_net", None, "bn2"),
    ],
)
def test_products_are_those_with_the_full_jacobian_of_the_batch(network, wrt, of, norm):
    model = NETWORKS[network](norm=norm)
    x, _ = batch_for(model, 4)
    full = jacobian_between(model, x, wrt, of)
    torch.manual_seed(7)
    step = step_for(model, 4)
    start = x if wrt is None else step.output(wrt)
    for seed in range(2):  # the second from the kept graph
        torch.manual_seed(seed)
        tangent, cotangent = torch.randn_like(start), torch.randn_like(step.output(of))
        forward = torch.tensordot(full, tangent, tangent.dim())
        back = torch.tensordot(cotangent, full, cotangent.dim())
        torch.manual_seed(7)
        got = step.jvp(tangent, wrt=wrt, of=of), step.vjp(cotangent, wrt=wrt, of=of)
        torch.testing.assert_close(got[0], forward, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(got[1], back, rtol=1e-9, atol=1e-11)
        assert not got[0].requires_grad
        assert not got[1].requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_products_contain_the_statistics_dependence_in_training_mode_only(norm):
    model = nn.Sequential(networks.norm_of(norm, 1, 1)).double()
    x = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    step = gb.Step(model, F.mse_loss, (x, x))
    ones = torch.ones_like(x)
    # a shift of all samples moves the mean with them
    torch.testing.assert_close(step.jvp(ones), torch.zeros_like(x))
    assert step.jvp(ones, training=False).min() > 0.99


def test_products_work_where_the_backward_has_no_forward_mode():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * ctx.saved_tensors[0] * dy

    class Model(nn.Module):
        def forward(self, x):
            return Square.apply(x)

    x = torch.tensor([[3.0]])
    step = gb.Step(Model(), F.mse_loss, (x, x))
    assert step.jvp(torch.ones(1, 1)).item() == 6.0
    assert step.vjp(torch.ones(1, 1)).item() == 6.0


def test_a_product_backwards_in_the_order_of_the_forward_is_zero():
    step = step_for(networks.mlp())
    assert not step.jvp(torch.ones_like(step.output("3")), wrt="3", of="0").any()
    assert not step.vjp(torch.ones_like(step.output("0")), wrt="3", of="0").any()


def test_products_pass_frozen_parameters_and_activations_in_place():
    model = networks.resnet_like().requires_grad_(False)
    step = step_for(model)
    tangent = torch.randn_like(step.output("bn1"))
    moved, eps = [], 1e-6
    for sign in (eps, -eps):
        twin = copy.deepcopy(model)
        twin.bn1.register_forward_hook(lambda m, a, o, s=sign: o + s * tangent)
        moved.append(twin(batch_for(model)[0]))
    expected = (moved[0] - moved[1]) / (2 * eps)
    torch.testing.assert_close(step.jvp(tangent, wrt="bn1"), expected, rtol=1e-5, atol=1e-6)
    assert step.gradients == {}


def test_what_cannot_be_differentiated_is_named():
    step = step_for(networks.mlp())
    with pytest.raises(ValueError, match="each module named, got '9'"):
        step.vjp(torch.ones(8, 3), wrt="9")
    with pytest.raises(ValueError, match=r"shape of the output, \(8, 3\), got \(3,\)"):
        step.vjp(torch.ones(3))
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(2, 3))
    batch = torch.arange(4).view(4, 1), torch.arange(4) % 3
    step = gb.Step(model, nn.CrossEntropyLoss(), batch)
    with pytest.raises(TypeError, match=r"floating tensor .* got torch.int64. Name a module"):
        step.jvp(torch.ones(4, 1))
    assert step.vjp(torch.ones(4, 3), wrt="0").shape == (4, 1, 2)
    shared = nn.Linear(2, 2)
    step = gb.Step(nn.Sequential(shared, shared), F.mse_loss, (torch.ones(3, 2),) * 2)
    with pytest.raises(ValueError, match="called once in the forward, got '0', called 2 times"):
        step.vjp(torch.ones(3, 2), wrt="0")


# -- no trace ---------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_of_a_step_is_left(network, norm, training):
    model = NETWORKS[network](norm=norm).train(training)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train_once(model, optimizer, batch_for(model, 16))
    batch = batch_for(model)
    kept = copy.deepcopy(batch)
    before = state_of(model, optimizer)
    everything(gb.Step(model, nn.CrossEntropyLoss(), batch, optimizer=optimizer))
    assert same(state_of(model, optimizer), before)
    assert same(batch, kept)


def test_building_a_step_runs_nothing():
    model = networks.mlp()
    model.forward = None
    step_for(model)


def test_a_pending_backward_pass_is_not_disturbed():
    model = networks.resnet_like("nn").eval()  # the graph has saved the running statistics
    x, y = batch_for(model)
    loss = F.cross_entropy(model(x), y)
    everything(step_for(model))
    loss.backward()


class Broken(nn.Module):
    """Stops the run at the given call, in the forward or in the backward pass."""

    def __init__(self, error, at, backward=False):
        super().__init__()
        self.error, self.at, self.backward, self.calls = error, at, backward, 0
        self.seen = []
        self.log = {}

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        self.log["x"] = x
        self.new_attribute = x
        if self.calls >= self.at:
            if not self.backward:
                raise self.error
            if x.requires_grad:
                x = x * 1
                x.register_hook(self.fail)
        return x

    def fail(self, grad):
        raise self.error


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(
    "ask",
    [
        lambda s: s.gradients,
        lambda s: s.gradient(),
        lambda s: s.vjp(torch.ones(8, 3, dtype=torch.float64)),
        lambda s: s.jvp(torch.ones(8, 4, dtype=torch.float64)),
        lambda s: s.updated(),
    ],
)
def test_nothing_is_left_after_an_exception_anywhere(ask, error, backward):
    model = nn.Sequential(*networks.mlp(), Broken(error, 1, backward))
    model.sample_size = (4,)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = step_for(model, optimizer=optimizer)
    before = state_of(model, optimizer)
    with pytest.raises(type(error)):
        ask(step)
    assert same(state_of(model, optimizer), before)
    broken = model[-1]
    assert broken.seen == []
    assert broken.log == {}
    assert "new_attribute" not in broken.__dict__
    broken.at = 10  # the Step is as good as new
    assert torch.equal(step.loss, step_for(networks.mlp()).loss)


def test_nothing_is_left_after_an_exception_in_the_loss_or_in_a_hook():
    model = networks.mlp()

    def fails(*args):
        raise ZeroDivisionError

    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        _ = gb.Step(model, fails, batch_for(model)).loss
    assert same(state_of(model), before)
    model[4].register_forward_hook(fails)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        step_for(model).jvp(torch.ones(8, 4))
    assert same(state_of(model), before)


def test_code_that_writes_to_weights_in_its_forward_writes_to_copies():
    class Clipped(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
            return super().forward(x)

    model = nn.Sequential(Clipped(4, 3)).double()
    model.sample_size = (4,)
    before = state_of(model)
    step = step_for(model)
    everything(step)
    assert same(state_of(model), before)
    assert step.parameters["0.weight"].abs().max() > 0.1


def test_hooks_of_parameters_do_not_fire():
    model, fired = networks.mlp(), []
    model[0].weight.register_hook(fired.append)
    model[0].weight.register_post_accumulate_grad_hook(fired.append)
    everything(step_for(model))
    assert fired == []


def test_generators_and_random_numbers_of_python_and_numpy_start_the_same_in_each_run():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x):
            own = torch.rand((), generator=self.generator)
            return x * random.random() * np.random.rand() * own

    model = nn.Sequential(*networks.mlp(), Noisy())
    model.sample_size = (4,)
    step = step_for(model)
    before, own = state_of(model), model[-1].generator.get_state()
    assert step.loss == step.run().loss == step.gradient()[0]
    assert same(state_of(model), before)
    assert torch.equal(own, model[-1].generator.get_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_random_numbers_of_a_device_start_the_same_in_each_run():
    model = networks.functional_net("nn").float().cuda()
    x, y = batch_for(model)
    step = gb.Step(model, nn.CrossEntropyLoss(), (x.float().cuda(), y.cuda()))
    before = torch.cuda.get_rng_state()
    assert step.loss == step.run().loss == step.gradient()[0]
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_a_step_is_of_the_state_at_the_first_question():
    model = networks.functional_net()
    step = step_for(model)
    loss = step.loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    torch.manual_seed(99)
    assert torch.equal(step.run().loss, loss)
    assert not torch.equal(step_for(model).loss, loss)


# -- kinds of models --------------------------------------------------------------------


def test_methods_beside_batch_normalization_give_the_gradients_of_training():
    for layer in (
        gb.BatchRenorm1d(5),
        gb.GhostBatchNorm1d(5, virtual_batch_size=4),
        gb.DecorrelatedBatchNorm1d(5),
        gb.IterNorm1d(5),
        gb.BatchNormAct1d(5, act="gelu"),
        gb.BatchNorm1d(5, stored_variance="biased", backend="reference"),
    ):
        model = networks.mlp()
        model[1] = layer.double()
        before = state_of(model)
        step = step_for(model, 16)
        loss, gradients = real_step(model, nn.CrossEntropyLoss(), batch_for(model, 16))
        assert torch.equal(step.loss, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(step.gradients[name], gradient, rtol=1e-10, atol=1e-13)
        everything(step)
        assert same(state_of(model), before)


def test_frozen_layers_stay_frozen():
    model = networks.mlp()
    gb.freeze(model)
    step = step_for(model)
    assert torch.equal(step.output(), copy.deepcopy(model).eval()(batch_for(model)[0]))
    model = networks.mlp(norm="nn")
    model[1].eval()
    expected = copy.deepcopy(model)(batch_for(model)[0])
    assert torch.equal(step_for(model).output(), expected)


def test_a_warning_about_a_batch_is_left_to_the_training():
    model = networks.mlp()
    x, y = batch_for(model)
    x[0] = float("nan")
    step = gb.Step(model, nn.CrossEntropyLoss(), (x, y))
    assert step.loss.isnan()
    assert gb.skipped(model) == {"1": 0, "4": 0}
    with pytest.warns(gb.StatisticsWarning):
        model(x)


def test_shared_modules_tied_weights_and_recurrent_layers_are_replaced_everywhere():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 4, batch_first=True)
            self.norm = gb.BatchNorm1d(4)
            self.again = self.norm
            self.out = nn.Linear(4, 4)
            self.back = nn.Linear(4, 4)
            self.back.weight = self.out.weight

        def forward(self, x):
            h = self.norm(self.rnn(x.unsqueeze(1))[0][:, 0])
            return self.back(self.again(self.out(h)))[:, :3]

    model = Tied().double()
    model.sample_size = (4,)
    step = step_for(model)
    before = state_of(model)
    loss, gradients = real_step(model, nn.CrossEntropyLoss(), batch_for(model))
    assert torch.equal(step.loss, loss)
    assert step.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(step.gradients[name], gradient, rtol=1e-12, atol=1e-14)
    assert [site.calls for site in step.sites] == [2]
    everything_but_products = step.along(step.gradients, [-0.1])
    assert everything_but_products[0].loss < loss
    assert same(state_of(model), before)


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant=False):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("norm", NORMS)
def test_activation_checkpoints_are_recomputed_with_the_same_tensors(norm):
    plain = networks.mlp(norm=norm, act="tanh")
    model = nn.Sequential(Checkpointed(plain))
    model.sample_size = (4,)
    before = state_of(model)
    step, expected = step_for(model), step_for(plain)
    for name, gradient in expected.gradients.items():
        assert torch.equal(step.gradients[f"0.inner.{name}"], gradient)
    moved = {n: 2 * p for n, p in expected.parameters.items()}
    got = step.gradient({f"0.inner.{n}": p for n, p in moved.items()})
    assert same([*got[1].values()], [*expected.gradient(moved)[1].values()])
    cotangent = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3)
    back = step.vjp(cotangent, wrt="0.inner.1")
    torch.testing.assert_close(back, expected.vjp(cotangent, wrt="1"))
    everything(step)
    assert same(state_of(model), before)
    model.requires_grad_(False)
    frozen = step_for(model).activations["0.inner.1"].gradient
    assert torch.equal(frozen, step.activations["0.inner.1"].gradient)


def test_reentrant_checkpoints_meet_the_limit_of_pytorch_and_leave_nothing():
    plain = networks.mlp()
    model = nn.Sequential(plain[0], Checkpointed(plain[1:], True))
    model.sample_size = (4,)
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"incompatible with .grad\(\)"):
        _ = step_for(model).gradients
    assert same(state_of(model), before)


def test_outputs_that_are_no_tensors_need_forward():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = networks.mlp()

        def forward(self, x, flag=None):
            return {"logits": self.inner(x), "flag": flag}

    model = Two()
    batch = batch_for(model.inner)
    with pytest.raises(TypeError, match=r"must return a tensor, got dict. Give forward="):
        _ = gb.Step(model, nn.CrossEntropyLoss(), batch).loss
    data = {"x": batch[0], "y": [batch[1]]}

    def forward(m, b):
        return F.cross_entropy(m(x=b["x"], flag=True)["logits"], b["y"][0])

    step, plain = gb.Step(model, None, data, forward=forward), step_for(model.inner)
    assert torch.equal(step.loss, plain.loss)
    cotangent = torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close(step.vjp(cotangent, of="inner"), plain.vjp(cotangent))
    assert torch.equal(step.output("inner"), plain.output())
    with pytest.raises(TypeError, match="output of 'the model' must be a tensor, got dict"):
        step.vjp(cotangent)
    with pytest.raises(TypeError, match="output of 'the model' must be a tensor, got dict"):
        step.output()


def test_a_compiled_model_is_measured_uncompiled():
    plain = networks.mlp()
    expected = step_for(plain)
    compiled = torch.compile(copy.deepcopy(plain), backend="eager")
    compiled(batch_for(plain)[0])
    inside = copy.deepcopy(plain)
    inside[3] = torch.compile(inside[3], backend="eager")
    inside.compile(backend="eager")
    for model in (compiled, inside):
        model.sample_size = plain.sample_size
        original = getattr(model, "_orig_mod", model)
        before = state_of(original)
        step = step_for(model)
        assert step.model is original
        assert next(iter(step.gradients.values())).equal(expected.gradients["0.weight"])
        assert len(step.sites) == 2
        assert step.sites[0].activation == "relu"
        everything(step)
        assert same(state_of(original), before)


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_distributed_model_is_measured_without_its_reducer(one_process):
    plain = networks.mlp()
    model = nn.parallel.DistributedDataParallel(plain)
    step = gb.Step(model, nn.CrossEntropyLoss(), batch_for(plain))
    before = state_of(plain)
    assert step.model is plain
    everything(step)
    assert same(state_of(plain), before)
    model(batch_for(plain)[0]).sum().backward()  # the reducer does not wait for anything
    model(batch_for(plain)[0]).sum().backward()


def test_a_sharded_model_is_refused(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = networks.mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match="the model itself, which is sharded by FSDP"):
        step_for(model)


# -- wrong inputs -----------------------------------------------------------------------


def test_what_is_no_model_no_loss_or_no_batch_is_said():
    model = networks.mlp()
    batch = batch_for(model)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got function"):
        gb.Step(F.relu, F.mse_loss, batch)
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        gb.Step(model, None, batch)
    with pytest.raises(ValueError, match=r"a pair \(x, y\), got Tensor. For others"):
        gb.Step(model, F.mse_loss, batch[0])
    with pytest.raises(ValueError, match=r"got tuple of 3"):
        gb.Step(model, F.mse_loss, (*batch, None))
    with pytest.raises(ValueError, match=r"one number, a tensor .*Take its mean"):
        _ = gb.Step(model, nn.CrossEntropyLoss(reduction="none"), batch).loss
    with pytest.raises(TypeError, match="'1', which is scripted"):
        gb.Step(nn.Sequential(nn.Identity(), scripted()), F.mse_loss, batch)


def scripted():
    with pytest.warns(DeprecationWarning, match="trace"):
        return torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1))


def test_a_loss_that_no_parameter_enters_is_refused():
    model = networks.mlp()
    step = gb.Step(model, lambda output, y: output.detach().sum(), batch_for(model))
    for ask in (lambda: step.gradients, step.gradient):
        with pytest.raises(RuntimeError, match=r"a trainable parameter, got .* Look for .detach"):
            ask()
    assert step.run().loss.isfinite()


def test_a_step_is_freed_when_nobody_holds_it():
    step = step_for(networks.resnet_like())
    everything(step)
    held = weakref.ref(step.activations["bn1"].activated)
    gc.disable()
    try:
        del step
        assert held() is None
    finally:
        gc.enable()


def test_lazy_layers_are_refused_until_they_have_seen_a_batch():
    model = nn.Sequential(nn.Linear(4, 3), gb.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"got '1', whose 'weight' is lazy. Run one batch"):
        gb.Step(model, nn.CrossEntropyLoss(), (torch.ones(4, 4), torch.arange(4) % 3))
    with pytest.raises(ValueError, match="is lazy"):
        gb.sites(model, torch.ones(4, 4))


def test_unknown_parameters_modules_and_wrong_shapes_are_named():
    step = step_for(networks.mlp())
    with pytest.raises(ValueError, match="each parameter given, got 'w'"):
        step.run({"w": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(5, 4\), got \(1,\)"):
        step.gradient({"0.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="each parameter given, got 'w'"):
        step.along({"w": torch.ones(1)}, [1.0])
    with pytest.raises(ValueError, match="each module named, got 'q'"):
        step.run(watch=["q"])


def test_a_batch_of_one_is_the_layers_error_and_leaves_nothing():
    model = networks.mlp()
    before = state_of(model)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        _ = step_for(model, 1).loss
    assert same(state_of(model), before)


def test_a_step_works_in_any_grad_mode():
    model = networks.mlp()
    expected = step_for(model).gradients
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            step = step_for(model)
            assert same(step.gradients, expected)
            everything(step)


# -- measure ----------------------------------------------------------------------------


def test_measure_takes_a_name_or_a_function_and_checks_what_comes_back():
    step = step_for(networks.mlp())
    memory = {}

    def count(step, memory):
        memory["n"] = memory.get("n", 0) + 1
        return {"n": torch.tensor(memory["n"], requires_grad=False)}

    gb.measure(step, count, memory)
    assert gb.measure(step, count, memory)["n"] == 2
    assert gb.measure(step, count)["n"] == 1
    with pytest.raises(ValueError, match=r"one of covariate_shift, gradients.* got 'gradient'"):
        gb.measure(step, "gradient")
    with pytest.raises(TypeError, match=r"dict of tensors by name, got .* from '<lambda>'"):
        gb.measure(step, lambda step, memory: {"n": 1.0})


def test_models_without_values_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 5), gb.BatchNorm1d(5))
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    for use in (
        lambda: gb.sites(model, x),
        lambda: gb.Step(model, nn.functional.cross_entropy, (x, y)),
        lambda: gb.check(model, x),
        lambda: gb.Recorder(model),
        lambda: gb.calibrate(model, [x]),
    ):
        with pytest.raises(ValueError, match=r"weight' .*on the device 'meta'. Move .*to_empty"):
            use()
