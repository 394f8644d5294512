"""Outputs that are computed again: the gradients of the default, bit for bit, from less memory."""

import copy
import gc
import itertools
import json
import random
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path

import cases
import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import gammabeta as gb
from benchmarks import memory
from benchmarks.memory import BATCH, FEWER, NETWORKS, Variant, allocated, kept_bytes
from gammabeta.ops import _recompute
from gammabeta.ops._cpu import _autograd, _compile

pytestmark = [
    pytest.mark.skipif(_compile.missing() is not None, reason=f"{_compile.missing()}"),
    # PyTorch compiles decompositions of its own at the first use of forward mode.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]

ROOT = Path(__file__).resolve().parents[1]
ROW = (6, 5)
BIG = (8, 16, 32, 32)  # beyond the way for small inputs


def layer_of(shape=ROW, act="relu", **options):
    kind = {2: gb.BatchNormAct1d, 3: gb.BatchNormAct1d, 4: gb.BatchNormAct2d, 5: gb.BatchNormAct3d}
    layer = kind[len(shape)](shape[1], act=act, **options)
    if layer.weight is not None:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


class Scale(nn.Module):
    """A layer that keeps its input, of any shape: what a convolution is to a tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.7))

    def forward(self, x):
        return x * self.weight


class Net(nn.Module):
    """A normalization and a layer that keeps what it gets."""

    def __init__(self, *args, between=lambda y: y, **options):
        super().__init__()
        self.first, self.bn, self.last = Scale(), layer_of(*args, **options), Scale()
        self.between = between

    def forward(self, x, mask=None):
        return self.last(self.between(self.bn(self.first(x), mask=mask)))


def gradients(model, forward, recompute, again=False):
    """Of all parameters after ``forward(model)``, which gives a loss."""
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = None
    with gb.recompute_outputs() if recompute else nullcontext():
        loss = forward(model)
    if again:
        loss.backward(retain_graph=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def agree(model, forward, **options):
    """The gradients with and without the context are the same bits; how often y was made again."""
    twin = copy.deepcopy(model)
    before = gradients(twin, forward, False, **options)
    count = Count()
    with count:
        after = gradients(model, forward, True, **options)
    assert any(g is not None for g in before.values())
    for name, gradient in before.items():
        assert (gradient is None) == (after[name] is None), name
        assert gradient is None or torch.equal(gradient, after[name]), name
    return count.calls


class Count:
    """How often an output is computed again inside; it is, all the same."""

    def __enter__(self):
        self.calls, self.repeat = 0, _autograd.repeat
        _autograd.repeat = self.called
        return self

    def called(self, *args):
        self.calls += 1
        return self.repeat(*args)

    def __exit__(self, *_):
        _autograd.repeat = self.repeat


# -- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", [*cases.FEW, BIG], ids=str)
def test_gradients_are_those_of_the_default_in_every_layout(shape, layout):
    x = cases.LAYOUTS[layout](torch.randn(shape))
    calls = agree(Net(shape), lambda net: net(x).square().sum())
    assert calls == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", cases.ACTS, ids=str)
@pytest.mark.parametrize("shape", [(60, 100), BIG], ids=str)
def test_gradients_are_those_of_the_default_for_every_activation(shape, act, dtype):
    x = torch.randn(shape).to(dtype)
    assert agree(Net(shape, act).to(dtype), lambda net: net(x).square().sum()) == 1


@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_gradients_are_those_of_the_default_under_a_mask(act):
    x, mask = torch.randn(6, 5, 7), torch.rand(6, 7) > 0.3
    assert agree(Net(x.shape, act), lambda net: net(x, mask).square().sum()) == 1


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("shape", [ROW, BIG], ids=str)
def test_gradients_are_those_of_the_default_in_eval_mode(shape, act):
    net, x = Net(shape, act), torch.randn(shape)
    net(x + 1)
    net.eval()
    assert agree(net, lambda net: net(x).square().sum()) == 1


def test_a_layer_without_parameters_is_made_again_from_its_input_alone():
    x = torch.randn(ROW)
    assert agree(Net(ROW, affine=False), lambda net: net(x).square().sum()) == 1


def test_the_plain_layers_outputs_are_made_again_too():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), gb.BatchNorm2d(4), nn.Conv2d(4, 5, 3))
    x = torch.randn(2, 3, 9, 9)
    assert agree(net, lambda net: net(x).square().sum()) == 1


def test_an_output_that_another_layer_of_ours_takes_is_made_again_through_both():
    net = nn.Sequential(Scale(), *(layer_of() for _ in range(3)), Scale())
    x = torch.randn(ROW)
    # the first for the second, the second for the third, the third: each once
    assert agree(net, lambda net: net(x).square().sum()) == 3


@pytest.mark.parametrize("act", [None, "relu", "leaky_relu"])
def test_gradients_are_those_of_the_default_when_the_threads_change_in_between(act):
    x = torch.randn(BIG)

    def forward(net):
        torch.set_num_threads(2)
        loss = net(x).square().sum()
        torch.set_num_threads(1)
        return loss

    assert agree(Net(BIG, act), forward) == 1


def test_statistics_are_entered_once():
    net, twin = Net(BIG), Net(BIG)
    x = torch.randn(BIG)
    gradients(net, lambda net: net(x).sum(), True)
    gradients(twin, lambda net: net(x).sum(), False)
    assert net.bn.num_batches_tracked == 1
    assert torch.equal(net.bn.running_var, twin.bn.running_var)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_keeps_fewer_bytes(name):
    default, less = (Variant(kind, NETWORKS[name]) for kind in ("gammabeta", "recompute"))
    for variant in (default, less):
        variant.x, variant.y = variant.x[:4], variant.y[:4]
        variant.step()
    many, few = default.kept()[0], less.kept()[0]
    assert few <= (1 - FEWER[name]) * many
    assert many > 4 * BATCH[2] * BATCH[3] * 16 * 4  # activations were counted
    for one, other in zip(default.step(), less.step(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(allocated() is None, reason="the allocator of this system does not tell")
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_allocator_has_given_out_what_is_counted_as_kept(recompute):
    net, x = Net((32, 64, 32, 32)), torch.randn(32, 64, 32, 32)
    for _ in range(2):
        gradients(net, lambda net: net(x).sum(), recompute)
    before = allocated()
    with gb.recompute_outputs() if recompute else nullcontext():
        loss = net(x).sum()
    grown = allocated() - before
    kept = kept_bytes(loss, net, x)
    assert kept == pytest.approx(x.nbytes * (1 if recompute else 2), rel=1e-3)
    assert grown == pytest.approx(kept, rel=0.01)


def test_nobody_holds_an_output_or_its_memory_once_the_next_layer_has_run():
    net, x = Net(BIG), torch.randn(BIG)
    found = []
    net.between = lambda y: found.extend((weakref.ref(y), memory_of(y))) or y
    gc.disable()
    try:
        with gb.recompute_outputs():
            loss = net(x).sum()
            y, storage = found
            assert y() is None
            assert storage.expired()
    finally:
        gc.enable()
    loss.backward()


def test_a_chain_of_normalizations_keeps_its_first_input_alone():
    net, x = nn.Sequential(Scale(), *(layer_of(BIG) for _ in range(3)), Scale()), torch.randn(BIG)
    with gb.recompute_outputs():
        loss = net(x).sum()
    assert kept_bytes(loss, net, x) == pytest.approx(x.nbytes, rel=0.01)


def memory_of(t):
    return StorageWeakRef(t.untyped_storage())


@pytest.mark.parametrize("when", ["inside", "after"])
def test_what_was_kept_goes_with_the_graph_without_the_garbage_collector(when):
    net, found = Net(BIG), []
    net.between = lambda y: found.append(memory_of(y)) or y.sigmoid()
    image = torch.randn(BIG, requires_grad=True) * 1
    found.append(memory_of(image))
    gc.disable()
    try:
        with gb.recompute_outputs():
            activated = net.between(net.bn(image))
            found.append(memory_of(activated))
            loss = net.last(activated)
            del activated, image
            if when == "inside":
                del loss
                assert all(storage.expired() for storage in found)
        if when == "after":
            del loss
            assert all(storage.expired() for storage in found)
    finally:
        gc.enable()


def test_an_output_that_is_held_holds_its_input_no_longer_than_the_context():
    net, outputs = Net(BIG), []
    net.between = lambda y: outputs.append(y) or y
    image = torch.randn(BIG, requires_grad=True) * 1
    storage = memory_of(image)
    with gb.recompute_outputs():
        net.last(net.between(net.bn(image))).sum().backward()
        del image
    assert storage.expired()


@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_an_output_made_with_a_residual_is_kept(act):
    x, residual = torch.randn(2, *BIG)
    bn, last = layer_of(BIG, act), Scale()

    def forward(net):
        return net[1](net[0](x, residual)).square().sum()

    net = nn.ModuleList([bn, last])
    assert agree(net, forward) == 0


@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_behind_a_residual_one_bit_of_each_element_is_kept(act):
    x, residual = torch.randn(2, *BIG, requires_grad=True)
    bn = layer_of(BIG, act)
    kept = kept_bytes(bn(x, residual), bn, x)
    assert x.numel() / 8 <= kept <= x.numel() / 8 + 100 * BIG[1]


def test_behind_a_residual_and_a_smooth_activation_the_residual_itself_is_kept():
    x, residual = torch.randn(BIG), torch.randn(BIG)
    bn = layer_of(BIG, "silu")
    y = bn(x, residual)
    assert kept_bytes(y, bn, x, residual) <= 100 * BIG[1]
    assert kept_bytes(y, bn, x) >= residual.nbytes


@pytest.mark.parametrize("act", cases.ACTS, ids=str)
def test_without_a_residual_x_alone_is_kept(act):
    x = torch.randn(BIG)
    bn = layer_of(BIG, act)
    assert kept_bytes(bn(x), bn, x) <= 100 * BIG[1]


def table(head):
    """The cells below the row of docs/memory.md that begins with ``head``."""
    lines = (ROOT / "docs" / "memory.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_document_says_what_each_activation_keeps():
    for act, *shown in table("activation"):
        parsed = None if act == "None" else act
        plain, added = memory.layer(parsed, False), memory.layer(parsed, True)
        found = [plain["torch"], plain["gammabeta"], added["torch"], added["gammabeta"]]
        assert shown == [f"{value:.3f}" for value in found], act


def test_the_document_says_what_each_layer_keeps():
    for name, *shown in table("layer"):
        found = memory.other(name)
        assert shown == [f"{found[key]:.3f}" for key in ("alone", "next", "recompute")], name


def test_the_document_says_what_the_networks_keep():
    results = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())
    shown = {name: cells for name, *cells in table("network")}
    assert len(shown) == len(results["networks"])
    for row in results["networks"]:
        kept = [row["kept_bytes"][kind] for kind in memory.VARIANTS]
        fewer = f"{100 * (1 - kept[2] / kept[0]):.1f} %"
        assert shown[row["network"]] == [*(f"{v / 2**20:.1f}" for v in kept), fewer]
        assert kept[2] <= (1 - FEWER[row["network"]]) * kept[0]
        for kind, grown in row["allocated_bytes"].items():
            assert grown is None or grown == pytest.approx(row["kept_bytes"][kind], rel=0.01)


# -- several layers, several passes ---------------------------------------------------------------


def test_an_output_is_made_once_in_a_pass_for_all_who_ask():
    net = nn.ModuleDict({"bn": layer_of(), **{k: Scale() for k in "abc"}})
    x = torch.randn(ROW)

    def forward(net):
        y = net["bn"](x)
        return sum(net[k](y).pow(i + 2).sum() for i, k in enumerate("abc"))

    assert agree(net, forward) == 1
    assert agree(net, forward, again=True) == 2


def test_a_retained_graph_gives_the_same_gradients_twice():
    x = torch.randn(BIG)
    assert agree(Net(BIG), lambda net: net(x).square().sum(), again=True) == 2


def test_passes_through_parts_of_a_graph_give_the_gradients_of_the_default():
    net = nn.ModuleDict({"bn": layer_of(), "a": Scale(), "b": Scale()})
    x, found = torch.randn(ROW, requires_grad=True), {}
    for recompute in (False, True):
        with gb.recompute_outputs() if recompute else nullcontext():
            y = net["bn"](x)
            first, second = net["a"](y).square().sum(), net["b"](y).exp().sum()
            del y
        found[recompute] = [
            torch.autograd.grad(loss, inputs, retain_graph=True)[0]
            for loss, inputs in [
                (first, net["a"].weight),
                (first, x),
                (second, net["b"].weight),
                (first + second, net["bn"].weight),
            ]
        ]
    for one, other in zip(found[False], found[True], strict=True):
        assert torch.equal(one, other)


def test_the_backward_may_run_inside_or_after():
    net, x = Net(), torch.randn(ROW)
    expected = gradients(copy.deepcopy(net), lambda net: net(x).square().sum(), False)
    with gb.recompute_outputs():
        net(x).square().sum().backward()
        net(x).square().sum().backward()
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, 2 * expected[name])


def test_second_derivatives_are_those_of_the_default():
    net, found = Net(ROW, "silu"), {}
    for recompute in (False, True):
        x = torch.arange(30.0).view(ROW).sin().requires_grad_()
        with gb.recompute_outputs() if recompute else nullcontext():
            loss = net(x).pow(3).sum()
            inputs = (x, *net.parameters())
            first = torch.autograd.grad(loss, inputs, create_graph=True)
            penalty = sum(g.square().sum() for g in first)
        found[recompute] = torch.autograd.grad(penalty, inputs)
    for one, other in zip(found[False], found[True], strict=True):
        assert torch.equal(one, other)
        assert one.abs().max() > 0


# -- views and detached branches ------------------------------------------------------------------

VIEWS = {
    "flatten": lambda y: y.flatten(1),
    "transposed": lambda y: y.transpose(0, 1),
    "channels": lambda y: y[:, 1:3],
    "every other": lambda y: y[::2, :, 1:],
    "view of a view": lambda y: y[1:].permute(2, 0, 1)[:, :, None],
    "expanded": lambda y: y[:, :, :1].expand(-1, -1, 9),
    "unfold": lambda y: y.unfold(2, 3, 1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_an_output_is_made_again(view):
    x = torch.randn(6, 5, 7)
    assert agree(Net(x.shape, between=VIEWS[view]), lambda net: net(x).square().sum()) == 1


def test_a_view_with_its_signs_changed_is_kept():
    x = torch.randn(ROW)
    net = Net(between=lambda y: torch._neg_view(y))
    assert agree(net, lambda net: net(x).square().sum()) == 0


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_detached_branch_gets_the_gradients_of_the_default(order):
    net = nn.ModuleDict({"bn": layer_of(), "main": Scale(), "branch": Scale()})
    x = torch.randn(ROW)

    def forward(net):
        y = net["bn"](x)
        branch = net["branch"](y.detach()).square().sum() if order == "before" else 0
        main = net["main"](y).square().sum()
        if order == "after":
            branch = net["branch"](y.detach()).square().sum()
        return main + branch

    assert agree(net, forward) == 1


def test_an_output_outside_of_autograd_is_kept_as_ever():
    net, x = Net(), torch.randn(ROW)

    def forward(net):
        with torch.no_grad():
            y = net.bn(x)
        return net.last(y).square().sum()

    assert agree(net, forward) == 0


def test_an_output_whose_memory_was_exchanged_is_kept():
    def exchange(y):
        y.data = y.detach() * 3
        return y

    x = torch.randn(ROW)
    assert agree(Net(between=exchange), lambda net: net(x).square().sum()) == 0


# -- changes in between ---------------------------------------------------------------------------

CHANGES = {
    "weight": lambda net, x, y: net.bn.weight.add_(1),
    "bias": lambda net, x, y: net.bn.bias.mul_(2),
    "x": lambda net, x, y: x.add_(1),
    "y": lambda net, x, y: y.relu_(),
    "a view of y": lambda net, x, y: y[1:].zero_(),
    "detached y": lambda net, x, y: y.detach().zero_(),
    "the next layer's weight": lambda net, x, y: net.last.weight.zero_(),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["default", "recomputed"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_after_the_forward_pass_raises_as_in_pytorch(what, recompute):
    net, leaf = Net(), torch.randn(ROW, requires_grad=True)
    x = leaf * 1
    with gb.recompute_outputs() if recompute else nullcontext():
        y = net.bn(x)
        loss = net.last(y).sum()
    with torch.no_grad():
        CHANGES[what](net, x, y)
    del y
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_optimizers_step_before_the_backward_raises_and_says_what_to_do():
    net = Net()
    with gb.recompute_outputs():
        first, second = net(torch.randn(ROW)).sum(), net(torch.randn(ROW)).square().sum()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"expected version 0 instead.*Call backward before"):
        second.backward()


def through_a_view(y):
    y[1:].mul_(3)
    return y


WRITES = {
    "relu_": lambda y: y.relu_(),
    "mul_": lambda y: y.mul_(2),
    "through a view": through_a_view,
    "through a detached view": lambda y: (y.detach().mul_(3), y)[1],
}


@pytest.mark.parametrize("write", WRITES)
def test_an_output_that_was_written_to_is_kept(write):
    x = torch.randn(ROW)
    net = Net(ROW, None, between=WRITES[write])
    assert agree(net, lambda net: net(x).square().sum()) == 0


def test_the_memory_of_a_written_output_is_kept_under_any_name():
    """Old code detaches with .data, whose version does not tell of writes."""
    x = torch.randn(ROW)

    def between(y):
        z = y.relu_().data
        del y
        return z

    assert agree(Net(ROW, None, between=between), lambda net: net(x).square().sum()) == 0


# -- company --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoints_inside_give_the_gradients_of_the_default(reentrant):
    net = nn.Sequential(Scale(), layer_of(BIG), Net(BIG), layer_of(BIG), Scale())
    x = torch.randn(BIG)

    def forward(net):
        y = net[1](net[0](x))
        y = checkpoint(net[2], y, use_reentrant=reentrant)
        return net[4](net[3](y)).square().sum()

    calls = agree(net, forward)
    # the checkpoint keeps its input through the context; it was not kept, either
    assert calls == 2
    assert net[2].bn.num_batches_tracked == 1


def test_inside_a_checkpoint_nothing_is_held():
    bn, x = layer_of(BIG), torch.randn(BIG, requires_grad=True)
    inputs, outputs = [], []

    def part(x):
        image = x * 1
        inputs.append(memory_of(image))
        outputs.append(bn(image))
        return outputs[0]

    with gb.recompute_outputs():
        loss = checkpoint(part, x, use_reentrant=False).sum()
        assert inputs[0].expired()
    loss.backward()


def test_hooks_of_others_inside_decide_what_is_kept():
    net, x = Net(), torch.randn(ROW)
    saved = []

    def forward(net):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            return net(x).square().sum()

    assert agree(net, forward) == 0
    assert saved

    def around(net):
        y = net.bn(net.first(x))
        with save_on_cpu():
            return net.last(y).square().sum()

    assert agree(net, around) == 0


def test_inside_the_hooks_of_others_the_context_works():
    net, x = Net(), torch.randn(ROW)
    with Count() as count, save_on_cpu(), gb.recompute_outputs():
        loss = net(x).square().sum()
    with count:
        loss.backward()
    assert count.calls == 1


def test_nested_contexts_know_each_others_outputs():
    net, x = Net(), torch.randn(ROW)

    def forward(net):
        y = net.bn(net.first(x))
        with gb.recompute_outputs():
            loss = net.last(y).square().sum()
            z = net.bn(net.first(x))
        return loss + net.last(z).square().sum()

    assert agree(net, forward) == 2


def test_an_exception_ends_the_context():
    with pytest.raises(ZeroDivisionError), gb.recompute_outputs(), gb.recompute_outputs():
        _ = 1 / 0
    assert _autograd.made is None
    assert _recompute._here.outputs is None
    net, x = Net(), torch.randn(ROW)
    with Count() as count:
        net(x).sum().backward()
    assert count.calls == 0


def test_outside_the_kernels_tell_nobody():
    assert _autograd.made is None
    with gb.recompute_outputs():
        assert _autograd.made is not None
    assert _autograd.made is None


def test_the_context_holds_for_its_thread_alone():
    nets = [Net(BIG) for _ in range(4)]
    x = torch.randn(BIG)
    expected = [gradients(copy.deepcopy(n), lambda n: n(x).square().sum(), False) for n in nets]
    inside, outside = threading.Barrier(4), threading.Barrier(4)
    kept, errors = {}, []

    def work(index):
        try:
            with gb.recompute_outputs() if index % 2 else nullcontext():
                inside.wait(60)
                loss = nets[index](x).square().sum()
                kept[index] = kept_bytes(loss, nets[index], x)
                outside.wait(60)
            loss.backward()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert kept[0] == kept[2] == kept[1] + x.nbytes == kept[3] + x.nbytes
    for net, wanted in zip(nets, expected, strict=True):
        for name, p in net.named_parameters():
            assert torch.equal(p.grad, wanted[name])
    assert _autograd.made is None


def test_a_thread_that_leaves_ends_no_other_threads_context():
    net, x = Net(BIG), torch.randn(BIG)
    entered, left = threading.Event(), threading.Event()

    def visit():
        with gb.recompute_outputs():
            entered.set()
            left.wait(60)

    thread = threading.Thread(target=visit)
    thread.start()
    assert entered.wait(60)
    with gb.recompute_outputs():
        left.set()
        thread.join()
        loss = net(x).sum()
    assert kept_bytes(loss, net, x) < 1.5 * x.nbytes


def test_another_thread_may_run_the_backward():
    net, x = Net(), torch.randn(ROW)
    expected = gradients(copy.deepcopy(net), lambda net: net(x).square().sum(), False)
    with gb.recompute_outputs():
        loss = net(x).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, expected[name])


def test_a_copied_model_has_gradients_of_its_own():
    net, x = Net(), torch.randn(ROW)
    expected = gradients(copy.deepcopy(net), lambda net: net(x).square().sum(), False)
    with gb.recompute_outputs():
        loss = net(x).square().sum()
        twin = copy.deepcopy(net)
        other = twin(x).square().sum()
    with torch.no_grad():
        for p in twin.parameters():
            p.grad = None
    loss.backward()
    assert all(p.grad is None for p in twin.parameters())
    other.backward()
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, expected[name])
    for name, p in twin.named_parameters():
        assert torch.equal(p.grad, expected[name])


# -- other ways to compute ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_outputs_of_other_backends_are_kept(backend):
    x = torch.randn(ROW)
    net = Net(ROW, None, backend=backend)
    assert agree(net, lambda net: net(x).square().sum()) == 0


def test_outputs_in_float64_are_kept():
    x = torch.randn(ROW).double()
    assert agree(Net().double(), lambda net: net(x).square().sum()) == 0


def test_under_the_profiler_outputs_are_kept():
    net, x = Net(), torch.randn(ROW)

    def forward(net):
        with profile():
            return net(x).square().sum()

    assert agree(net, forward) == 0


def test_a_compiled_model_gets_the_gradients_of_the_default():
    net, x = Net(), torch.randn(ROW)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    expected = gradients(net, lambda net: compiled(x).square().sum(), False)
    found = gradients(net, lambda net: compiled(x).square().sum(), True)
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name])


def test_transforms_of_torch_func_are_refused_by_pytorch():
    net, x = Net().eval(), torch.randn(ROW)
    values = dict(net.named_parameters())

    def loss(values):
        return torch.func.functional_call(net, values, (x,)).sum()

    with gb.recompute_outputs(), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(loss)(values)


# -- at random ------------------------------------------------------------------------------------


def program(seed, layers, scales, x):
    """A random chain and web of calls; a loss, and errors as PyTorch raises them."""
    choose = random.Random(seed)
    pool = [x * 1]
    for _ in range(choose.randint(3, 9)):
        t = choose.choice(pool[-3:])
        step = choose.choice(["bn", "bn", "bn", "scale", "scale", "square", "write", "view", "cut"])
        if step == "bn":
            pool.append(choose.choice(layers)(t))
        elif step == "scale":
            pool.append(choose.choice(scales)(t))
        elif step == "square":
            pool.append(t.square())
        elif step == "write":
            pool.append(choose.choice((torch.relu_, torch.sigmoid_, torch.neg_))(t))
        elif step == "view":
            pool.append(choose.choice((t.flip(0), t.view(ROW), t[:])))
        else:
            pool.append(t.detach())
    return sum(t.mean() for t in pool if t.requires_grad) + scales[0].weight


@pytest.mark.parametrize("part", range(4))
def test_random_programs_have_the_gradients_or_the_error_of_the_default(part):
    errors, calls = 0, 0
    for seed in range(part * 60, part * 60 + 60):
        torch.manual_seed(seed)
        layers = [layer_of(ROW, act) for act in (None, "relu", "silu")]
        net = nn.ModuleList([*layers, Scale(), Scale()])
        x = torch.randn(ROW)

        def forward(net, seed=seed, x=x):
            return program(seed, net[:3], net[3:], x)

        outcomes = []
        for recompute in (False, True):
            twin = copy.deepcopy(net)
            with Count() as count:
                try:
                    outcomes.append(gradients(twin, forward, recompute))
                except RuntimeError as error:
                    outcomes.append(str(error))
        calls += count.calls
        default, ours = outcomes
        if isinstance(default, str):
            errors += 1
            assert "modified by an inplace operation" in default, seed
            assert "modified by an inplace operation" in ours, seed
            continue
        for name, gradient in default.items():
            assert (gradient is None) == (ours[name] is None), (seed, name)
            if gradient is not None:
                assert torch.equal(gradient.nan_to_num(), ours[name].nan_to_num()), (seed, name)
    assert 0 < errors < 50  # both kinds of programs were among them
    assert calls > 20
