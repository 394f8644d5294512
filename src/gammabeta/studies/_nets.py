"""The networks of the studies, drawn from a generator so that both arms of a pair start alike."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.ops import batch_norm

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class MLP(nn.Module):
    """Dense layers with an activation between them; batch normalization before it, if asked for.

    z = W x (+ b), then BN(z) where ``norm`` is True, then the activation; the last layer is
    linear. W is drawn from a normal distribution with standard deviation sqrt(2 / fan_in),
    truncated at two of them (which leaves 0.8796 of it). A layer that BN follows has no bias; all
    others start at bias 0.1. The draws do not depend on ``activation`` or ``norm``.

    Args:
        sizes: widths from the input to the output, at least two.
        activation: a key of ``ACTIVATIONS``.
        norm: whether BN stands before each activation.
        generator: source of the weights.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics, as in PyTorch.

    Raises:
        ValueError: an unknown activation or fewer than two sizes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str,
        norm: bool,
        generator: torch.Generator,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation must be one of {known}, got {activation!r}.")
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold an input and an output, got {list(sizes)}.")
        layers: list[nn.Module] = []
        for depth, (fan_in, width) in enumerate(itertools.pairwise(sizes), start=1):
            hidden = depth < len(sizes) - 1
            layers.append(_linear(fan_in, width, bias=not (norm and hidden), generator=generator))
            if norm and hidden:
                layers.append(BatchNorm1d(width, eps=eps, momentum=momentum))
            if hidden:
                layers.append(ACTIVATIONS[activation]())
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (N, sizes[-1]) for x of shape (N, sizes[0])."""
        logits: Tensor = self.layers(x)
        return logits

    def with_batch_statistics(self, x: Tensor) -> Tensor:
        """Logits with x normalized by its own statistics, as one batch.

        What training mode computes, but through the pure function: running statistics neither
        enter nor change, in whatever mode the network is.
        """
        for layer in self.layers:
            if isinstance(layer, BatchNorm1d):
                x, _ = batch_norm(x, layer.weight, layer.bias, eps=layer.eps)
            else:
                x = layer(x)
        return x


def m2(
    pixels: int,
    activation: str,
    norm: bool,
    generator: torch.Generator,
    *,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> MLP:
    """The network of the MNIST study: pixels-100-100-10.

    >>> sum(p.numel() for p in m2(784, "relu", False, torch.Generator()).parameters())
    89610
    """
    return MLP((pixels, 100, 100, 10), activation, norm, generator, eps=eps, momentum=momentum)


def _linear(fan_in: int, width: int, bias: bool, generator: torch.Generator) -> nn.Linear:
    # PyTorch's own initialization would draw from the global random state.
    with torch.random.fork_rng(devices=()):
        layer = nn.Linear(fan_in, width, bias=bias)
    std = math.sqrt(2 / fan_in)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    if bias:
        nn.init.constant_(layer.bias, 0.1)
    return layer
