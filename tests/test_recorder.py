"""The recorder: it changes nothing, knows its cost, and no trouble of its own ends a training."""

import copy
import functools
import gc
import json
import logging
import math
import signal
import time
import warnings

import pytest
import ranks
import torch
import torch.distributed as dist
from networks import batch_for, conv_residual, functional_net, mlp, resnet_like
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import gammabeta as gb
from gammabeta.probes import recorder

NETS = {
    "mlp": mlp,
    "residual": conv_residual,
    "resnet": resnet_like,
    "functional": functional_net,
    "torch": lambda: resnet_like(norm="nn"),
    "dropout": lambda: nn.Sequential(mlp()[:3], nn.Dropout(0.5), mlp()[3:]),
}


def batches_of(net, steps, n=16):
    net = net if hasattr(net, "sample_size") else mlp()
    return [batch_for(net, n, seed=3 + k) for k in range(steps)]


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def train(net, batches, optimizer=None, rec=None, loss_fn=cross_entropy):
    """An ordinary loop; what the recorder gave at each step."""
    optimizer = optimizer or sgd(net)
    seen = []
    for x, y in batches:
        if rec is not None:
            seen.append(rec.step(loss_fn, (x, y)))
        optimizer.zero_grad()
        loss_fn(net(x), y).backward()
        optimizer.step()
    return seen


def fixed(step, memory):
    """A probe that needs nothing of the step."""
    memory["calls"] = memory.get("calls", 0) + 1
    return {"calls": torch.tensor(memory["calls"]), "a/one": torch.ones(2)}


def failing(step, memory):
    raise RuntimeError("no\nsuch thing")


# --- it changes nothing ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_training_with_a_recorder_is_bit_for_bit_the_training_without(name, kind, tmp_path):
    finals = []
    for recorded in (False, True):
        torch.manual_seed(7)
        net = NETS[name]().train()
        optimizer = sgd(net) if kind == "sgd" else torch.optim.Adam(net.parameters(), 0.01)
        rec = None
        if recorded:
            path = tmp_path / "record.jsonl"
            rec = gb.Recorder(net, optimizer=optimizer, every=2, path=path, max_overhead=None)
        train(net, batches_of(net, 7), optimizer, rec)
        random = torch.rand(3)
        finals.append((net.state_dict(), optimizer.state_dict()["state"], random))
    assert len(gb.read_record(path).steps) == 4
    (one, state, random), (two, other, same) = finals
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(random, same)
    for place, held in state.items():
        assert all(torch.equal(held[k], other[place][k]) for k in held if torch.is_tensor(held[k]))


def test_the_numbers_before_the_forward_are_those_of_the_step_that_is_made():
    """Same parameters, same batch, same dropout mask: the gradient is the one of the loop."""
    torch.manual_seed(0)
    net = NETS["dropout"]().train()
    rec = gb.Recorder(net, every=1)
    for x, y in batches_of(net, 2):
        seen = rec.step(cross_entropy, (x, y))["gradients"]
        net.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        for name, p in net.named_parameters():
            layer, _, what = name.rpartition(".")
            if what == "weight" and p.dim() > 1:
                assert seen[f"{layer}/norm"].item() == pytest.approx(p.grad.norm().item(), rel=1e-9)
        assert rec.record().series["loss"].values[-1] == pytest.approx(loss.item(), rel=1e-8)


# --- when -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "steps"),
    [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6]), (lambda k: k in (1, 5), [1, 5]), (99, [0])],
    ids=["each", "third", "function", "first"],
)
def test_records_are_taken_at_the_steps_of_the_schedule(every, steps):
    net = mlp()
    rec = gb.Recorder(net, every=every, probes=(fixed,), max_overhead=None)
    seen = train(net, batches_of(net, 8), rec=rec)
    assert rec.record().steps == steps
    assert [k for k, values in enumerate(seen) if values is not None] == steps
    assert rec.steps == 8
    assert rec.record().about["every"] == (None if callable(every) else every)


def slow(step, memory, seconds=0.005):
    time.sleep(seconds)
    return {"one": torch.ones(())}


@pytest.mark.parametrize("limit", [0.05, 0.5])
def test_the_schedule_is_thinned_to_the_limit(limit):
    net = mlp()
    rec = gb.Recorder(net, every=1, probes=(slow,), max_overhead=limit)
    (batch,) = batches_of(net, 1)
    for _ in range(200):
        rec.step(cross_entropy, batch)
        time.sleep(0.002)
    record = rec.record()
    assert 2 <= len(record.steps) < 200
    assert len(record.steps) + rec.skipped == 200
    assert record.steps[:2] == [0, 1]
    # up to the limit less the room for what is not seen, if a record costs what the last one did:
    # where the machine makes one dearer than another, by that much more
    costs = record.series["seconds"].values
    uneven = float(max(costs) - min(costs)) * rec.overhead / float(sum(costs))
    assert 0.45 * limit < rec.overhead < limit + uneven


def test_what_a_process_meets_but_once_is_no_cost_of_the_recorder():
    class Compiled(nn.Module):
        met = False

        def forward(self, x):
            time.sleep(0 if Compiled.met else 0.5)
            Compiled.met = True
            return x

    net = nn.Sequential(mlp(), Compiled())
    rec = gb.Recorder(net, every=2, max_overhead=None)
    for _ in range(4):
        rec.step(cross_entropy, batch_for(mlp()))
    assert max(rec.record().series["seconds"].values) < 0.4
    assert rec.overhead < 0.8  # of the loop, that half a second


@pytest.mark.parametrize(("skipped", "said"), [(3, True), (2, False)])
def test_where_most_records_were_skipped_the_end_says_so(skipped, said, caplog):
    rec = gb.Recorder(nn.Linear(2, 1), every=1, probes=("weights",))
    loads = iter([0.0, 0.0, *[9.0] * skipped])
    rec._clock.next_overhead = lambda: next(loads)
    batch = torch.ones(2, 2), torch.ones(2, 1)
    for _ in range(2 + skipped):
        rec.step(nn.functional.mse_loss, batch)
    assert rec.skipped == skipped
    with caplog.at_level(logging.INFO, "gammabeta"):
        del rec
        gc.collect()
    assert ("3 of 5 records that were due were skipped" in caplog.text) == said
    assert ("max_overhead=0.05" in caplog.text) == said


def test_x_and_y_one_by_one_are_answered_by_what_to_write():
    rec = gb.Recorder(nn.Linear(2, 1))
    with pytest.raises(TypeError, match=r"give \(x, y\) as a pair, rec\.step\(loss_fn, \(x, y\)\)"):
        rec.step(nn.functional.mse_loss, torch.ones(2, 2), torch.ones(2, 1))
    assert rec.steps == 0


def test_without_a_limit_nothing_is_skipped():
    net = mlp()
    rec = gb.Recorder(net, every=1, probes=(slow,), max_overhead=None)
    train(net, batches_of(net, 10), rec=rec)
    assert len(rec.record().steps) == 10
    assert rec.skipped == 0
    assert rec.overhead > 0.05


def test_the_overhead_is_the_time_of_the_records_by_that_of_the_rest():
    net = mlp()
    probe = functools.partial(slow, seconds=0.05)
    rec = gb.Recorder(net, every=2, probes=(probe,), max_overhead=None)
    (batch,) = batches_of(net, 1)
    assert rec.overhead == 0
    for _ in range(6):
        rec.step(cross_entropy, batch)
        time.sleep(0.05)
    # 3 records of 50 ms, 6 steps of 50 ms; a loaded machine sleeps longer in both
    assert 0.35 < rec.overhead < 0.7
    assert rec.record().series["overhead"].steps == [2, 4]  # at first there was no loop yet
    series = rec.record().series
    assert series["slow/one"].steps == series["seconds"].steps == [0, 2, 4]
    assert all(0.05 <= cost < 0.2 for cost in series["seconds"].values)


# --- what a record holds --------------------------------------------------------------------


def test_the_file_and_what_step_returned_agree(tmp_path):
    net = conv_residual()
    rec = gb.Recorder(net, optimizer=sgd(net), every=1, path=tmp_path / "r.jsonl")
    seen = train(net, batches_of(net, 2), rec=rec)
    record = gb.read_record(tmp_path / "r.jsonl")
    assert record == rec.record()
    names = set()
    for place, values in enumerate(seen):
        for probe, found in values.items():
            for name, value in found.items():
                series = record.series[f"{probe}/{name}"]
                held = series.values[series.steps.index(place)]
                torch.testing.assert_close(torch.tensor(held).double(), value.double())
                names.add(f"{probe}/{name}")
    assert names | {"loss", "seconds", "overhead"} == set(record.series)
    assert record.about["model"] == "_ResNet"
    assert record.about["parameters"] == sum(p.numel() for p in net.parameters())


def test_a_probe_keeps_its_own_memory_and_quantities_that_need_an_optimizer_are_absent():
    net = mlp()
    rec = gb.Recorder(net, every=1, probes=("weights", fixed), max_overhead=None)
    train(net, batches_of(net, 3), rec=rec)
    series = rec.record().series
    assert series["fixed/calls"].values == [1, 2, 3]
    assert series["weights/0/growth"].steps == [1, 2]
    assert not any("effective_lr" in name for name in series)
    assert any("No optimizer" in note for note in rec.record().about["notes"])


def test_what_a_probe_returns_may_be_the_models_own_memory():
    net = mlp()
    rec = gb.Recorder(net, every=1, probes=(lambda step, memory: {"w": step.model[0].weight},))
    (first, second) = train(net, batches_of(net, 2), rec=rec)
    assert not torch.equal(first["<lambda>"]["w"], second["<lambda>"]["w"])


def test_in_memory_records_are_bounded_and_keep_the_whole_course(monkeypatch):
    monkeypatch.setattr(recorder, "_KEPT", 60)
    net = mlp()
    rec = gb.Recorder(net, every=1, probes=(fixed,), max_overhead=None)
    (batch,) = batches_of(net, 1)
    for _ in range(300):
        rec.step(cross_entropy, batch)
    steps = rec.record().steps
    assert 10 <= len(steps) <= 20
    assert steps[0] == 0
    assert steps[-1] > 250


@pytest.mark.parametrize("probe", [recorder.probe("weights"), "weights"])
def test_a_probe_is_named_by_its_file_or_its_function(probe):
    assert gb.Recorder(mlp(), probes=(probe,)).record().about["probes"] == ["weights"]
    part = functools.partial(functools.partial(slow, seconds=0))
    assert gb.Recorder(mlp(), probes=(part,)).record().about["probes"] == ["slow"]


# --- going on -------------------------------------------------------------------------------


def test_a_file_is_continued_after_its_last_record(tmp_path, caplog):
    path = tmp_path / "r.jsonl"
    net = mlp()
    for count in (5, 4):
        rec = gb.Recorder(net, every=2, probes=(fixed,), path=path, max_overhead=None)
        train(net, batches_of(net, count), rec=rec)
    record = gb.read_record(path)
    assert record.steps == [0, 2, 4, 6, 8]
    assert record.resumed == [5]
    assert "continued from step 5" in caplog.text


def test_a_checkpoint_goes_on_as_if_it_had_not_been_interrupted(tmp_path):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    batches = batches_of(mlp(), 9)

    def start(path):
        net = mlp()
        optimizer = sgd(net)
        return net, optimizer, gb.Recorder(net, optimizer=optimizer, every=1, path=path,
                                           max_overhead=None)  # fmt: skip

    net, optimizer, rec = start(whole)
    train(net, batches, optimizer, rec)

    net, optimizer, rec = start(broken)
    train(net, batches[:4], optimizer, rec)
    torch.save([net.state_dict(), optimizer.state_dict(), rec.state_dict()], tmp_path / "c.pt")
    train(net, batches[4:7], optimizer, rec)  # and then it is killed

    net, optimizer, rec = start(broken)
    saved = torch.load(tmp_path / "c.pt")
    for thing, state in zip((net, optimizer, rec), saved, strict=True):
        thing.load_state_dict(state)
    assert rec.overhead > 0
    train(net, batches[4:], optimizer, rec)

    one, two = gb.read_record(whole), gb.read_record(broken)
    assert two.resumed == [4]
    assert one.steps == two.steps == list(range(9))
    for name in one.series.keys() - {"seconds", "overhead"}:
        assert one.series[name] == two.series[name], name


def _train_for_ever(rank, path):
    torch.set_num_threads(1)
    net = mlp()
    rec = gb.Recorder(net, every=1, path=path, max_overhead=None)
    while True:
        rec.step(cross_entropy, batch_for(net, 16))


def test_a_killed_training_leaves_whole_lines_and_is_resumed(tmp_path):
    """SIGKILL at any moment, several times; then the file has every step once."""
    path = tmp_path / "r.jsonl"

    def lines():
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for delay in (0.3, 0.41):
        wanted = lines() + 6
        (process,) = ranks.start(_train_for_ever, 1, str(path)).processes
        while lines() < wanted:
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.join()
    record = gb.read_record(path)
    assert record.steps == list(range(len(record.steps)))
    assert len(record.steps) > 10
    assert len(record.resumed) == 1


def test_an_unfinished_line_is_dropped_and_said(tmp_path, caplog):
    path = tmp_path / "r.jsonl"
    net = mlp()
    train(net, batches_of(net, 3), rec=gb.Recorder(net, every=1, path=path, max_overhead=None))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with caplog.at_level(logging.WARNING, "gammabeta"):
        rec = gb.Recorder(net, every=1, path=path)
    assert "was not finished" in caplog.text
    assert rec.steps == 2
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:-1])


def test_ctrl_c_goes_through_and_the_loop_can_go_on(tmp_path):
    path = tmp_path / "r.jsonl"
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    interrupts = iter([False, True, False])

    def interrupted(step, memory):
        if next(interrupts):
            signal.raise_signal(signal.SIGINT)
        return {"loss": step.loss}

    rec = gb.Recorder(net, every=1, probes=(fixed, interrupted), path=path, max_overhead=None)
    (batch,) = batches_of(net, 1)
    rec.step(cross_entropy, batch)
    with pytest.raises(KeyboardInterrupt):
        rec.step(cross_entropy, batch)
    rec.step(cross_entropy, batch)
    assert gb.read_record(path).steps == [0, 2]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


# --- trouble of its own does not end a training ---------------------------------------------


def test_a_probe_that_raises_is_warned_of_once_noted_and_left_out():
    net = mlp()
    rec = gb.Recorder(net, every=1, probes=(failing, fixed), max_overhead=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = train(net, batches_of(net, 3), rec=rec)
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert warning.filename == __file__
    message = str(warning.message)
    assert "the probe 'failing' failed at step 0: RuntimeError: no such thing" in message
    assert [*seen[0]] == ["fixed"]
    assert rec.record().errors == [(k, "failing", "RuntimeError: no such thing") for k in range(3)]
    assert rec.record().series["fixed/calls"].values == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"big": torch.zeros(10_001)}, "at most 10000 entries"),
        ({"cube": torch.zeros(2, 2, 2)}, r"shape \(2, 2, 2\)"),
        ({"i": torch.tensor(1j)}, "a real number"),
        ({"a\nb": torch.tensor(1.0)}, "a printable name"),
        ({3: torch.tensor(1.0)}, "a printable name"),
        (None, r"TypeError: a probe must return a dict .* got None from '<lambda>'. Return {}"),
        ([1.0], r"TypeError: a probe must return a dict .* got \[1.0\] from '<lambda>'"),
        ({"text": "three"}, "TypeError"),
    ],
    ids=["big", "cube", "complex", "newline", "number", "none", "list", "text"],
)
def test_what_a_probe_must_not_return_is_its_error(value, message, tmp_path):
    rec = gb.Recorder(mlp(), probes=(lambda step, memory: value,), path=tmp_path / "r.jsonl")
    with pytest.warns(RuntimeWarning, match=message):
        assert rec.step(cross_entropy, batch_for(mlp())) == {}
    assert gb.read_record(tmp_path / "r.jsonl").steps == [0]


def test_a_training_that_diverges_is_recorded():
    net = mlp()
    with torch.no_grad():
        net[0].weight.fill_(math.inf)
    rec = gb.Recorder(net, probes=("weights",))
    rec.step(cross_entropy, batch_for(net))
    assert rec.record().series["weights/0/norm"].values == [math.inf]


def test_a_file_that_was_removed_is_begun_anew_and_no_newer_step_is_lost(tmp_path):
    path = tmp_path / "below" / "r.jsonl"
    net = mlp()
    rec = gb.Recorder(net, every=1, probes=(fixed,), path=path, max_overhead=None)
    batches = batches_of(net, 4)
    train(net, batches[:1], rec=rec)
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(FileNotFoundError, match=r"none at .*r.jsonl: it was removed or renamed"):
        rec.record()
    with pytest.warns(RuntimeWarning, match="failed at step 1: .*removed or renamed; a new file"):
        train(net, batches[1:3], rec=rec)
    train(net, batches[3:], rec=rec)
    assert rec.record().steps == gb.read_record(path).steps == [1, 2, 3]
    assert rec.record().series["fixed/calls"].values == [2.0, 3.0, 4.0]


def test_a_file_that_cannot_be_written_is_warned_of_once(tmp_path):
    path = tmp_path / "r.jsonl"
    net = mlp()
    rec = gb.Recorder(net, every=1, probes=(fixed,), path=path, max_overhead=None)
    batches = batches_of(net, 4)
    train(net, batches[:1], rec=rec)
    kept = path.rename(tmp_path / "kept.jsonl")
    path.mkdir()
    with pytest.warns(RuntimeWarning, match="the record failed at step 1: Is a dir") as caught:
        train(net, batches[1:3], rec=rec)
    assert len(caught) == 1
    path.rmdir()
    kept.rename(path)  # there is room again
    train(net, batches[3:], rec=rec)
    assert gb.read_record(path).steps == [0, 3]


# --- models of all kinds --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch's own
@pytest.mark.parametrize("way", ["wrapped", "in place", "part in place"])
def test_a_compiled_model_is_measured_through_its_original(way):
    net, plain = mlp(), mlp()
    batch = batch_for(net)
    model = net
    if way == "wrapped":
        model = torch.compile(net, backend="aot_eager")
    else:
        (net if way == "in place" else net[0]).compile(backend="aot_eager")
    cross_entropy(model(batch[0]), batch[1])
    rec, other = gb.Recorder(model), gb.Recorder(plain)
    for one in (model, plain):
        one(batch[0])
    found, wanted = rec.step(cross_entropy, batch), other.step(cross_entropy, batch)
    assert found.keys() == wanted.keys()
    for probe, values in wanted.items():
        assert values.keys() == found[probe].keys()
        for name, value in values.items():
            torch.testing.assert_close(found[probe][name], value)
    notes = " ".join(rec.record().about["notes"])
    assert ("original module" in notes) == (way == "wrapped")


def test_a_model_without_normalization_and_a_frozen_one_are_measured():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batch = torch.randn(5, 3), torch.randn(5, 2)
    seen = gb.Recorder(net).step(mse_loss, batch)
    assert "0/norm" in seen["weights"]
    frozen = mlp().requires_grad_(False)
    gb.freeze(frozen)
    rec = gb.Recorder(frozen, probes=("weights", "gradients"))
    assert rec.step(cross_entropy, batch_for(frozen)) is not None
    assert rec.record().errors == []


def test_outputs_that_are_no_tensor_go_by_forward():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return {"logits": self.net(x), "more": x}

    model = Pair()
    x, y = batch_for(mlp())
    rec = gb.Recorder(model, max_overhead=None, every=1)
    with pytest.warns(RuntimeWarning, match="must return a tensor"):
        rec.step(cross_entropy, (x, y))
    seen = rec.step(None, (x, y), forward=lambda m, b: cross_entropy(m(b[0])["logits"], b[1]))
    assert "net.0/norm" in seen["gradients"]


def test_accumulated_gradients_are_those_of_a_forward_that_sums_the_parts():
    net = mlp()
    parts = batches_of(net, 4)
    rec = gb.Recorder(net, probes=("gradients",))
    seen = rec.step(
        None, parts, forward=lambda m, b: sum(cross_entropy(m(x), y) for x, y in b) / len(b)
    )["gradients"]
    for x, y in parts:
        (cross_entropy(net(x), y) / len(parts)).backward()
    assert seen["0/norm"].item() == pytest.approx(net[0].weight.grad.norm().item(), rel=1e-9)


def test_a_batch_of_one_is_the_probes_error_and_the_training_decides_itself():
    net = mlp()
    rec = gb.Recorder(net, probes=("gradients",))
    with pytest.warns(RuntimeWarning, match="more than 1 value per channel"):
        rec.step(cross_entropy, batch_for(net, 1))


def test_a_sharded_model_is_refused():
    class FSDPModule(nn.Module):
        pass

    with pytest.raises(TypeError, match="sharded by FSDP"):
        gb.Recorder(nn.Sequential(FSDPModule()))


# --- wrong inputs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": 3}, TypeError, "must be a torch.nn.Module, got int"),
        ({"every": 0}, ValueError, "from 1 on, got 0"),
        ({"every": True}, TypeError, "a function of the step"),
        ({"every": "2"}, TypeError, "a function of the step"),
        ({"max_overhead": 0}, ValueError, "above 0, got 0"),
        ({"max_overhead": math.nan}, ValueError, "above 0, got nan"),
        ({"probes": "weights"}, TypeError, r"Write probes=\('weights',\)"),
        ({"probes": ("wieghts",)}, ValueError, "covariate_shift.*got 'wieghts'"),
        ({"optimizer": "adam"}, TypeError, "must be a torch.optim.Optimizer, got str"),
        ({"optimizer": sgd(mlp())}, ValueError, "holds none of them.*gb.convert"),
        ({"probes": (3,)}, TypeError, "a name or a function"),
        ({"probes": ("weights", "weights")}, ValueError, "two of the name 'weights'"),
    ],
)
def test_wrong_arguments_are_said_at_once(given, error, message):
    with pytest.raises(error, match=message):
        gb.Recorder(**{"model": mlp(), **given})


def test_a_batch_that_is_no_pair_is_said_at_once():
    with pytest.raises(ValueError, match="a pair"):
        gb.Recorder(mlp()).step(cross_entropy, torch.ones(3))


def test_a_path_that_cannot_be_written_is_said_before_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        gb.Recorder(mlp(), path=tmp_path / "file" / "r.jsonl")
    with pytest.raises(ValueError, match="a file, got a folder"):
        gb.Recorder(mlp(), path=tmp_path)
    gb.Recorder(mlp(), path=tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="another path"):
        gb.Recorder(conv_residual(), path=tmp_path / "r.jsonl")


def test_a_state_of_something_else_is_refused():
    rec = gb.Recorder(mlp())
    with pytest.raises(ValueError, match="no 'steps'"):
        rec.load_state_dict({})


# --- several processes ----------------------------------------------------------------------


def _rank(rank, folder, shared):
    warnings.simplefilter("ignore")
    ranks.meet(rank, 2, folder)
    net = mlp()
    if shared:
        gb.sync_statistics(net)

    def slow(step, memory):
        time.sleep(0.02 * (1 + 3 * rank))
        return {"rank": torch.tensor(rank)}

    ddp = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    rec = gb.Recorder(ddp, optimizer=optimizer, every=1, probes=("weights", "gradients", slow),
                      path=f"{folder}/r.jsonl", max_overhead=0.01)  # fmt: skip
    for k in range(12):
        x, y = batch_for(net, 8, seed=2 * k + rank)
        rec.step(cross_entropy, (x, y))
        optimizer.zero_grad()
        cross_entropy(ddp(x), y).backward()
        optimizer.step()
    torch.save([net.state_dict(), rec.skipped], f"{folder}/{rank}.pt")
    dist.barrier()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_of_several_processes_rank_0_writes_and_the_record_says_what_that_means(kind, tmp_path):
    ranks.end(ranks.start(_rank, 2, str(tmp_path), kind == "shared"))
    record = gb.read_record(tmp_path / "r.jsonl")
    assert record.errors == []
    assert set(record.series["slow/rank"].values) == {0}
    assert 2 <= len(record.steps) < 12
    notes = " ".join(record.about["notes"])
    assert "of rank 0 of 2 alone" in notes
    assert ("those of all ranks together" in notes) == (kind == "shared")
    (one, skipped), (two, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one if "running" not in k)
    assert kind == "own" or skipped == other == 12 - len(record.steps)
    header = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])
    assert header["model"] == "Sequential"


def test_a_recorder_says_what_it_has_done(tmp_path):
    net, path = mlp(), tmp_path / "record.jsonl"
    rec = gb.Recorder(net, every=2, probes=("weights", fixed), path=path, max_overhead=None)
    assert f"{path}: 0 steps seen, 0 records taken, probes weights fixed, 0 % of" in repr(rec)
    train(net, batches_of(net, 3), rec=rec)
    assert repr(rec).startswith(f"<gammabeta.Recorder {path}: 3 steps seen, 2 records taken, ")
    share = float(repr(rec).rpartition(" % of")[0].rpartition(" ")[2])
    assert share == pytest.approx(100 * rec.overhead, rel=0.2)
    held = gb.Recorder(net, every=lambda step: step == 0, probes=())
    train(net, batches_of(net, 1), rec=held)
    assert "in memory: 1 step seen, 1 record taken, probes none" in repr(held)
    held.skipped = 2
    assert "2 skipped" in repr(held)
