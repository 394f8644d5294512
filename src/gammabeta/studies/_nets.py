"""The networks of the studies, drawn from a generator so that both arms of a pair start alike."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gammabeta.layers._running import RunningMoments
from gammabeta.layers.batch_norm import BatchNorm1d
from gammabeta.layers.renorm import BatchRenorm1d
from gammabeta.ops import batch_norm

Norm = bool | Callable[[int], nn.Module]
"""Whether batch normalization stands before each activation, or which layer, made by its width."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class MLP(nn.Module):
    """Dense layers with an activation between them; batch normalization before it, if asked for.

    z = W x (+ b), then BN(z) where ``norm`` asks for it, then the activation; the last layer is
    linear. W is drawn from a normal distribution with standard deviation sqrt(2 / fan_in),
    truncated at two of them (which leaves 0.8796 of it). A layer that BN follows has no bias; all
    others start at bias 0.1. The draws do not depend on ``activation`` or ``norm``.

    Args:
        sizes: widths from the input to the output, at least two.
        activation: a key of ``ACTIVATIONS``.
        norm: whether BN stands before each activation, or what stands there: a function of the
            width that makes the layer.
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
        norm: Norm,
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
            if callable(norm) and hidden:
                layers.append(norm(width))
            elif norm and hidden:
                layers.append(BatchNorm1d(width, eps=eps, momentum=momentum))
            if hidden:
                layers.append(ACTIVATIONS[activation]())
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (N, sizes[-1]) for x of shape (N, sizes[0])."""
        logits: Tensor = self.layers(x)
        return logits

    def with_batch_statistics(self, x: Tensor, size: int | None = None) -> Tensor:
        """Logits with x normalized by its own statistics, as one batch or in batches of ``size``.

        What a layer of plain batch normalization computes in training mode, but through the pure
        function: running statistics neither enter nor change, in whatever mode the network is.
        Whatever a method beside it does in training is left out.
        """
        if size is not None and len(x) % size:
            raise ValueError(f"batches of {size} need a multiple of it in images, got {len(x)}.")
        for layer in self.layers:
            if isinstance(layer, RunningMoments):
                parts = [x] if size is None else torch.split(x, size)
                eps = layer._epsilon()
                ys = [batch_norm(part, layer.weight, layer.bias, eps=eps)[0] for part in parts]
                x = ys[0] if len(ys) == 1 else torch.cat(ys)
            else:
                x = layer(x)
        return x

    def with_statistics_of(self, reference: Tensor, x: Tensor) -> Tensor:
        """Logits with x normalized by the statistics of ``reference``, as one batch.

        With many training images as the reference these are the population statistics, free of the
        history of a moving average.
        """
        for layer in self.layers:
            if isinstance(layer, RunningMoments):
                affine, eps = (layer.weight, layer.bias), layer._epsilon()
                reference, moments = batch_norm(reference, *affine, eps=eps)
                x, _ = batch_norm(x, *affine, moments=moments, eps=eps)
            else:
                reference, x = layer(reference), layer(x)
        return x


class LateRenorm1d(BatchNorm1d):
    """Batch Renormalization as the MNIST study wrote it: r and d after gamma and beta.

    In training y = (gamma xhat + beta) r + d, where Batch Renormalization has
    gamma (xhat r + d) + beta; r = clip(sqrt(var_B / var), 1/r_max, r_max) without eps and
    d = clip((mean_B - mean) / sqrt(var), -d_max, d_max), constants for the derivative. The running
    mean and variance (biased) are those before the batch enters them. Eval mode is that of BN.

    Args:
        limits: r_max and d_max as a function of the number of batches seen.
    """

    def __init__(
        self,
        width: int,
        limits: Callable[[int], tuple[float, float]],
        *,
        eps: float = 1e-3,
        momentum: float = 0.001,
    ) -> None:
        super().__init__(width, eps=eps, momentum=momentum)
        self.limits, self.rate, self.seen = limits, momentum, 0

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.training:
            return super().forward(input, mask)
        y, moments = batch_norm(input, self.weight, self.bias, eps=self.eps)
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            raise ValueError("running statistics were expected, got none. Build the layer anew.")
        batch_mean, batch_var = moments.mean.to(mean.dtype), moments.var().to(var.dtype)
        r_max, d_max = self.limits(self.seen)
        r = (batch_var / var).sqrt().clamp(1 / r_max, r_max)
        d = ((batch_mean - mean) / var.sqrt()).clamp(-d_max, d_max)
        mean.lerp_(batch_mean, self.rate)
        var.lerp_(batch_var, self.rate)
        self.seen += 1
        return y * r + d


def renorm_limits(steps: int, seen: float) -> tuple[float, float]:
    """r_max and d_max after so many batches of ``steps``: the MNIST study's, as shares of its own.

    >>> renorm_limits(40000, 2000), renorm_limits(40000, 9000), renorm_limits(40000, 16000)
    ((1.0, 0.0), (2.0, 4.375), (3.0, 5.0))
    """
    first = 0.05 * steps

    def share(last: float) -> float:
        return min(max((seen - first) / (last - first), 0.0), 1.0)

    return 1 + 2 * share(0.4 * steps), 5 * share(0.25 * steps)


def renorm(steps: int, eps: float, momentum: float) -> Callable[[int], nn.Module]:
    """Batch Renormalization with the limits of so many steps, made by its width."""

    def layer(width: int) -> nn.Module:
        return BatchRenorm1d(
            width,
            eps,
            momentum,
            r_max=lambda seen: renorm_limits(steps, float(seen))[0],
            d_max=lambda seen: renorm_limits(steps, float(seen))[1],
        )

    return layer


def m2(
    pixels: int,
    activation: str,
    norm: Norm,
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
