"""One trained network, evaluated in every way that statistics can be had."""

import copy

import torch
from torch import Tensor, nn

from gammabeta._check import check
from gammabeta._runs import Scalar
from gammabeta.models.calibration import calibrate
from gammabeta.studies._nets import MLP
from gammabeta.studies._train import accuracy

SIZES = {1: 1024, 2: 1024, 8: 4096, 64: 4096}  # size of a test batch -> images, at most
REFERENCE = 2000  # images whose statistics are taken again
_PART = 1000  # images in one forward pass


def share(logits: Tensor, labels: Tensor) -> float:
    """Share of the labels that the logits have on top."""
    return float((logits.argmax(1) == labels).double().mean())


def with_population(net: MLP, x: Tensor) -> MLP:
    """A copy of the network whose running statistics are those of all of x."""
    other = copy.deepcopy(net)
    calibrate(other, torch.split(x, _PART))
    return other


def in_training_mode(net: MLP, x: Tensor, labels: Tensor, size: int) -> float:
    """Accuracy with x normalized in batches of ``size`` by their own statistics."""
    with torch.no_grad():
        return share(net.with_batch_statistics(x, size), labels)


def raises(net: MLP, x: Tensor) -> bool:
    """Whether training mode refuses this batch."""
    try:
        copy.deepcopy(net).train()(x)
    except ValueError:
        return True
    return False


def forgotten(net: MLP, x: Tensor) -> MLP:
    """A copy of the network after somebody evaluated x in batches of 64 without calling eval()."""
    other = copy.deepcopy(net).train()
    with torch.no_grad():
        for part in torch.split(x, 64):
            other(part)
    return other


def drift(net: MLP, other: MLP) -> float:
    """RMS change of the running means, in running standard deviations."""
    before, after = net.state_dict(), other.state_dict()
    moved = []
    for name, mean in before.items():
        if name.endswith("running_mean"):
            var = before[name.replace("mean", "var")]
            moved.append((after[name] - mean) / var.sqrt())
    return float(torch.cat(moved).square().mean().sqrt())


def flags(net: MLP, x: Tensor, labels: Tensor) -> dict[str, Scalar]:
    """What training mode costs at evaluation, by size and order of the batches."""
    order = labels.argsort(stable=True)
    found: dict[str, Scalar] = {
        f"batch_{m}": in_training_mode(net, x[:most], labels[:most], m) for m, most in SIZES.items()
    }
    few = min(SIZES.values())
    found["running_few"] = accuracy(net, x[:few], labels[:few])
    found["whole"] = in_training_mode(net, x, labels, len(x))
    found["sorted"] = in_training_mode(net, x[order], labels[order], 64)
    found["raised"] = float(raises(net, x[:1]))
    for name, images in (("shuffled", x), ("sorted", x[order])):
        other = forgotten(net, images)
        found[f"after_{name}"] = accuracy(other, x, labels)
        found[f"drift_{name}"] = drift(net, other)
    careless = check(copy.deepcopy(net), x[:64], evaluate=_careless, select="BN003")
    found["named"] = float(any(finding.code == "BN003" for finding in careless))
    return found


def _careless(model: nn.Module, batch: Tensor) -> None:
    """An evaluation that forgets eval()."""
    model.train()
    with torch.no_grad():
        model(batch)


# -- shifted domains ------------------------------------------------------------------------------


def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise with standard deviation 0.6, cut to [0, 1]."""
    return (x + 0.6 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def flat(x: Tensor, generator: torch.Generator) -> Tensor:
    """A third of the contrast, around each image's mean."""
    mean = x.mean(1, keepdim=True)
    return mean + (x - mean) / 3


def blurred(x: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur with a standard deviation of 1/14 of the side (2 pixels of 28)."""
    side = round(x.shape[1] ** 0.5)
    spread = side / 14
    at = torch.arange(side)
    apart = (at[:, None] - at).double()
    kernel = torch.exp(-((apart / spread) ** 2) / 2) * (apart.abs() <= round(3 * spread))
    # What leaves the image is lost: a row near the edge sums to less than one.
    kernel = (kernel / kernel.sum(1).max()).to(x.dtype)
    found: Tensor = kernel @ x.view(-1, side, side) @ kernel
    return found.flatten(1)


DOMAINS = {"noise": noisy, "contrast": flat, "blur": blurred}


def domains(
    net: MLP, x: Tensor, labels: Tensor, reference: Tensor, generator: torch.Generator
) -> dict[str, Scalar]:
    """Accuracy on shifted images, by statistics of clean ones and of shifted ones.

    ``reference`` are clean training images. "wrong": clean test images by statistics of shifted.
    """
    clean = with_population(net, reference)
    found: dict[str, Scalar] = {"clean": accuracy(clean, x, labels)}
    for name, shift in DOMAINS.items():
        shifted = shift(x, generator)
        again = with_population(net, shift(reference, generator))
        found[f"{name}_before"] = accuracy(clean, shifted, labels)
        found[f"{name}_after"] = accuracy(again, shifted, labels)
        found[f"{name}_wrong"] = accuracy(again, x, labels)
    return found
