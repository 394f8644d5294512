"""Synchronized statistics: several processes compute what one computes on the whole batch."""

import pytest
import ranks as ranks_of
import sync_worker
import torch
import torch.distributed as dist
from sync_worker import inputs, make_layer, step
from torch import nn

import gammabeta as gb

SIZES = {2: [5, 11], 3: [5, 0, 11]}
# of these every rank has its own samples' part; the others are equal on all ranks
OWN = {"y", "dx", "dresidual", "ddx"}
SUMMED = {"dweight", "dbias", "ddweight"}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of all groups at once: each waits some seconds for a rank that does not come."""
    folders = {size: tmp_path_factory.mktemp("ranks") for size in SIZES}
    started = [
        ranks_of.start(sync_worker.main, size, size, str(folder), SIZES[size])
        for size, folder in folders.items()
    ]
    for group in started:
        ranks_of.end(group)
    return {
        size: [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(size)]
        for size, folder in folders.items()
    }


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request, results):
    return results[request.param]


def whole(ranks, law: str, name: str) -> torch.Tensor:
    parts = [found["laws"][law][name] for found in ranks]
    if name in OWN:
        return torch.cat(parts)
    if name in SUMMED:
        return torch.stack(parts).sum(0)
    assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between the ranks"
    return parts[0]


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_ranks_of_any_size_compute_what_one_process_does_to_the_second_derivative(
    ranks, act, masked
):
    x, residual, target, mask = inputs()
    alone = step(make_layer(act), x, residual, target, mask if masked else None)
    for name, value in alone.items():
        together = whole(ranks, f"act={act} mask={masked}", name)
        torch.testing.assert_close(together, value, rtol=1e-10, atol=1e-10, msg=name)


def test_half_precision_and_channels_last_are_synchronized_too(ranks):
    x, residual, target, _ = inputs(torch.bfloat16)
    alone = step(make_layer(False, torch.bfloat16), x, residual, target, None, False)
    for name, value in alone.items():
        # one rounding to bfloat16; a sum of them for the parameters, which are bfloat16 too
        together = whole(ranks, "bfloat16", name)
        torch.testing.assert_close(together.float(), value.float(), rtol=2e-2, atol=2e-2, msg=name)
    x, _, target, _ = inputs(torch.float32, (16, 3, 4, 4))
    alone = step(gb.BatchNorm2d(3), x, x, target, None, False)
    for name, value in alone.items():
        together = whole(ranks, "channels-last", name)
        torch.testing.assert_close(together, value, rtol=1e-5, atol=1e-5, msg=name)
    part = ranks[-1]["laws"]["channels-last"]["y"]
    assert part.is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_layer_is_synchronized_too(ranks):
    x, *_ = inputs()
    alone = make_layer(False)(x)
    torch.testing.assert_close(
        whole(ranks, "compiled", "y"), alone.detach(), rtol=1e-10, atol=1e-10
    )


def test_training_inside_distributed_data_parallel_is_training_on_the_whole_batch(ranks):
    x, *_ = inputs(shape=(16, 3))
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 3), gb.BatchNorm1d(3), nn.Linear(3, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        for found in ranks:
            torch.testing.assert_close(found["training"][name], value, rtol=1e-9, atol=1e-9)


def test_ranks_that_meet_in_different_layers_raise_everywhere_and_name_both(ranks):
    for found in ranks:
        message = found["faults"]["different layers"]
        assert message.startswith("RuntimeError")
        assert "'one'" in message
        assert "'two'" in message
        assert "same order" in message


def test_layers_that_were_synchronized_one_by_one_are_told_apart(ranks):
    for found in ranks:
        assert "same order" in found["faults"]["nameless"]


def test_one_value_per_channel_over_all_ranks_is_treated_as_on_one_process(ranks):
    for found in ranks:
        faults = found["faults"]
        assert "Expected more than 1 value per channel" in faults["single error"]
        assert faults["single running"] == ""
        assert faults["after single error"] == faults["after single running"] == 0
        assert faults["after nothing"] == 1  # counted, as on one process


def test_a_rank_that_does_not_come_ends_in_the_groups_timeout(ranks):
    for rank, found in enumerate(ranks[:-1]):
        message, seconds = found["absent"]["message"], found["absent"]["seconds"]
        assert f"rank {rank} of {len(ranks)}, call 1" in message
        assert "BatchNorm1d" in message
        assert 3 < seconds < 20


def test_other_channel_counts_raise_everywhere_and_name_both(ranks):
    if len(ranks) == 3:
        pytest.skip("the same code as with two ranks")
    for found in ranks:
        message, seconds = found["channels"]["message"], found["channels"]["seconds"]
        assert "with 3 channels" in message
        assert "with 4 channels" in message
        assert "call 1" in message
        assert seconds < 20


def test_more_channels_than_one_message_holds_are_synchronized_too(ranks):
    x, _, target, _ = inputs(shape=(16, 1500))
    alone = step(gb.BatchNorm1d(1500).double(), x, x, target, None, False)
    for name, value in alone.items():
        together = whole(ranks, "many channels", name)
        torch.testing.assert_close(together, value, rtol=1e-10, atol=1e-10, msg=name)


def test_a_group_is_shared_by_deepcopy_and_dropped_with_a_notice_by_pickle(ranks):
    for found in ranks:
        faults = found["faults"]
        assert faults["copied"]
        assert faults["pickled group"] is None
        assert "cannot be pickled" in faults["pickled"][0]
        assert faults["local"]


def test_synchronizing_without_a_process_group_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"init_process_group"):
        gb.sync_statistics(gb.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"gammabeta\.convert"):
        gb.sync_statistics(nn.BatchNorm1d(2))
