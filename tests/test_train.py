"""The training loop of the studies, against PyTorch's own layers and optimizers."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from gammabeta.studies._data import Images
from gammabeta.studies._nets import m2
from gammabeta.studies._train import batches, fair_split, stream, train

IMAGES = torch.randint(0, 256, (200, 6, 6), dtype=torch.uint8, generator=stream(0, "images"))
LABELS = torch.randint(0, 10, (200,), generator=stream(0, "labels"))


def _plain(net, optimizer, loss, steps):
    net.train()
    order = batches(200, 16, stream(1, "order"))
    for _, index in zip(range(steps), order, strict=False):
        optimizer.zero_grad()
        x = IMAGES.flatten(1)[index].float() / 255
        cross_entropy(net(x), LABELS[index], reduction=loss).backward()
        optimizer.step()


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_is_that_of_pytorchs_optimizers(optimizer, loss):
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    ours, plain = (m2(36, "sigmoid", True, stream(3, "weights")) for _ in range(2))
    pauses = train(
        ours,
        IMAGES,
        LABELS,
        pixel_max=255,
        rate=0.01,
        steps=20,
        order=stream(1, "order"),
        stops=(7, 20),
        batch=16,
        loss=loss,
        optimizer=optimizer,
    )
    assert [step for step, _ in pauses] == [7, 20]
    _plain(plain, made[optimizer](plain.parameters(), lr=0.01), loss, 20)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_an_unknown_optimizer_is_refused():
    net = m2(36, "relu", False, stream(0, "weights"))
    pauses = train(
        net,
        IMAGES,
        LABELS,
        pixel_max=255,
        rate=0.1,
        steps=1,
        order=stream(0, "order"),
        stops=(),
        optimizer="lion",
    )
    with pytest.raises(ValueError, match='"sgd" or "adam"'):
        next(pauses)


@pytest.mark.parametrize("evaluation", ["validation", "test"])
def test_a_fair_split_is_drawn_by_the_seed_from_the_first_55000_images(evaluation):
    blank = torch.zeros(60000, 1, 1, dtype=torch.uint8)
    mnist = Images("mnist", "0" * 16, blank, torch.arange(60000), blank[:9], -torch.arange(9))
    _, drawn, _, held = fair_split(mnist, 0, evaluation, 700)
    assert len(drawn.unique()) == 700
    assert drawn.max() < 55000
    wanted = torch.arange(55000, 60000) if evaluation == "validation" else mnist.test_y
    assert torch.equal(held, wanted)
    assert not torch.equal(drawn, fair_split(mnist, 1, evaluation, 700)[1])
    digits = mnist._replace(name="digits", train_x=blank[:1797], train_y=torch.arange(1797))
    _, drawn, _, held = fair_split(digits, 0, evaluation)
    assert len(torch.cat([drawn, held]).unique()) == 1000 + (
        297 if evaluation == "validation" else 500
    )


def test_a_split_for_another_evaluation_is_refused():
    blank = torch.zeros(1797, 1, 1, dtype=torch.uint8)
    digits = Images("digits", "0" * 16, blank, torch.arange(1797), blank[:9], torch.arange(9))
    with pytest.raises(ValueError, match="'training'"):
        fair_split(digits, 0, "training")
