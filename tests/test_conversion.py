"""gb.convert and gb.revert: the same model with other layers, and nothing else changed."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import gammabeta as gb

OURS = {
    nn.BatchNorm1d: gb.BatchNorm1d,
    nn.BatchNorm2d: gb.BatchNorm2d,
    nn.BatchNorm3d: gb.BatchNorm3d,
}
SHAPES = {nn.BatchNorm1d: (6, 4, 5), nn.BatchNorm2d: (3, 4, 5, 2), nn.BatchNorm3d: (3, 4, 2, 3, 2)}
OPTIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"eps": 1e-3, "momentum": 0.3},
]
LOW = [torch.float16, torch.bfloat16]


class Block(nn.Module):
    """A residual block: two normalizations, one activation in between, one after the sum."""

    def __init__(self, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()

    def forward(self, x):
        h = self.conv2(self.act1(self.norm1(self.conv1(x))))
        return self.act2(self.norm2(h) + x)


class Net(nn.Module):
    """A small convolutional network with everything in its forward that convert has to see."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
        self.block = Block()
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x):
        h = F.relu(self.norm(self.block(self.stem(x))))
        return self.fc(h.mean((2, 3)))


def x_of(n=6, dtype=torch.float32, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def used(model, x, steps=2):
    """A model with parameters and statistics of its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        for _ in range(steps):
            model(x)
    return model


def everything(model):
    """Values, types, flags, hooks: all that must survive; to be compared with ==."""
    return {
        name: (
            type(module),
            module.training,
            [
                (key, value.dtype, value.device, value.tolist())
                for key, value in module.state_dict(keep_vars=True).items()
            ],
            [(key, p.requires_grad) for key, p in module.named_parameters(recurse=False)],
            [len(h) for key, h in vars(module).items() if key.endswith("hooks")],
            sorted(set(vars(module)) - {"_gammabeta_report"}),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_close(a, b, atol):
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=name)


def actions(model):
    return {row.name: row.action for row in gb.report_of(model)}


def notes(model):
    return {row.name: row.note for row in gb.report_of(model)}


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", list(OURS))
def test_a_converted_layer_computes_the_same_and_reverts_to_the_same(kind, options):
    x = torch.randn(SHAPES[kind], dtype=torch.float64)
    layer = used(kind(4, dtype=torch.float64, **options), x)
    ours = gb.convert(layer)
    assert type(ours) is OURS[kind]
    for training in (True, False):
        outputs = []
        for model in (layer, ours):
            model.train(training)
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            grads = torch.autograd.grad(y.pow(3).sum(), [leaf, *model.parameters()])
            outputs.append([y, *grads, *model.buffers()])
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    # the layer has been used in the meantime, its copy has not
    layer.train()
    assert everything(gb.revert(gb.convert(layer))) == everything(layer)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_converted_network_computes_the_same_in_both_modes(fuse, training):
    x = x_of(dtype=torch.float64)
    theirs = used(Net().double(), x).train(training)
    ours = gb.convert(theirs, fuse=fuse)
    results = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.pow(2).sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("fuse", [False, True])
def test_reverting_a_conversion_gives_back_types_values_hooks_and_attributes(fuse):
    model = used(Net(), x_of())
    model.block.norm1.weight.requires_grad_(False)
    model.norm.eval()
    model.norm.register_forward_hook(lambda module, args, output: output * 2)
    model.register_forward_pre_hook(lambda module, args: None)
    before = everything(model)
    back = gb.revert(gb.convert(model, fuse=fuse))
    assert everything(back) == before
    assert everything(model) == before
    assert list(back.state_dict()) == list(model.state_dict())
    assert torch.equal(back.eval()(x_of()), model.eval()(x_of()))


def test_the_given_model_is_not_touched_and_shares_no_memory():
    model = used(Net(), x_of())
    before = everything(model)
    ours = gb.convert(model, fuse=True, backend="reference")
    ours(x_of(seed=1))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    gb.revert(ours)
    assert everything(model) == before


def test_the_layers_know_their_names_and_their_backend():
    ours = gb.convert(Net(), backend="reference")
    assert ours.block.norm1.backend == "reference"
    with pytest.raises(RuntimeError, match=r"BatchNorm2d 'block.norm1': .*should contain 5"):
        ours.block.norm1(torch.zeros(2, 5, 3, 3))
    again = gb.convert(ours, backend="native")
    assert again.block.norm1.backend == "native"
    assert set(actions(again).values()) == {"kept"}


# --- what is kept --------------------------------------------------------------------------------


def test_a_shared_layer_stays_one_layer_and_shared_parameters_one_parameter():
    layer, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    other.weight = layer.weight
    model = nn.Sequential(layer, nn.Linear(3, 3), layer, other)
    for changed in (gb.convert(model), gb.revert(gb.convert(model))):
        assert changed[0] is changed[2]
        assert changed[0].weight is changed[3].weight
        assert changed[0] is not layer
    assert [row.name for row in gb.report_of(gb.convert(model))] == ["0", "3"]


def test_hooks_fire_on_the_converted_layer_and_not_on_the_given_one():
    seen = []
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].register_forward_hook(lambda module, args, output: seen.append(module))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    ours = gb.convert(model)
    ours(torch.randn(4, 3))
    assert seen == [ours[0]]
    assert ours[0].running_mean.mean() > 0.05  # of x + 1


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


def test_a_parametrized_layer_stays_parametrized_both_ways():
    x = torch.randn(5, 3)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    parametrize.register_parametrization(model[0], "weight", Doubled())
    with torch.no_grad():
        model[0].parametrizations.weight.original.fill_(0.75)
    wanted = model(x)
    ours = gb.convert(model, fuse=True)
    assert isinstance(ours[0], gb.BatchNorm1d)
    assert parametrize.is_parametrized(ours[0], "weight")
    assert "parametrized" in notes(ours)["0"]
    torch.testing.assert_close(ours(x), wanted)
    ours[0].parametrizations.weight.original.data.fill_(1.0)
    torch.testing.assert_close(ours[0].weight, torch.full((3,), 2.0))
    back = gb.revert(ours)
    assert parametrize.type_before_parametrizations(back[0]) is nn.BatchNorm1d
    assert not isinstance(back[0], gb.BatchNorm1d)
    parametrize.remove_parametrizations(back[0], "weight")
    assert type(back[0]) is nn.BatchNorm1d
    # the other two still have theirs
    torch.testing.assert_close(model[0].weight, torch.full((3,), 1.5))
    torch.testing.assert_close(ours[0].weight, torch.full((3,), 2.0))
    parametrize.remove_parametrizations(ours[0], "weight")
    assert type(ours[0]) is gb.BatchNorm1d


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_in_another_dtype_reverts_to_buffers_of_that_dtype(dtype, options):
    layer = nn.BatchNorm1d(3, **options).to(dtype)
    if layer.running_mean is not None:
        layer.running_mean.copy_(torch.tensor([0.1, 3.3, -7.0]))
    before = everything(layer)
    ours = gb.convert(layer)
    if layer.running_mean is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert ours.running_mean.dtype == wide
        assert torch.equal(ours.running_mean, layer.running_mean.to(wide))
    assert everything(gb.revert(ours)) == before


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_moved_to_another_dtype_reverts_to_buffers_of_that_dtype(low, affine):
    model = nn.Sequential(nn.BatchNorm1d(3, affine=affine)).to(low)
    ours = gb.convert(model)
    assert list(ours.state_dict()) == list(model.state_dict())
    for dtype in (torch.float32, torch.float64, low):
        back = gb.revert(copy.deepcopy(ours).to(dtype))
        assert everything(back) == everything(copy.deepcopy(model).to(dtype))
        assert list(dict(back.named_buffers())) == list(dict(model.named_buffers()))
        # a later move counts, whatever the dtype was before
        assert gb.revert(ours.to(torch.float32).to(low))[0].running_var.dtype == low


@pytest.mark.parametrize("low", LOW)
def test_buffers_of_another_dtype_than_the_parameters_come_back_as_they_were(low):
    model = nn.Sequential(nn.BatchNorm1d(3))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(low)
    model[0].running_var.fill_(1e5)
    ours = gb.convert(model)
    assert everything(gb.revert(ours)) == everything(model)
    assert gb.revert(ours.float())[0].running_mean.dtype == torch.float32
    narrow = nn.Sequential(nn.BatchNorm1d(3)).to(low)
    for parameter in narrow.parameters():
        parameter.data = parameter.data.float()
    assert everything(gb.revert(gb.convert(narrow))) == everything(narrow)


def test_a_variance_that_half_precision_cannot_hold_is_not_reverted():
    ours = gb.convert(nn.BatchNorm1d(2)).half()
    ours.running_var.fill_(1e5)
    back = gb.revert(ours)
    assert actions(back) == {"": "skipped"}
    assert "1e+05" in notes(back)[""]
    assert back.running_var.dtype == torch.float32


def test_meta_and_lazy_layers_are_converted_before_they_have_values():
    for kind, shape in SHAPES.items():
        lazy = getattr(nn, f"Lazy{kind.__name__}")
        model = nn.Sequential(lazy(momentum=0.3), nn.ReLU())
        ours = gb.convert(model, fuse=True)
        assert type(ours[0]) is getattr(gb, f"Lazy{kind.__name__}")
        assert "not known yet" in notes(ours)["0"]
        back = gb.revert(gb.convert(model))
        assert type(back[0]) is lazy
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), back(x))
        assert type(ours[0]) is OURS[kind]
        assert type(back[0]) is kind
        assert type(model[0]) is lazy
        torch.testing.assert_close(ours[0].running_var, back[0].running_var)
    on_meta = gb.revert(gb.convert(nn.BatchNorm2d(3, device="meta", dtype=torch.float16)))
    assert on_meta.weight.is_meta
    assert on_meta.running_var.dtype == torch.float16


def test_copies_pickles_compiled_and_traced_models_are_as_good_as_the_model():
    x = x_of()
    ours = gb.convert(used(Net(), x), fuse=True).eval()
    wanted = ours(x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), wanted)
        assert gb.report_of(other) == gb.report_of(ours)
        assert type(gb.revert(other).block.act1) is nn.ReLU
    traced = torch.fx.symbolic_trace(ours)
    assert torch.equal(traced(x), wanted)
    assert type(gb.revert(traced).get_submodule("block.act1")) is nn.ReLU
    traced = gb.convert(torch.fx.symbolic_trace(used(Net(), x)), fuse=True)
    for other in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert gb.report_of(other) == gb.report_of(traced)
        assert actions(gb.revert(other))["stem.1"] == "reverted"
        assert actions(copy.deepcopy(gb.revert(other)))["stem.1"] == "reverted"
    compiled = torch.compile(ours, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)
    converted = gb.convert(torch.compile(used(Net(), x), backend="aot_eager"))
    assert isinstance(converted._orig_mod.norm, gb.BatchNorm2d)


# --- what is skipped -----------------------------------------------------------------------------


class Mine(nn.BatchNorm2d):
    pass


def test_what_cannot_be_converted_is_left_and_named_with_the_reason():
    patched = nn.BatchNorm1d(3)
    patched.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "mine": Mine(3),
            "sync": nn.SyncBatchNorm(3),
            "patched": patched,
            "instance": nn.InstanceNorm2d(3),
            "fine": nn.BatchNorm1d(3),
        }
    )
    ours = gb.convert(model)
    assert actions(ours) == {
        "mine": "skipped",
        "sync": "skipped",
        "patched": "skipped",
        "fine": "converted",
    }
    assert [type(m) for m in ours.values()][:4] == [type(m) for m in model.values()][:4]
    assert "subclass" in notes(ours)["mine"]
    assert "gammabeta.sync_statistics" in notes(ours)["sync"]
    assert "forward of its own" in notes(ours)["patched"]


def test_a_scripted_part_is_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(torch.jit.script(nn.BatchNorm1d(3)))
    assert "torch.jit" in notes(gb.convert(model))["0"]


def test_what_pytorch_has_no_counterpart_for_is_not_reverted():
    model = nn.ModuleDict(
        {
            "biased": gb.BatchNorm1d(3, stored_variance="biased"),
            "single": gb.BatchNorm1d(3, on_single="running"),
            "frozen": gb.BatchNorm1d(3),
            "affine": gb.BatchNorm1d(3, backend="reference"),
        }
    )
    gb.freeze(model["frozen"])
    gb.freeze(model["affine"], statistics=False, affine=True)
    back = gb.revert(model)
    reasons = notes(back)
    assert "stored_variance='biased'" in reasons["biased"]
    assert "on_single='running'" in reasons["single"]
    assert "gammabeta.unfreeze" in reasons["frozen"]
    assert [type(m) for m in back.values()] == [gb.BatchNorm1d] * 3 + [nn.BatchNorm1d]
    assert "backend='reference' dropped" in reasons["affine"]
    assert not back["affine"].weight.requires_grad


def test_an_impossible_backend_and_a_wrapped_model_are_errors():
    with pytest.raises(ValueError, match=r"got 'natve'\. Did you mean 'native'"):
        gb.convert(nn.BatchNorm1d(3), backend="natve")
    wrapped = nn.Module()
    wrapped.ddp = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped.ddp)
    for function in (gb.convert, gb.revert):
        with pytest.raises(ValueError, match="DistributedDataParallel at ddp"):
            function(wrapped)
    with pytest.raises(ValueError, match="report_of"):
        gb.report_of(nn.BatchNorm1d(3))


def test_a_dry_run_changes_nothing_and_tells_everything():
    model = used(Net(), x_of())
    dry, wet = gb.convert(model, fuse=True, dry_run=True), gb.convert(model, fuse=True)
    assert everything(dry) == everything(model)
    assert dry is not model
    assert gb.report_of(dry) == gb.report_of(wet)
    text = str(gb.report_of(wet))
    assert "torch.BatchNorm2d" in text
    assert len(text.splitlines()) == 1 + len(gb.report_of(wet))


# --- fusion --------------------------------------------------------------------------------------


def test_an_activation_that_alone_takes_the_output_is_fused_and_the_rest_is_named():
    model = used(Net(), x_of())
    ours = gb.convert(model, fuse=True)
    assert actions(ours) == {
        "stem.1": "fused",
        "block.norm1": "fused",
        "block.norm2": "converted",
        "norm": "converted",
        "fc.1": "fused",
    }
    assert ours.stem[1].act == ("leaky_relu", 0.2)
    assert type(ours.stem[1]) is gb.BatchNormAct2d
    assert type(ours.stem[2]) is type(ours.block.act1) is nn.Identity
    assert type(ours.block.act2) is nn.ReLU
    assert "relu()" in notes(ours)["norm"]
    assert "add()" in notes(ours)["block.norm2"]
    assert list(ours.state_dict()) == list(model.state_dict())
    ours.load_state_dict(model.state_dict(), strict=True)
    back = gb.revert(ours)
    assert back.block.act1.inplace
    assert back.stem[2].negative_slope == 0.2


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.LeakyReLU(),
        nn.LeakyReLU(0.3, inplace=True),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.Softplus(),
        nn.SiLU(inplace=True),
        nn.GELU(),
        nn.GELU("tanh"),
    ],
    ids=str,
)
def test_every_representable_activation_is_fused_and_given_back(act):
    x = torch.randn(8, 3, dtype=torch.float64)
    model = used(nn.Sequential(nn.BatchNorm1d(3), act).double(), x)
    ours = gb.convert(model, fuse=True)
    assert actions(ours) == {"0": "fused"}
    back = gb.revert(ours)
    assert everything(back) == everything(model)
    torch.testing.assert_close(ours(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "act", [nn.Softplus(2.0), nn.Softplus(threshold=5.0), nn.ELU(), nn.PReLU()], ids=str
)
def test_an_activation_that_no_fused_layer_computes_stays(act):
    ours = gb.convert(nn.Sequential(nn.BatchNorm1d(3), act), fuse=True)
    assert actions(ours) == {"0": "converted"}
    assert "no fused layer computes" in notes(ours)["0"]
    assert type(ours[1]) is type(act)


class Odd(nn.Module):
    """A normalization and an activation in a chain that must not be fused."""

    def __init__(self, run):
        super().__init__()
        self.norm, self.act, self.run = nn.BatchNorm1d(3), nn.ReLU(), run

    def forward(self, x):
        return self.run(self, x)


def two_consumers(m, x):
    z = m.norm(x)
    return m.act(z) + z


def output_too(m, x):
    z = m.norm(x)
    return m.act(z), z


def twice(m, x):
    return m.act(m.norm(m.act(m.norm(x))))


def act_elsewhere(m, x):
    return m.act(m.norm(m.act(x)))


def only_in_training(m, x):
    z = m.norm(x)
    return m.act(z) if m.training else z.tanh()


def asks_for_kinds(m, x):
    for layer in (m.norm, m.act):
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            x = x + 100
    return x


def untraceable(m, x):
    return m.act(m.norm(x)) if x.sum() > 0 else m.norm(x)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (two_consumers, "used 2 times"),
        (output_too, "used 2 times"),
        (twice, "called 2 times"),
        (act_elsewhere, "called several times"),
        (only_in_training, "tanh()"),
        (asks_for_kinds, "kinds of its modules"),
        (untraceable, "cannot be traced"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_a_chain_whose_function_fusion_would_change_is_not_fused(run, reason):
    model = Odd(run)
    ours = gb.convert(model, fuse=True)
    assert actions(ours) == {"norm": "converted"}
    assert reason in notes(ours)["norm"]
    assert "in its place" not in notes(ours)["norm"]  # no activation would do the same
    x = torch.randn(6, 3)
    for training in (True, False):
        a, b = model.train(training)(x), ours.train(training)(x)
        torch.testing.assert_close(a, b)


def test_hooks_and_sharing_keep_an_activation_in_its_place():
    def model():
        return nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3), nn.ReLU())

    for place in (0, 1):
        hooked = model()
        hooked[place].register_forward_hook(lambda module, args, output: None)
        ours = gb.convert(hooked, fuse=True)
        assert actions(ours) == {"0": "converted", "2": "fused"}
        assert "hook" in notes(ours)["0"]
    act = nn.ReLU()
    shared = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3), act), Odd(untraceable), act)
    assert "shared with '2'" in notes(gb.convert(shared, fuse=True))["0.0"]
    layers = [nn.BatchNorm1d(3), act, nn.BatchNorm1d(3), act, nn.Tanh(), Odd(untraceable)]
    ours = gb.convert(nn.Sequential(*layers), fuse=True)
    assert "shared with" in notes(ours)["2"]
    assert type(ours[4]) is nn.Tanh


def test_a_hook_on_a_container_is_not_called_while_tracing():
    calls = []
    model = nn.Sequential(OrderedDict(inner=nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())))
    model.inner.register_forward_hook(lambda module, args, output: calls.append(output))
    ours = gb.convert(model, fuse=True)
    assert calls == []
    assert actions(ours) == {"inner.0": "converted"}


def test_tracing_leaves_no_trace():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.BatchNorm1d(3), nn.ReLU()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.last = x
            return self.act(self.norm(x + torch.rand(3)))

    model = Counting()
    state = torch.get_rng_state()
    ours = gb.convert(model, fuse=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert actions(ours) == {"norm": "fused"}
    assert model.calls == ours.calls == 0
    assert not hasattr(ours, "last")


def test_optional_arguments_are_traced_given_and_not_given():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.BatchNorm1d(3), nn.ReLU()

        def forward(self, x, skip=None):
            z = self.norm(x)
            return self.act(z) if skip is None else self.act(z) + z * skip

    ours = gb.convert(Optional(), fuse=True)
    assert actions(ours) == {"norm": "converted"}
    assert "used 2 times" in notes(ours)["norm"]


def test_only_a_whole_sequential_is_fused_where_it_cannot_be_traced():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())

        def forward(self, x):
            return self.net(x) if x.sum() > 0 else -self.net(x)

    x = torch.randn(6, 3)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Sequential(nn.ReLU()), Untraceable()
    )
    ours = gb.convert(used(model, x), fuse=True)
    assert actions(ours) == {"0.1": "fused", "2.net.0": "converted"}
    assert notes(ours)["0.1"] == "relu of '1.0'"
    assert "cannot be traced" in notes(ours)["2.net.0"]
    torch.testing.assert_close(ours(x), model(x))
    back = gb.revert(ours)
    assert type(back[0][1]) is nn.BatchNorm1d
    assert type(back[1][0]) is nn.ReLU


def features_asked_for(m, x, wanted=False):
    z = m.norm(x)
    y = m.act(z)
    return (y, z) if wanted else y


def features_asked_for_by_identity(m, x, wanted=False):
    z = m.norm(x)
    y = m.act(z)
    return (y, z) if wanted is True else y


def features_asked_for_by_one_of_two(m, x, wanted=None, other=None):
    z = m.norm(x)
    y = m.act(z)
    return (y, z) if wanted is not None and other is None else y


def indexed_where_it_cannot_be_traced(m, x, wanted=False):
    return m.net[0](x) + m.net(x) if x.sum() < 1e9 else x


def iterated_where_it_cannot_be_traced(m, x, wanted=False):
    found = [x]
    for layer in m.net if x.sum() < 1e9 else ():
        found.append(layer(found[-1]))
    return found


def kept_as_an_attribute(m, x, wanted=False):
    m.found = []
    for layer in m.net:
        x = layer(x)
        m.found.append(x)
    return x


def activation_alone_in_eval_mode(m, x, wanted=False):
    return m.act(m.norm(x)) if m.training else m.act(x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (features_asked_for, "cannot be traced with wanted given"),
        (features_asked_for_by_identity, "used 2 times"),
        (features_asked_for_by_one_of_two, "used 2 times"),
        (indexed_where_it_cannot_be_traced, "cannot be traced"),
        (iterated_where_it_cannot_be_traced, "cannot be traced"),
        (kept_as_an_attribute, "kept beyond the forward pass"),
        (activation_alone_in_eval_mode, "is called without it"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
@pytest.mark.parametrize("training", [True, False])
def test_a_second_consumer_that_only_some_calls_have_prevents_fusion(forward, reason, training):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.BatchNorm1d(3), nn.ReLU()
            self.net = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())

    Model.forward = forward
    x = torch.randn(6, 3)
    model = Model().train(training)
    ours = gb.convert(model, fuse=True)
    assert set(actions(ours).values()) == {"converted"}
    assert any(reason in note for note in notes(ours).values())
    for wanted in (False, True):
        torch.testing.assert_close(ours(x, wanted=wanted), model(x, wanted=wanted))
    torch.testing.assert_close(getattr(ours, "found", None), getattr(model, "found", None))


def test_many_optional_arguments_are_not_traced_in_every_combination():
    class Model(Block):
        def forward(self, x, a=None, b=None, c=None, d=None):
            return super().forward(x)

    assert "4 optional arguments" in notes(gb.convert(Model(), fuse=True))["norm1"]


def test_the_report_says_how_far_a_fusion_is_proved():
    ours = gb.convert(Net(), fuse=True)
    assert notes(ours)["stem.1"].endswith("as far as a trace of forward shows")
    ours = gb.convert(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), fuse=True)
    assert notes(ours) == {"0": "relu of '1'"}


def test_a_fused_layer_is_reverted_only_where_its_activation_has_a_place():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.after = gb.BatchNormAct1d(3, act="tanh"), nn.Identity()

        def forward(self, x):
            return self.after(self.norm(x, x))

    for model, reason in (
        (nn.Sequential(gb.BatchNormAct1d(3)), "an output of the model"),
        (nn.Sequential(gb.BatchNormAct1d(3), nn.Linear(3, 3)), "no nn.Identity"),
        (Residual(), "more than its input"),
    ):
        back = gb.revert(model)
        assert list(actions(back).values()) == ["skipped"]
        assert reason in gb.report_of(back)[0].note
        x = torch.randn(6, 3)
        torch.testing.assert_close(back(x), model(x))
    back = gb.revert(nn.Sequential(gb.BatchNormAct1d(3, act="tanh"), nn.Identity()))
    assert [type(m) for m in back] == [nn.BatchNorm1d, nn.Tanh]


# --- training ------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, net, **options):
        super().__init__()
        self.net, self.options = net, options

    def forward(self, x):
        h = self.net.stem(x)
        h = checkpoint(self.net.block, h, **self.options)
        return self.net.fc(F.relu(self.net.norm(h)).mean((2, 3)))


def make():
    torch.manual_seed(3)
    return Net().double()


def train(model, steps=50, midway=None):
    """SGD with momentum; ``midway`` replaces the model after half of the steps."""
    generator = torch.Generator().manual_seed(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        if midway is not None and step == steps // 2:
            model = midway(model)
            state = optimizer.state_dict()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            optimizer.load_state_dict(state)
        x = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64)
        target = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    return values(model)


@pytest.fixture(scope="module")
def pytorchs():
    return train(make())


def reloaded(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = gb.convert(make())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


MIDWAY = {
    "plain": None,
    "reverted midway": gb.revert,
    "converted back and forth midway": lambda model: gb.convert(gb.revert(model)),
    "fused midway": lambda model: gb.convert(model, fuse=True),
    "deep-copied midway": copy.deepcopy,
    "saved and loaded midway": reloaded,
}


@pytest.mark.parametrize("how", list(MIDWAY))
def test_fifty_steps_of_training_equal_pytorchs(pytorchs, how):
    assert_close(train(gb.convert(make()), midway=MIDWAY[how]), pytorchs, 1e-12)


def test_fifty_steps_with_a_conversion_midway_equal_pytorchs(pytorchs):
    assert_close(train(make(), midway=gb.convert), pytorchs, 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"use_reentrant": True},
        {"use_reentrant": True, "preserve_rng_state": False},
        {"use_reentrant": False},
        {"use_reentrant": False, "preserve_rng_state": False},
    ],
    ids=str,
)
def test_fifty_checkpointed_steps_equal_pytorchs_without_checkpoints(pytorchs, options):
    trained = train(Checkpointed(gb.convert(make()), **options))
    trained = {name.removeprefix("net."): value for name, value in trained.items()}
    assert_close(trained, pytorchs, 1e-12)
    assert trained["block.norm1.num_batches_tracked"] == 50


def test_pytorchs_own_layers_count_checkpointed_batches_twice(pytorchs):
    trained = train(Checkpointed(make(), use_reentrant=False))
    assert trained["net.block.norm1.num_batches_tracked"] == 100
    error = trained["net.block.norm1.running_var"] - pytorchs["block.norm1.running_var"]
    assert error.abs().max() > 1e-3


@pytest.mark.parametrize("function", [gb.convert, gb.revert])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (nn.BatchNorm1d, r"got the class BatchNorm1d\. Make one first"),
        (nn.BatchNorm1d(3).state_dict(), r"got a state_dict \(OrderedDict\)\. Load it into"),
        (None, r"got NoneType\. Pass the network itself"),
    ],
)
def test_what_is_no_module_is_answered_by_what_to_do(function, given, said):
    with pytest.raises(TypeError, match=rf"model must be a torch\.nn\.Module, {said}"):
        function(given)


def test_a_note_says_what_to_write_where_no_module_follows():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.relu(self.last(torch.relu(self.first(x))) + x)

    notes = {row.name: row.note for row in gb.report_of(gb.convert(Block(), fuse=True))}
    assert "gb.BatchNormAct2d(..., act='relu') in its place does it" in notes["first"]
    assert "with gb.BatchNormAct2d in its place, self.last(y, residual)" in notes["last"]

    class Cured(Block):  # as the notes say
        def __init__(self):
            super().__init__()
            self.first, self.last = gb.BatchNormAct2d(4), gb.BatchNormAct2d(4)

        def forward(self, x):
            return self.last(self.first(x), x)

    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(Cured()(x), Block()(x))
