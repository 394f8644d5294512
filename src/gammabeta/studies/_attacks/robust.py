"""Attacked images, and a network taken back along its training to a given accuracy."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gammabeta._runs import Row, Scalar
from gammabeta.studies._nets import MLP, m2
from gammabeta.studies._train import accuracy, stream

HALVINGS = 8

State = Mapping[str, Tensor]  # a network's parameters and buffers


class Attack(NamedTuple):
    """A gradient attack: the norm ("linf" or "l2"), its bound, and the steps (1: FGSM)."""

    norm: str
    size: float
    steps: int


ATTACKS = {
    "pgd_linf": Attack("linf", 0.05, 5),
    "fgsm_linf": Attack("linf", 0.05, 1),
    "pgd_l2": Attack("l2", 1.0, 5),
    "fgsm_l2": Attack("l2", 1.0, 1),
}
NOISE = 0.5  # standard deviation
CURVES = {"pgd": (0.025, 0.05, 0.075, 0.1), "noise": (0.2, 0.3, 0.4, 0.5)}


def network(count: int, arm: str, seed: int) -> MLP:
    """The network of an arm, for images of so many pixels, before training."""
    eps = 1.0 if arm == "bn, eps 1" else 1e-5
    net = m2(count, "relu", arm != "none", stream(seed, "weights"), eps=eps)
    if arm == "bn, first layer":
        other = m2(count, "relu", False, stream(seed, "weights"))
        net.layers = nn.Sequential(*list(net.layers)[:3], *list(other.layers)[2:])
    return net


def attacked(net: MLP, x: Tensor, labels: Tensor, attack: Attack) -> Tensor:
    """Images within the bound around the rows x, and in [0, 1], that raise the cross-entropy.

    Each step goes along the gradient's sign (linf) or the gradient over its norm (l2), by the
    bound with one step and by 2.5 bounds over the steps with several, starts at x, and is put back
    into the bound and into [0, 1]. The network is run in the mode in which it is.
    """
    size, at = attack.size, x
    length = size if attack.steps == 1 else 2.5 * size / attack.steps
    for _ in range(attack.steps):
        at = at.detach().requires_grad_()
        # In float64: where the network is sure, float32 probabilities round to 0 and 1.
        loss = cross_entropy(net(at).double(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, at)
        with torch.no_grad():
            if attack.norm == "linf":
                moved = (at + length * gradient.sign() - x).clamp(-size, size)
            else:
                wide = gradient.double()  # squares of small gradients underflow in float32
                unit = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-300)
                moved = at + (length * unit).to(x.dtype) - x
                moved *= size / moved.norm(dim=1, keepdim=True).clamp_min(size)
            at = (x + moved).clamp(0, 1)
    return at.detach()


def noisy(x: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise with that standard deviation added, cut to [0, 1]."""
    return (x + spread * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def kept(net: MLP) -> State:
    """A copy of the network's state."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def between(first: State, second: State, share: float) -> State:
    """The state on the straight line from the first to the second; counters are the second's."""
    return {
        name: torch.lerp(first[name], value, share) if value.is_floating_point() else value
        for name, value in second.items()
    }


def take_back(
    net: MLP, looks: Sequence[tuple[int, State]], x: Tensor, labels: Tensor, target: float
) -> int:
    """Put the network where its accuracy on x first is the target; the step, rounded.

    ``looks`` are steps and states along its training. Between the first look at which the accuracy
    is the target or more and the look before, the straight line is halved; of the two states that
    are left the one nearer to the target is taken.
    """

    def off(state: State) -> float:
        net.load_state_dict(state)
        return accuracy(net, x, labels) - target

    reached = next((k for k, (_, state) in enumerate(looks) if off(state) >= 0), len(looks) - 1)
    (start, first), (end, second) = looks[max(reached - 1, 0)], looks[reached]
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if off(between(first, second, middle)) >= 0:
            high = middle
        else:
            low = middle
    share = min((high, low), key=lambda at: abs(off(between(first, second, at))))
    net.load_state_dict(between(first, second, share))
    return round(start + share * (end - start))


def under_attack(net: MLP, x: Tensor, labels: Tensor, seed: int) -> dict[str, Scalar]:
    """Accuracy on the images as they are and under each attack; leaves the network in eval mode."""
    net.eval()
    found: dict[str, Scalar] = {"clean": accuracy(net, x, labels)}
    for name, attack in ATTACKS.items():
        found[name] = accuracy(net, attacked(net, x, labels, attack), labels)
    found["noise"] = accuracy(net, noisy(x, NOISE, stream(seed, "noise")), labels)
    return found


def curves(net: MLP, x: Tensor, labels: Tensor, seed: int, series: str) -> Iterator[Row]:
    """Accuracy in percent over the size of PGD-5 in Linf, and of the noise."""
    net.eval()
    for curve, sizes in CURVES.items():
        for size in sizes:
            if curve == "pgd":
                images = attacked(net, x, labels, Attack("linf", size, 5))
            else:
                images = noisy(x, size, stream(seed, "noise"))
            share = 100 * accuracy(net, images, labels)
            yield {"kind": "curve", "curve": curve, "series": series, "x": size, "y": share}
